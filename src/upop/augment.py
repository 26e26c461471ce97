"""Augmentations of whole batches, on the device that holds them.
Must not know data sets, models or epochs: images and a generator come in, images and labels go out.

Shapes: B batch, C classes, h height, w width. Images are float [B, 3, h, w] in [0, 1].
An image gets the same draws, whichever share of the batch is at hand and whatever device it is on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from upop.draws import Share, batch_of, own, send, uniform
from upop.errors import DataError
from upop.randaugment import grey, randaugment

ERASE_AREA = (0.02, 1 / 3)  # of the image, as in Random Erasing (Zhong et al., 2017) and timm
ERASE_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augment:
    """Which augmentations a training batch gets; mixing comes last."""

    flip: bool = True  # horizontally, with probability one half
    crop: int = 4  # reflect-pad by this many pixels of a 32 px image (scaled to others), crop back; 0: off
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0: off
    cutmix: float = 0.0  # alpha of Beta(alpha, alpha); 0: off. With mixup on as well: one of them per batch
    erasing: float = 0.0  # probability that an image loses a random rectangle
    color: float = 0.0  # strength in [0, 1] of brightness, contrast and saturation jitter
    randaugment: int = 0  # operations drawn for each image; 1 is TrivialAugment

    def __post_init__(self) -> None:
        _check("crop", self.crop, 0, 31, "pixels of a 32 px image")
        _check("erasing", self.erasing, 0, 1, "a probability")
        _check("color", self.color, 0, 1, "a strength")
        if self.randaugment not in range(15):
            raise DataError(f"Augment.randaugment is a number of operations, from 0 to 14; got {self.randaugment}")
        _check("mixup", self.mixup, 0, float("inf"), "the alpha of a Beta distribution")
        _check("cutmix", self.cutmix, 0, float("inf"), "the alpha of a Beta distribution")

    @property
    def mixes(self) -> bool:
        """Whether labels come back as float [B, C] instead of int64 [B]."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self, images: Tensor, labels: Tensor, *, num_classes: int, generator: Generator, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images float [B, 3, h, w] in [0, 1]; labels int64 [B], back as float [B, C] when mixing.

        Mixing needs the whole batch: `share` is then None.
        """
        assert share is None or not self.mixes, "partners are in the whole batch"
        if self.flip:
            images = flip(images, generator=generator, share=share)
        if self.crop:
            images = crop(images, pad=self.crop, generator=generator, share=share)
        if self.randaugment:
            images = randaugment(images, operations=self.randaugment, generator=generator, share=share)
        if self.color:
            images = jitter(images, strength=self.color, generator=generator, share=share)
        if self.erasing:
            images = erase(images, probability=self.erasing, generator=generator, share=share)
        if not self.mixes:
            return images, labels
        targets = F.one_hot(labels, num_classes).float()
        both = self.mixup > 0 and self.cutmix > 0
        coin = float(uniform((), generator)) if both else 0.0
        if self.mixup > 0 and coin < 0.5:
            return mixup(images, targets, alpha=self.mixup, generator=generator)
        return cutmix(images, targets, alpha=self.cutmix, generator=generator)


def flip(images: Tensor, *, generator: Generator, share: Share | None = None) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = own(uniform((batch_of(images, share), 1, 1, 1), generator) < 0.5, images, share)
    return torch.where(mirrored, images.flip(3), images)


def crop(images: Tensor, *, pad: int, generator: Generator, share: Share | None = None) -> Tensor:
    """Reflect-pad by `pad` pixels of 32 (scaled to h and w) and cut h x w out at a random place."""
    batch, channels, height, width = images.shape
    drawn = batch_of(images, share)
    rows = own(_shifted(drawn, height, round(pad * height / 32), generator), images, share)  # [B, h]
    columns = own(_shifted(drawn, width, round(pad * width / 32), generator), images, share)  # [B, w]
    images = images.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
    return images.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))


def jitter(images: Tensor, *, strength: float, generator: Generator, share: Share | None = None) -> Tensor:
    """Scale brightness, contrast, then saturation of each image, by factors in [1 - strength, 1 + strength]."""
    factors = 1 + strength * (2 * uniform((3, batch_of(images, share), 1, 1, 1), generator) - 1)
    brightness, contrast, saturation = own(factors, images, share, dim=1).to(images.dtype)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean(dim=(2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    return torch.lerp(grey(images), images, saturation).clamp(0, 1)


def erase(images: Tensor, *, probability: float, generator: Generator, share: Share | None = None) -> Tensor:
    """Paint a random rectangle in the image's mean colour, in each image with this probability."""
    _, _, height, width = images.shape
    chance, size, shape, top, left = uniform((5, batch_of(images, share)), generator)
    area = ERASE_AREA[0] + size * (ERASE_AREA[1] - ERASE_AREA[0])
    aspect = torch.exp((2 * shape - 1) * torch.log(torch.tensor(ERASE_ASPECT[1])))
    tall = (height * (area * aspect).sqrt()).round().clamp(1, height)
    wide = (width * (area / aspect).sqrt()).round().clamp(1, width)
    tall = torch.where(chance < probability, tall, 0)
    first_row, first_column = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
    box = torch.stack((first_row, first_row + tall, first_column, first_column + wide))
    inside = _inside(own(box, images, share, dim=1), height, width)
    return torch.where(inside, images.mean(dim=(2, 3), keepdim=True), images)


