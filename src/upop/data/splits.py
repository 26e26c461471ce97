"""What a data set is once loaded, and how one list of labels is cut into stratified parts.
Must not read files or know where images come from.

Shapes: n images, h height, w width; images are uint8 RGB in [0, 255].
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from upop.data.items import Items, decode
from upop.errors import DataError

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MemorySplit:
    """A split that is decoded as a whole."""

    images: Tensor  # uint8 [n, 3, h, w]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class StreamSplit:
    """A split too large for memory: each image is decoded, resized and cropped when it is asked for."""

    items: Items
    index: Ints  # [n] positions in `items`
    labels: Tensor  # int64 [n]
    size: int  # every image comes as uint8 [3, size, size]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Tensor:
        """Image uint8 [3, size, size]; a file that is no image is a DataError that names it."""
        return torch.from_numpy(decode(self.items, int(self.index[position]), self.size))


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


def cut(labels: Ints, count: int, *, seed: int, stream: int, what: str) -> tuple[Ints, Ints]:
    """Positions (rest, part) with `count` of them in the part, classes in proportion, both ascending.

    Depends on the labels, the seed and the stream alone: the keys are raw PCG64 output, which numpy promises
    to keep on every platform and in every version (it does not promise that for shuffles).
    """
    quota = _quota(np.bincount(labels), count, what)
    keys = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(len(labels))
    taken = np.zeros(len(labels), dtype=bool)
    for label, amount in enumerate(quota):
        members = np.flatnonzero(labels == label)
        taken[members[np.argsort(keys[members], kind="stable")[:amount]]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _quota(sizes: Ints, count: int, what: str) -> Ints:
    """How many of each class the part gets: in proportion, and one at least on either side of the cut."""
    present = sizes > 0
    least, most = present.astype(np.int64), sizes - present
    if (most < least).any():
        label = int(np.flatnonzero(most < least)[0])
        raise DataError(
            f"{what}: class {label} has a single image, a stratified split needs one in each part; add images"
        )
    if not least.sum() <= count <= most.sum():
        raise DataError(
            f"{what}: expected {least.sum()} to {most.sum()} images so that each of {present.sum()} classes has "
            f"one in both parts, got {count}; choose a number in between"
        )
    share = sizes * (count / sizes.sum())
    quota = np.clip(np.floor(share).astype(np.int64), least, most)
    while (missing := count - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = quota < most if step > 0 else quota > least
        need = np.where(free, step * (share - quota), -np.inf)
        quota[int(np.argmax(need))] += step
    return quota
