"""``python -m qatlib.cli``."""

from qatlib.cli import main

main()
