"""`python -m upop`, as launchers start it."""

from upop.cli import main

main()
