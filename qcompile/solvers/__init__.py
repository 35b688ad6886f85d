"""Solvers: pure functions that choose codes and scales for one weight, ``solve(weight, statistics, scheme, ...) -> Quantized``.

A solver's module says in ``NEEDS`` which statistics of the layer's input it does not work without, in ``USES`` which it takes
where there is data. The one known today is ``gram``: x^T x / rows, float64 [in, in], or [groups, in, in] for a convolution with groups.
``BY_ROWS = True`` says that no row of a weight has a part in another's result: a large weight is then solved a run of rows at a time.
"""
