"""Encoded images in files or tables, and how they become pixels.
Must not know labels, splits or batches.

Shapes: n images, h height, w width; pixels are uint8 RGB in [0, 255].
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from upop.errors import DataError

Pixels: TypeAlias = npt.NDArray[np.uint8]
EXIF_ORIENTATION = 0x0112
TASK = 32  # images a thread decodes in one go: neighbours, since a table is read in row groups


class Items(Protocol):
    """Encoded images, readable in any order and from several threads or processes."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """What to call this image in a message."""

    def size(self, index: int) -> int:
        """Encoded size in bytes."""

    def read(self, index: int) -> bytes:
        """The encoded image."""


class SizesDifferError(Exception):
    """Images that seemed to be of one size are not."""


def decode(items: Items, index: int, size: int | None) -> Pixels:
    """Pixels [3, h, w] of one image, upright; [3, size, size] where a size is given.

    To a size means: the shorter side to 256/224 of it, bicubic, then the centre, as published for DeiT.
    """
    try:
        with Image.open(io.BytesIO(items.read(index))) as image:
            rgb = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise about anything on broken files
        raise DataError(
            f"{items.name(index)}: expected an image, got {type(error).__name__}: {_line(error)}; "
            "remove or replace it, or skip such files with skip_bad"
        ) from error
    if size is not None:
        rgb = _centre(rgb, size)
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is unknown")
    if "transparency" in image.info:  # otherwise Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _centre(image: Image.Image, size: int) -> Image.Image:
    shorter = round(size * 256 / 224)
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def common_size(items: Items) -> tuple[int, int] | None:
    """(h, w) if all images of a sample have it: 64 each at the start, in the middle and at the end."""
    count = len(items)
    starts = (0, max(0, count // 2 - 32), max(0, count - 64))
    sample = sorted({index for start in starts for index in range(start, min(count, start + 64))})
    sizes = {size for index in sample if (size := _header(items, index)) is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _header(items: Items, index: int) -> tuple[int, int] | None:
    """(h, w) as displayed, or None for a broken image, which decoding will report."""
    try:
        with Image.open(io.BytesIO(items.read(index))) as image:
            width, height = image.size
            lies = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except Exception:
        return None
    return (width, height) if lies else (height, width)


def decode_all(items: Items, size: int | None, *, skip_bad: bool) -> tuple[Pixels, list[int]]:
    """Pixels [n, 3, h, w] of all images and the positions of broken ones, whose pixels stay 0.

    Without `skip_bad` the first broken image is an error. SizesDifferError if `size` is None and they do.
    """
    pixels: Pixels | None = None
    bad: list[int] = []

    def work(start: int) -> list[Pixels | DataError]:
        stop = min(start + TASK, len(items))
        return [_decode_or_error(items, index, size) for index in range(start, stop)]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for index, image in _flat(pool, work, len(items)):
            if isinstance(image, DataError):
                if not skip_bad:
                    raise image
                bad.append(index)
                continue
            if pixels is None:
                pixels = np.zeros((len(items), *image.shape), dtype=np.uint8)
            if image.shape != pixels.shape[1:]:
                raise SizesDifferError
            pixels[index] = image
    if pixels is None:
        raise DataError("none of the images could be decoded; check the files")
    return pixels, bad
