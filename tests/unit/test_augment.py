"""Augmentations against per-image loops, and against what their parameters promise."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Generator, Tensor

from upop.augment import Augment, crop, cutmix, erase, flip, jitter, mixup
from upop.errors import DataError
from upop.randaugment import randaugment


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, height: int = 8, width: int = 8) -> Tensor:
    """Images float [B, 3, h, w] whose pixels all differ, so that a move is seen."""
    values = torch.randperm(count * 3 * height * width, generator=generator(7)).float()
    return (values / values.numel()).view(count, 3, height, width)


def matches_one(image: Tensor, candidates: list[Tensor]) -> bool:
    return any(torch.equal(image, candidate) for candidate in candidates)


EVERY: dict[str, Callable[..., Tensor]] = {
    "flip": lambda x, g: flip(x, generator=g),
    "crop": lambda x, g: crop(x, pad=8, generator=g),
    "jitter": lambda x, g: jitter(x, strength=0.5, generator=g),
    "randaugment": lambda x, g: randaugment(x, operations=2, generator=g),
    "erase": lambda x, g: erase(x, probability=0.5, generator=g),
    "mixup": lambda x, g: mixup(x, torch.eye(len(x)), alpha=0.8, generator=g)[0],
    "cutmix": lambda x, g: cutmix(x, torch.eye(len(x)), alpha=0.8, generator=g)[0],
}


@pytest.mark.parametrize("name", EVERY)
def test_each_is_a_pure_function_of_images_and_generator(name: str) -> None:
    images = pictures(16)
    before = images.clone()
    first, second = EVERY[name](images, generator(3)), EVERY[name](images, generator(3))
    other = EVERY[name](images, generator(4))
    assert torch.equal(images, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1


def test_flip_mirrors_about_half_of_the_images_and_keeps_the_others() -> None:
    images = pictures(400)
    flipped = flip(images, generator=generator())
    mirrored = 0
    for image, result in zip(images, flipped, strict=True):
        assert matches_one(result, [image, image.flip(2)])
        mirrored += torch.equal(result, image.flip(2))
    assert 160 < mirrored < 240


@pytest.mark.parametrize(("height", "width", "pad_rows", "pad_columns"), [(32, 32, 4, 4), (8, 16, 1, 2)])
def test_crop_is_a_window_of_the_reflected_image_with_padding_scaled_from_32_pixels(
    height: int, width: int, pad_rows: int, pad_columns: int
) -> None:
    images = pictures(300, height, width)
    cropped = crop(images, pad=4, generator=generator())
    padding = ((0, 0), (pad_rows, pad_rows), (pad_columns, pad_columns))
    seen = set()
    for image, result in zip(images.numpy(), cropped.numpy(), strict=True):
        padded = np.pad(image, padding, mode="reflect")
        windows = {
            (top, left): padded[:, top : top + height, left : left + width]
            for top in range(2 * pad_rows + 1)
            for left in range(2 * pad_columns + 1)
        }
        found = [place for place, window in windows.items() if np.array_equal(window, result)]
        assert len(found) == 1
        seen.update(found)
    rows, columns = ({place[axis] for place in seen} for axis in (0, 1))
    assert rows == set(range(2 * pad_rows + 1))
    assert columns == set(range(2 * pad_columns + 1))


def test_jitter_scales_brightness_contrast_and_saturation_as_pillow_does() -> None:
    """Each factor is recovered from its effect on an image that the other two leave alone."""
    images = pictures(64, 16, 16) * 0.4 + 0.3
    draws = 1 + 0.25 * (2 * torch.rand((3, 64, 1, 1, 1), generator=generator(5)) - 1)
    result = jitter(images, strength=0.25, generator=generator(5))
    for index in range(64):
        image = Image.fromarray((images[index].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, draws[:, index].flatten().tolist(), strict=True):
            image = enhancer(image).enhance(factor)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert (result[index] - expected).abs().max() < 4 / 255  # Pillow rounds three times


def test_jitter_of_strength_zero_changes_nothing() -> None:
    images = pictures(8)
    torch.testing.assert_close(jitter(images, strength=0, generator=generator()), images, atol=1e-6, rtol=0)


def test_erase_paints_one_rectangle_in_the_mean_colour() -> None:
    images = pictures(200, 32, 32)
    erased = erase(images, probability=0.5, generator=generator())
    changed = 0
    areas = []
    for image, result in zip(images, erased, strict=True):
        mask = (image != result).any(dim=0)
        if not mask.any():
            continue
        changed += 1
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        box = result[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(box, image.mean(dim=(1, 2))[:, None, None].expand_as(box))
        areas.append(box[0].numel() / image[0].numel())
    assert 70 < changed < 130
    assert min(areas) > 0.01
    assert max(areas) < 0.4


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, 1)])
def test_erase_at_the_ends_touches_none_or_all(probability: float, share: int) -> None:
    images = pictures(50, 32, 32)
    erased = erase(images, probability=probability, generator=generator())
    assert (images != erased).flatten(1).any(dim=1).float().mean() == share


def two_kinds(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Image i is i + 1 parts of `count` everywhere, its target its own class: a mix can be read off both."""
    levels = torch.arange(1, count + 1) / count
    return levels[:, None, None, None].expand(count, 3, size, size).clone(), torch.eye(count)


