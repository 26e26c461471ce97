"""RandAugment (Cubuk et al., 2020) of whole batches: some operations for each image, each drawn as by TrivialAugment.

TrivialAugment (Müller and Hutter, 2021) draws an operation and its strength uniformly, so that nothing is to be tuned;
operations and ranges are those of its space "RA". Colours change as Pillow changes them; what moves an image does so
about its middle, bilinearly, and its mean colour fills in. Shapes: n images with the same operation, float32
[n, 3, h, w] in [0, 1]; strengths [n, 1, 1, 1] in [0, 1), signs [n, 1, 1, 1] of -1 or 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from upop.draws import Share, at_hand, batch_of, send, uniform

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's greyscale
# At strength 1.
SHEAR = 0.3
SHIFT = 10 / 32  # of the image's side
TURN = math.radians(30)
ENHANCE = 0.9  # factors from 1 - this to 1 + this
LEAST_BITS = 4

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def randaugment(images: Tensor, *, operations: int, generator: Generator, share: Share | None = None) -> Tensor:
    """Change each image [B, 3, h, w] by so many operations, each drawn for it; one in 14 does nothing."""
    drawn = at_hand(uniform((3, operations, batch_of(images, share)), generator), images, share, dim=2)
    which = (drawn[0] * (len(OPERATIONS) + 1)).long()
    strengths = send(drawn[1], images)[..., None, None, None]
    signs = send(torch.where(drawn[2] < 0.5, -1.0, 1.0), images)[..., None, None, None]
    # Sorted and counted where the draws are: with a CPU generator no device is asked how many images go where.
    order = send(which.argsort(dim=1), images)
    counts = [turn.bincount(minlength=len(OPERATIONS) + 1).tolist() for turn in which]
    for turn in range(operations):
        result = images.clone()
        for operation, chosen in zip(
            OPERATIONS, torch.split(order[turn], counts[turn]), strict=False
        ):  # the last: nothing
            if len(chosen):
                result[chosen] = operation(images[chosen], strengths[turn, chosen], signs[turn, chosen])
        images = result
    return images


def grey(images: Tensor) -> Tensor:
    """Luma float [n, 1, h, w]."""
    luma: Tensor = LUMA[0] * images[:, 0:1] + LUMA[1] * images[:, 1:2] + LUMA[2] * images[:, 2:3]
    return luma


def _moved(images: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    """Read at the places that a matrix [2, 3] gives, the last column in halves of a side; outside is the mean."""
    count, _, height, width = images.shape
    aspect = height / width
    halves = ((1, aspect, 1), (1 / aspect, 1, 1))  # torch measures each axis in halves of its own length
    one = images.new_ones(count)
    matrix = torch.stack(
        [
            torch.stack([one * value * half for value, half in zip(*row, strict=True)], dim=1)
            for row in zip(rows, halves, strict=True)
        ],
        dim=1,
    )  # [n, 2, 3]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    middle = images.mean(dim=(2, 3), keepdim=True)
    return (middle + F.grid_sample(images - middle, grid, align_corners=False)).clamp(0, 1)


def shear_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, [[1, SHEAR * (sign * strength).flatten(), 0], [0, 1, 0]])


def shear_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, [[1, 0, 0], [SHEAR * (sign * strength).flatten(), 1, 0]])


def shift_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, [[1, 0, 2 * SHIFT * (sign * strength).flatten()], [0, 1, 0]])


def shift_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _moved(images, [[1, 0, 0], [0, 1, 2 * SHIFT * (sign * strength).flatten()]])


def rotate(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    angle = TURN * (sign * strength).flatten()
    return _moved(images, [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])


def _enhanced(plain: Tensor, images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Away from, or towards, what the image is without the quality in question."""
    return torch.lerp(plain, images, 1 + ENHANCE * sign * strength).clamp(0, 1)


def brightness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _enhanced(torch.zeros_like(images), images, strength, sign)


def contrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    plain = grey(images).mean(dim=(2, 3), keepdim=True)
    return _enhanced(plain.expand_as(images), images, strength, sign)


def saturation(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _enhanced(grey(images).expand_as(images), images, strength, sign)


def sharpness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()  # its border stays
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return _enhanced(smooth, images, strength, sign)


def posterize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    step = torch.exp2(((8 - LEAST_BITS) * strength).round())  # what the bits that go are worth
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return torch.where(images >= 1 - strength, 1 - images, images)


def autocontrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1 / 255), images)


def equalize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Spread the values of each channel so that all occur about as often."""
    values = (images * 255).round().long().flatten(2)  # [n, 3, h * w]
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    below = counts.cumsum(2) - counts
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    spread = table.gather(2, values).view_as(images).to(images.dtype) / 255
    return torch.where(step[..., None] > 0, spread, images)


OPERATIONS: tuple[Operation, ...] = (
    shear_x,
    shear_y,
    shift_x,
    shift_y,
    rotate,
    brightness,
    contrast,
    saturation,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
)
