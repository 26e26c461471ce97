"""Random operations, each against Pillow's or SciPy's, and a batch of them against a loop over its images."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from torch import Generator, Tensor

from upop import randaugment as module
from upop.draws import Share
from upop.randaugment import OPERATIONS, randaugment


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def photos(count: int = 12, height: int = 24, width: int = 32) -> Tensor:
    """Images float [n, 3, h, w] of whole grey values: smooth, with noise, none of them of full range."""
    noise = torch.rand(count, 3, height, width, generator=generator(7))
    slope = torch.linspace(0, 1, width).expand(count, 3, height, width)
    return ((0.15 + 0.5 * slope + 0.2 * noise) * 255).round() / 255


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


# What Pillow does with an image at strength s and sign g.
PILLOW: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "brightness": lambda image, s, g: ImageEnhance.Brightness(image).enhance(1 + 0.9 * g * s),
    "contrast": lambda image, s, g: ImageEnhance.Contrast(image).enhance(1 + 0.9 * g * s),
    "saturation": lambda image, s, g: ImageEnhance.Color(image).enhance(1 + 0.9 * g * s),
    "sharpness": lambda image, s, g: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * g * s),
    "posterize": lambda image, s, g: ImageOps.posterize(image, 8 - round(4 * s)),
    "solarize": lambda image, s, g: ImageOps.solarize(image, math.ceil(255 * (1 - s))),
    "autocontrast": lambda image, s, g: ImageOps.autocontrast(image),
    "equalize": lambda image, s, g: ImageOps.equalize(image),
}
EXACT = ("posterize", "solarize", "equalize")
# The matrix (rows: y, x) that says where SciPy reads, and by how many pixels of an image 24 high and 32 wide it moves.
SCIPY: dict[str, Callable[[float], tuple[list[list[float]], list[float]]]] = {
    "shear_x": lambda a: ([[1, 0], [0.3 * a, 1]], [0, 0]),
    "shear_y": lambda a: ([[1, 0.3 * a], [0, 1]], [0, 0]),
    "shift_x": lambda a: ([[1, 0], [0, 1]], [0, 10 * a]),
    "shift_y": lambda a: ([[1, 0], [0, 1]], [7.5 * a, 0]),
    "rotate": lambda a: (
        [
            [math.cos(math.pi / 6 * a), math.sin(math.pi / 6 * a)],
            [-math.sin(math.pi / 6 * a), math.cos(math.pi / 6 * a)],
        ],
        [0, 0],
    ),
}


def draws(count: int) -> tuple[Tensor, Tensor]:
    strength = torch.linspace(0.03, 0.97, count)[:, None, None, None]
    return strength, torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[:, None, None, None]


def test_there_is_an_operation_for_each_reference() -> None:
    assert {operation.__name__ for operation in OPERATIONS} == {*PILLOW, *SCIPY}


@pytest.mark.parametrize("name", PILLOW)
def test_colours_change_as_pillow_changes_them(name: str) -> None:
    images = photos()
    strength, sign = draws(len(images))
    result = getattr(module, name)(images, strength, sign)
    for image, found, s, g in zip(images, result, strength.flatten(), sign.flatten(), strict=True):
        expected = torch.from_numpy(np.array(PILLOW[name](pillow(image), float(s), float(g)))).permute(2, 0, 1) / 255
        # Pillow rounds what it enhances and stretches, some of it twice.
        assert (found - expected).abs().max() <= (1e-6 if name in EXACT else 1.6 / 255), name
    assert (result[4:] != images[4:]).flatten(1).any(dim=1).all()  # weak ones may leave all as it is


@pytest.mark.parametrize("name", SCIPY)
def test_images_move_about_their_middle_and_their_mean_colour_fills_in(name: str) -> None:
    images = photos()
    strength, sign = draws(len(images))
    result = getattr(module, name)(images, strength, sign)
    middle = np.array([11.5, 15.5])
    for image, found, amount in zip(images, result, (strength * sign).flatten(), strict=True):
        matrix, shift = SCIPY[name](float(amount))
        offset = middle - np.array(matrix) @ middle + shift
        for channel, seen in zip(image.numpy(), found.numpy(), strict=True):
            fill = {"mode": "grid-constant", "cval": channel.mean(), "order": 1}
            expected = ndimage.affine_transform(channel, np.array(matrix), offset, **fill)
            assert np.abs(seen - expected).max() < 1e-4


def test_flat_images_are_left_as_they_are_where_there_is_nothing_to_spread() -> None:
    flat = torch.full((2, 3, 8, 8), 0.4)
    nothing = torch.zeros(2, 1, 1, 1)
    for operation in (module.autocontrast, module.equalize):
        torch.testing.assert_close(operation(flat, nothing, nothing), flat)


@pytest.mark.parametrize("operations", [1, 2, 3])
def test_a_batch_is_a_loop_over_its_images(operations: int) -> None:
    images = photos(200, 8, 8)
    found = randaugment(images, operations=operations, generator=generator(3))
    which, strength, sign = torch.rand((3, operations, 200), generator=generator(3))
    for index, image in enumerate(images):
        for turn in range(operations):
            number = int(which[turn, index] * 14)
            side = torch.tensor(-1.0 if sign[turn, index] < 0.5 else 1.0)
            if number < 13:
                image = OPERATIONS[number](image[None], strength[turn, index].view(1, 1, 1, 1), side.view(1, 1, 1, 1))[
                    0
                ]
        torch.testing.assert_close(found[index], image, atol=1e-5, rtol=1e-5)


def test_every_operation_has_its_turn_and_one_in_fourteen_images_stays() -> None:
    images = photos(1400)
    found = randaugment(images, operations=1, generator=generator())
    same = (found == images).flatten(1).all(dim=1).float().mean()
    assert 1 / 14 - 0.02 < same < 1 / 14 + 0.05  # weak posterizing and solarizing leave some more
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_share_of_a_batch_gets_what_the_whole_batch_gives_it() -> None:
    images = photos(12)
    whole = randaugment(images, operations=2, generator=generator(5))
    part = randaugment(images[4:9], operations=2, generator=generator(5), share=Share(4, 12))
    torch.testing.assert_close(part, whole[4:9])
