"""`python -m upop.cli`, as launchers start it."""

from upop.cli import main

main()
