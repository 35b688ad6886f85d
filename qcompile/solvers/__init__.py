"""Solvers: pure functions that choose codes and scales for one weight, ``solve(weight, statistics, scheme, ...) -> Quantized``.

A solver's module says in ``NEEDS`` which statistics of the layer's input it does not work without, in ``USES`` which it takes
where there is data. Known are

- ``gram``: x^T x / rows, float64 [in, in], or [groups, in, in] where runs of output channels have their own: a convolution with groups, or
  rows that count more for some outputs than for others;
- ``cross``: x^T z / rows of the same shape, z being what the layer reads in the float model, where x is what it reads here;
- ``heads``: what errors of the outputs count in the scores of their attention head, float64 [heads, d, d], for queries and keys.

``FORMATS`` names the classes of formats that a solver is for, where it is not for all. ``BY_ROWS = True`` says that no row of a weight has
a part in another's result: a large weight is then solved a run of rows at a time.

Keyword parameters of a type that text can write are the solver's options: ``quantize-weights{solver=NAME, option=value}``.
"""
