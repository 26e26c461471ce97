"""Batches of one split: picked, augmented, resized and normalised on the device.
Must not read files; order and draws depend on nothing but (seed, epoch, batch), whatever the number of ranks.

Shapes: B this rank's share of a batch, C classes, h/w stored size, n images of the split.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upop.augment import Augment
from upop.data.splits import MemorySplit, Split, StreamSplit
from upop.devices import sent
from upop.draws import Share
from upop.errors import DataError


class Batches:
    """Batches of one split on the device, ready for the model.

    `batch_size` counts all ranks; a rank gets its contiguous share of every batch. Training batches are
    shuffled and augmented, and an incomplete last one is dropped unless it is the only one. Without `train`
    all images come once, in order, and `augment` is not used. `workers` processes decode a streamed split.

    A batch is the same however many ranks share it; but where a streamed split is mixed (mixup, cutmix), partners are
    found within a rank's share, so that nobody decodes the images of others.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        train: bool = False,
        augment: Augment | None = None,
        num_classes: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
    ) -> None:
        _check_ranks(split, batch_size, rank, world, train=train)
        _check_values(split, size, mean, std, num_classes)
        self.split, self.device = split, torch.device(device)
        self.size, self.num_classes, self.train = size, num_classes, train
        self.augment = augment if train else None
        mixes = world > 1 and self.augment is not None and self.augment.mixes
        # What is mixed needs its partners: in memory the whole batch is at hand.
        in_memory = isinstance(split, MemorySplit)
        self._whole, self._alone = mixes and in_memory, mixes and not in_memory
        self.batch_size = min(batch_size, len(split)) if train else batch_size
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.labels = split.labels.to(self.device)
        self.images = split.images.to(self.device) if isinstance(split, MemorySplit) else None
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device)[:, None, None]

    def __len__(self) -> int:
        """Batches of an epoch; without `train` those in which this rank has a share."""
        full, left = divmod(len(self.split), self.batch_size)
        first, stop = self._share(left)
        return full if self.train or first == stop else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `start` on: x float32 [B, 3, size, size]; y int64 [B], or float32 [B, C] when mixing."""
        if not 0 <= start <= len(self):
            raise DataError(f"Batches: expected to start from batch 0 to {len(self)}, got {start}")
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order(epoch)
        picks = [self._pick(order, batch) for batch in range(start, len(self))]
        images = self._fetched(picks) if self.images is None else (self.images[pick] for pick in picks)
        for batch, (pick, stored) in enumerate(zip(picks, images, strict=True), start):
            yield self._prepare(stored, self.labels[sent(pick, self.device)], (epoch, batch))

    def _order(self, epoch: int) -> Tensor:
        """Positions int64 [n] of this epoch, where the images are picked: on the device, or for workers."""
        if self.train:
            order = torch.randperm(len(self.split), generator=_generator(self.seed, epoch))
        else:
            order = torch.arange(len(self.split))
        return order if self.images is None else sent(order, self.device)

    def _pick(self, order: Tensor, batch: int) -> Tensor:
        first = batch * self.batch_size
        count = min(self.batch_size, len(order) - first)
        low, high = (0, count) if self._whole else self._share(count)
        return order[first + low : first + high]

    def _share(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def _fetched(self, picks: list[Tensor]) -> Iterator[Tensor]:
        """Images uint8 [B, 3, h, w] on the device, decoded by the workers."""
        loader: DataLoader[Tensor | str] = DataLoader(
            _Picked(self.split, [pick.tolist() for pick in picks]),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_end_by_parent_alone,
            generator=torch.Generator(),  # otherwise it draws from, and so changes, the global one
        )
        with _no_sigterm():  # a worker inherits that, and so has it from its first moment
            fetched = iter(loader)
        for images in fetched:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True)

    def _prepare(self, images: Tensor, labels: Tensor, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        pixels = _square(images).float().div_(255)
        if self.augment is not None:
            generator = _generator(self.seed, *place, self.rank if self._alone else 0)
            low, high = self._share(self.batch_size)
            share = None if self.augment.mixes else Share(low, self.batch_size)
            pixels, labels = self.augment(
                pixels, labels, num_classes=self.num_classes, generator=generator, share=share
            )
            if self._whole:
                pixels, labels = pixels[low:high], labels[low:high]
        return (resize(pixels, self.size) - self.mean) / self.std, labels


class _Picked(Dataset[Tensor | str]):
    """One item per batch: images uint8 [B, 3, h, w], or what is wrong, since workers garble exceptions."""

    def __init__(self, split: Split, picks: list[list[int]]) -> None:
        self.split, self.picks = split, picks

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, batch: int) -> Tensor | str:
        assert isinstance(self.split, StreamSplit)
        try:
            return torch.stack([self.split[index] for index in self.picks[batch]])
        except DataError as error:
            return str(error)


@contextmanager
def _no_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM waits, where workers can take it up again in `_end_by_parent_alone`."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_by_parent_alone(worker: int) -> None:
    """In a worker: a SIGTERM to all processes of a run, as of a cluster, ends none that the run still needs."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _check_ranks(split: Split, batch_size: int, rank: int, world: int, *, train: bool) -> None:
    if not 0 <= rank < world:
        raise DataError(f"Batches: expected a rank from 0 to {world - 1}, got {rank}; number the ranks from 0")
    if batch_size < world:
        raise DataError(
            f"Batches: expected a batch_size of {world} or more (one per rank), got {batch_size}; raise it"
        )
    if len(split) < (world if train else 1):
        raise DataError(f"Batches: expected {world} images or more (one per rank), got {len(split)}; use fewer ranks")


def _check_values(split: Split, size: int, mean: Sequence[float], std: Sequence[float], num_classes: int) -> None:
    if size < 1:
        raise DataError(f"Batches: expected a size of 1 pixel or more, got {size}; give the model's image size")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DataError(
            f"Batches: expected mean and std of 3 channels, std above 0, got {mean} and {std}; correct them"
        )
    if (largest := int(split.labels.max())) >= num_classes:
        raise DataError(f"Batches: expected labels below {num_classes}, got {largest}; give the model more classes")


def resize(images: Tensor, size: int) -> Tensor:
    """Images float [B, 3, h, w] in [0, 1] as [B, 3, size, size], bicubic as Pillow does it."""
    if images.shape[2:] == (size, size):
        return images
    scaled = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return scaled.clamp_(0, 1)  # bicubic overshoots at edges


def _square(images: Tensor) -> Tensor:
    """The central square, so that resizing never distorts."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _generator(*key: int) -> torch.Generator:
    """A CPU generator for this key: the same draws on every device, and no host sync."""
    words = [part % 2**64 for part in key]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
