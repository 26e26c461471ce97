"""What every source of images comes down to: one list of images with labels, nothing decoded yet.
Must not know any file format.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from upop.data.items import Ints, Items, Pixels, size_and_time

# How folders and files call the splits, and what we call them.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Listing:
    """All n images of a data set, of all its splits."""

    name: str
    classes: tuple[str, ...]
    images: Items | Pixels  # n encoded images, or pixels uint8 [n, 3, h, w]
    labels: Ints  # [n], positions in `classes`
    parts: dict[str, Ints]  # "train" and, if there, "validation" and "test": positions in the list, ascending
    key: str | None = None  # what the decoded images are cached under; None: they are not
    skipped: tuple[str, ...] = ()
    share: float = 0.1  # of train that a missing part is given


def key_of(root: Path, names: Iterable[str]) -> str:
    """sha256 over the root and the files' names below it, sizes and modification times."""
    digest = hashlib.sha256(f"1\0{root.resolve()}\n".encode(errors="surrogateescape"))
    for name in names:
        size, time = size_and_time(root / name)
        digest.update(f"{name}\0{size}\0{time}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
