"""Random numbers for whole batches: drawn once, whichever share of the batch is at hand, and sent where images are.

Every draw comes from the generator that is passed in. A CPU generator gives the same draws whatever device holds the
images, and costs no host sync on an accelerator: only a few numbers per image are sent over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from upop.devices import sent


@dataclass(frozen=True)
class Share:
    """Which images of a batch of `batch` are at hand: as many as there are, from the one at `first` on."""

    first: int
    batch: int


def batch_of(images: Tensor, share: Share | None) -> int:
    """For how many images is drawn."""
    return len(images) if share is None else share.batch


def uniform(shape: Sequence[int], generator: Generator) -> Tensor:
    """Draws float from [0, 1), where the generator is."""
    return torch.rand(shape, generator=generator, device=generator.device)


def at_hand(draws: Tensor, images: Tensor, share: Share | None, *, dim: int = 0) -> Tensor:
    """Of a batch's draws, one image after another along `dim`, those for the images at hand."""
    return draws if share is None else draws.narrow(dim, share.first, len(images))


def send(draws: Tensor, images: Tensor) -> Tensor:
    """The draws on the images' device."""
    return sent(draws, images.device)


def own(draws: Tensor, images: Tensor, share: Share | None, *, dim: int = 0) -> Tensor:
    """Those of a batch's draws that are for the images at hand, on their device."""
    return send(at_hand(draws, images, share, dim=dim), images)
