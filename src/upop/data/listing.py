"""What every source of images comes down to: one list of images with labels, nothing decoded yet.
Must not know any file format.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from upop.data.items import Ints, Items, Pixels, size_and_time
from upop.errors import DataError

# How people call the splits, and what we call them.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
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


def split_of(name: str) -> str | None:
    """The split that this is a name of, if any: in any case, as `test_set` and `seg_test` too."""
    return SPLITS.get(name.casefold().removeprefix("seg_").removesuffix("_set"))


def by_split(names: Iterable[str], where: str) -> dict[str, str]:
    """Split -> the one of these names that means it; others are left out. Raises DataError for two of one meaning."""
    found: dict[str, str] = {}
    for name in names:
        split = split_of(name)
        if split is not None and (other := found.setdefault(split, name)) != name:
            raise DataError(f"{where}: expected one {split} split, got {other} and {name}; remove one")
    return found


def key_of(root: Path, names: Iterable[str]) -> str:
    """sha256 over the root and the files' names below it, sizes and modification times."""
    digest = hashlib.sha256(f"1\0{root.resolve()}\n".encode(errors="surrogateescape"))
    for name in names:
        size, time = size_and_time(root / name)
        digest.update(f"{name}\0{size}\0{time}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
