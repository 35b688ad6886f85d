"""The command line. ``qcompile --help`` loads neither torch nor tvm: each command imports what it needs when it runs."""

from qcompile.cli.main import main

__all__ = ["main"]