def mixup(images: Tensor, targets: Tensor, *, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Blend each image and its target float [B, C] with another one of the batch, by Beta(alpha, alpha)."""
    partner = send(torch.randperm(len(images), generator=generator, device=generator.device), images)
    kept = send(_beta(len(images), alpha, generator), images).to(images.dtype)  # [B]
    blended = torch.lerp(images[partner], images, kept[:, None, None, None])
    return blended, torch.lerp(targets[partner], targets, kept[:, None])


def cutmix(images: Tensor, targets: Tensor, *, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Paste a box of another image of the batch into each; targets float [B, C] mix by the area kept."""
    batch, _, height, width = images.shape
    partner = send(torch.randperm(batch, generator=generator, device=generator.device), images)
    side = (1 - _beta(batch, alpha, generator)).sqrt()
    middle = uniform((2, batch), generator)
    box = torch.cat([_span(middle[0], side, height), _span(middle[1], side, width)])  # [4, B]
    inside = _inside(send(box, images), height, width)
    kept = 1 - inside.to(images.dtype).mean(dim=(1, 2, 3))  # what is left after clipping at the border
    return torch.where(inside, images[partner], images), torch.lerp(targets[partner], targets, kept[:, None])


def _check(name: str, value: float, low: float, high: float, meaning: str) -> None:
    if not low <= value <= high:
        bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise DataError(f"Augment.{name} is {meaning}, {bound}; got {value}: give a value in that range")


def _shifted(batch: int, length: int, pad: int, generator: Generator) -> Tensor:
    """Positions int64 [B, length] that a crop shifted by up to `pad` reads along an axis, reflected at its ends."""
    shift = torch.randint(-pad, pad + 1, (batch, 1), generator=generator, device=generator.device)
    position: Tensor = (torch.arange(length, device=generator.device) + shift).abs()
    reflected: Tensor = length - 1 - (length - 1 - position).abs()
    return reflected


def _beta(count: int, alpha: float, generator: Generator) -> Tensor:
    """Draws float [count] from Beta(alpha, alpha), by two gammas: torch.distributions takes no generator."""
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=generator.device)
    gammas = torch._standard_gamma(shape, generator=generator)
    return torch.div(gammas[0], gammas[0] + gammas[1]).float()


def _span(middle: Tensor, side: Tensor, length: int) -> Tensor:
    """Bounds [2, B] (first, last + 1) of intervals of relative length `side`, cut off at 0 and `length`."""
    first = ((middle - side / 2) * length).round()
    last = first + (side * length).round()
    return torch.stack((first, last)).clamp(0, length)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """Mask bool [B, 1, h, w] of boxes [4, B] = (top, bottom, left, right), bottom and right excluded."""
    top, bottom, left, right = box[:, :, None]
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside: Tensor = rows[:, :, None] & columns[:, None, :]
    return inside[:, None]
