"""What a data set is once loaded, and how one list of labels is cut into stratified parts.
Must not read files or know where images come from.

Shapes: n images, h height, w width; images are uint8 RGB in [0, 255].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from upop.data.items import Ints, Items, Square, decode
from upop.errors import DataError


@dataclass(frozen=True)
class MemorySplit:
    """A split that is decoded as a whole."""

    images: Tensor  # uint8 [n, 3, h, w]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class StreamSplit:
    """A split too large for memory: an image is decoded, resized and cropped whenever it is asked for."""

    items: Items  # n, this split's alone
    labels: Tensor  # int64 [n]
    square: Square  # what every image comes as, uint8 [3, size, size]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """Image uint8 [3, size, size]; a file that is no image is a DataError that names it."""
        return torch.from_numpy(decode(self.items, index, self.square))


Split: TypeAlias = MemorySplit | StreamSplit


@dataclass(frozen=True)
class ImageData:
    """A data set, cut into its three splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split | None
    fingerprint: str  # sha256 of all images and labels, in order (streams: of names, sizes and labels)
    skipped: tuple[str, ...]  # files left out on request
    shorter_side: int  # that images are resized to, before their central square of the model's size is taken

    def facts(self) -> dict[str, Any]:
        """What a result says of its data, as plain values."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "images": {name: len(split) for name, split in splits.items() if split is not None},
            "skipped": list(self.skipped),
        }


def check_classes(labels: Ints, parts: dict[str, Ints], classes: Sequence[str], where: str) -> None:
    """No part is empty, every class has an image in train, and no other part a class that train lacks."""
    if len(classes) < 2:
        raise DataError(
            f"{where}: expected 2 classes or more, got {len(classes)} ({', '.join(classes)}); "
            "is this the folder above the data set?"
        )
    present = {part: set(np.unique(labels[index]).tolist()) for part, index in parts.items()}
    for part, found in present.items():
        if not found:
            raise DataError(f"{where}: expected images in {part}, got none; add images")
        if extra := sorted(found - present["train"]):
            raise DataError(
                f"{where}: expected the classes of train in {part}, got {_some(extra, classes)} besides; "
                "give both the same classes"
            )
    if missing := sorted(set(range(len(classes))) - present["train"]):
        raise DataError(f"{where}: class {_some(missing, classes)} has no image in train; add images or remove it")


def cut(
    labels: Ints, count: int, *, seed: int, stream: int, what: str, classes: Sequence[str], rest: int = 1
) -> tuple[Ints, Ints]:
    """Positions (others, part) of `count` images in the part, classes in proportion, both ascending.

    Every class keeps one image in the part and at least `rest` among the others. The choice depends on the
    labels, the seed and the stream alone: its keys are raw PCG64 output, which numpy promises to keep on
    every platform and in every version (it does not promise that for shuffles).
    """
    quota = _quota(np.bincount(labels, minlength=len(classes)), count, rest, what, classes)
    keys = np.random.PCG64(np.random.SeedSequence([seed % 2**64, stream])).random_raw(len(labels))
    taken = np.zeros(len(labels), dtype=bool)
    for label, amount in enumerate(quota):
        members = np.flatnonzero(labels == label)
        taken[members[np.argsort(keys[members], kind="stable")[:amount]]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _quota(sizes: Ints, count: int, rest: int, what: str, classes: Sequence[str]) -> Ints:
    """How many of each class [C] the part gets: in proportion, by largest remainder within the limits."""
    present = (sizes > 0).astype(np.int64)
    most = sizes - rest * present
    if scarce := np.flatnonzero(most < present).tolist():
        raise DataError(
            f"{what}: expected {rest + 1} images or more of every class for a stratified split, "
            f"got {sizes[scarce[0]]} of {_some(scarce, classes)}; add images"
        )
    low, high = int(present.sum()), int(most.sum())
    if not low <= count <= high:
        raise DataError(
            f"{what}: expected {low} to {high} of {sizes.sum()} images, so that each of {low} classes is on "
            f"either side of a stratified split, got {count}; choose a number in between"
        )
    share = sizes * (count / sizes.sum())
    quota: Ints = np.clip(np.floor(share).astype(np.int64), present, most)
    while missing := count - int(quota.sum()):
        step = 1 if missing > 0 else -1
        free = quota < most if step > 0 else quota > present
        quota[int(np.argmax(np.where(free, step * (share - quota), -np.inf)))] += step
    return quota


def _some(labels: Sequence[int], classes: Sequence[str]) -> str:
    names = ", ".join(repr(classes[label]) for label in labels[:3])
    return names + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
