"""Solvers: pure functions that choose codes and scales for one weight, ``solve(weight, statistics, scheme, ...) -> Quantized``."""