def test_mixup_blends_images_and_targets_in_the_same_ratio() -> None:
    images, targets = two_kinds(64)
    mixed, labels = mixup(images, targets, alpha=1.0, generator=generator())
    torch.testing.assert_close(labels.sum(1), torch.ones(64))
    assert (labels > 0).sum(1).max() == 2
    levels = images[:, 0, 0, 0]
    torch.testing.assert_close(mixed[:, 0, 0, 0], labels @ levels)
    assert labels.diagonal().unique().numel() > 50  # a ratio of its own for each image


def test_cutmix_pastes_a_rectangle_and_mixes_targets_by_its_area() -> None:
    images, targets = two_kinds(64)
    mixed, labels = cutmix(images, targets, alpha=1.0, generator=generator())
    boxes = 0
    for index, image in enumerate(mixed):
        other = image[0] != images[index, 0, 0, 0]
        share = other.float().mean()
        torch.testing.assert_close(labels[index, index], 1 - share)
        if not other.any():
            continue
        boxes += 1
        rows, columns = other.any(dim=1).nonzero().flatten(), other.any(dim=0).nonzero().flatten()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        partner = int(labels[index].masked_fill(torch.arange(64) == index, 0).argmax())
        assert (box == images[partner, 0, 0, 0]).all()
        torch.testing.assert_close(labels[index, partner], share)
    assert boxes > 40


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_ratios_follow_the_beta_distribution(alpha: float) -> None:
    images, targets = two_kinds(2000, size=1)
    _, labels = mixup(images, targets, alpha=alpha, generator=generator())
    ratio = labels.diagonal()
    deviation = 1 / math.sqrt(4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(ratio.mean() - 0.5) < 0.03
    assert abs(ratio.std() - deviation) < 0.02


def test_augment_off_changes_nothing() -> None:
    images, labels = pictures(8), torch.arange(8)
    off = Augment(flip=False, crop=0)
    same, also = off(images, labels, num_classes=8, generator=generator())
    assert torch.equal(same, images)
    assert torch.equal(also, labels)


def test_augment_gives_integer_labels_unless_it_mixes() -> None:
    images, labels = pictures(8), torch.arange(8)
    _, kept = Augment(color=0.3, erasing=0.5, randaugment=1)(images, labels, num_classes=9, generator=generator())
    assert torch.equal(kept, labels)
    for augment in (Augment(mixup=0.5), Augment(cutmix=0.5), Augment(mixup=0.5, cutmix=0.5)):
        _, mixed = augment(images, labels, num_classes=9, generator=generator())
        assert mixed.shape == (8, 9)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.sum(1), torch.ones(8))


def test_mixup_and_cutmix_together_take_turns() -> None:
    """A blend leaves no original pixel of these flat images, a pasted box leaves them flat in two levels."""
    images, _ = two_kinds(8)
    augment = Augment(flip=False, crop=0, mixup=1.0, cutmix=1.0)
    cut = 0
    for seed in range(200):
        mixed, _ = augment(images, torch.arange(8), num_classes=8, generator=generator(seed))
        cut += bool((mixed.flatten(1).std(dim=1) > 1e-6).any())
    assert 70 < cut < 130


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": -1}, r"Augment\.crop is pixels of a 32 px image, from 0 to 31; got -1: give"),
        ({"crop": 32}, r"Augment\.crop .* got 32"),
        ({"erasing": 1.5}, r"Augment\.erasing is a probability, from 0 to 1; got 1\.5"),
        ({"color": 2.0}, r"Augment\.color is a strength, from 0 to 1; got 2\.0"),
        ({"randaugment": 15}, r"Augment\.randaugment is a number of operations, from 0 to 14; got 15"),
        ({"randaugment": 1.5}, r"Augment\.randaugment .* got 1\.5"),
        ({"mixup": -0.1}, r"Augment\.mixup is the alpha of a Beta distribution, at least 0; got -0\.1"),
        ({"cutmix": float("nan")}, r"Augment\.cutmix .* got nan"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augment(**values)  # type: ignore[arg-type]
