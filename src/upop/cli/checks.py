"""Checks of options that several commands have.

Must not compute, nor import what does.
"""

from upop.errors import UpopError


def check_split(split: str) -> None:
    """Raise UpopError for what is no split that is held out."""
    if split not in ("validation", "test"):
        raise UpopError(f"--split: expected validation or test, got {split!r}")
