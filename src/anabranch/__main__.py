"""``python -m anabranch`` is the program ``anabranch``."""

from anabranch.cli import main

main()
