"""Entry for ``python -m qcompile.cli``."""

from qcompile.cli.main import main

main()
