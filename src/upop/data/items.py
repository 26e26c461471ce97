"""Encoded images in files or tables, and how they become pixels.
Must not know labels, splits or batches.

Shapes: n images, h height, w width; pixels are uint8 RGB in [0, 255].
"""

import contextlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from upop.errors import DataError, UpopError, said
from upop.reading import read_bytes

Ints: TypeAlias = npt.NDArray[np.int64]
Pixels: TypeAlias = npt.NDArray[np.uint8]
EXIF_ORIENTATION = 0x0112
# What sets an image upright that lies so; from 5 on its sides change places.
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_BYTES = 512 * 2**20  # of an encoded image
MOST_PIXELS = 2**26  # of one: ImageNet's largest has 61 million
LARGE = 2**23  # pixels; of images beyond, one is decoded at a time, so that memory is bounded by one
TASK = 32  # images a thread decodes in one go: neighbours, since a table is read in row groups
WAITING = 8  # tasks queued ahead: stopping early is quick, and few decoded images wait
LONGEST = 200  # times as long as the other a side may be: the centre is cut after resizing
_one_large = threading.Lock()


@dataclass(frozen=True)
class Square:
    """The central square of an image: its shorter side brought to `shorter` pixels, then `size` of them cut out."""

    size: int
    shorter: int


Size: TypeAlias = Square | tuple[int, int]  # resized and cut; kept, if they are (h, w)


class Items(Protocol):
    """Encoded images, readable in any order, from threads and (pickled) from other processes."""

    @property
    def root(self) -> str:
        """Where they all are: a folder, or a data set on the Hub."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """What this image is called below the root, the same on every machine."""

    def sizes(self, index: Ints) -> Ints:
        """Encoded size in bytes of the images at these positions."""

    def read(self, index: int) -> bytes:
        """The encoded image."""


class FileItems:
    """Images in files of their own."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = str(root)
        self.names = names  # relative, with forward slashes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def sizes(self, index: Ints) -> Ints:
        files = (os.path.join(self.root, self.names[place]) for place in index.tolist())
        return np.array([size_and_time(file)[0] for file in files], dtype=np.int64)

    def read(self, index: int) -> bytes:
        return read_bytes(Path(self.root, self.names[index]), most=MOST_BYTES)


class Chosen:
    """Some of other items."""

    def __init__(self, items: Items, index: Ints) -> None:
        self.items, self.index = items, index
        self.root = items.root

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self.items.name(int(self.index[index]))

    def sizes(self, index: Ints) -> Ints:
        return self.items.sizes(self.index[index])

    def read(self, index: int) -> bytes:
        return self.items.read(int(self.index[index]))


class SizesDifferError(Exception):
    """Images that seemed to be of one size are not."""


def size_and_time(file: str | Path) -> tuple[int, int]:
    """Bytes and modification time (ns) of a file, -1 for one that is not there: reading it will report that."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # the latter for a name that no file could have
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def full_name(items: Items, index: int) -> str:
    """What to call an image in a message."""
    return f"{items.root}/{items.name(index)}"


def decode(items: Items, index: int, size: Size) -> Pixels:
    """Pixels [3, h, w] of one image, upright; [3, size, size] where a square is given, resized bicubically.

    Raises DataError for what is no image or more than can be taken, and SizesDifferError where (h, w) is given and
    differs.
    """
    try:
        with Image.open(io.BytesIO(items.read(index))) as image:
            # By its header, before anything is decoded: a few bytes can say that they are a gigabyte.
            area = _area(image)
            # First without asking how it lies: for that, Pillow decodes a PNG.
            if isinstance(size, tuple) and (sorted(image.size) != sorted(size) or _shown(image) != size):
                raise SizesDifferError
            with _one_large if area > LARGE else contextlib.nullcontext():
                return _pixels(image, size if isinstance(size, Square) else None)
    except SizesDifferError:
        raise
    except UpopError as error:
        raise DataError(f"{error}, or leave such files out with --skip-bad (skip_bad=True)") from error
    except UnidentifiedImageError:
        raise DataError(
            f"{full_name(items, index)}: expected an image, got {len(items.read(index)):,} bytes that Pillow does not "
            "know as one; remove or replace it, or leave such files out with --skip-bad (skip_bad=True)"
        ) from None
    except Exception as error:  # Pillow's decoders raise about anything on broken files
        raise DataError(
            f"{full_name(items, index)}: expected an image, got {said(error, 300)}; "
            "remove or replace it, or leave such files out with --skip-bad (skip_bad=True)"
        ) from error


def _pixels(image: Image.Image, square: Square | None) -> Pixels:
    rgb = upright(image)
    if square is not None:
        rgb = _centre(rgb, square)
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


def common_size(items: Items) -> tuple[int, int] | None:
    """(h, w) if all images of a sample have it: 64 each at the start, in the middle and at the end."""
    count = len(items)
    starts = (0, max(0, count // 2 - 32), max(0, count - 64))
    sample = sorted({index for start in starts for index in range(start, min(count, start + 64))})
    sizes = {size for index in sample if (size := _header(items, index)) is not None}
    return sizes.pop() if len(sizes) == 1 else None


def decode_all(items: Items, size: Size, *, skip_bad: bool) -> tuple[Pixels, Ints]:
    """Pixels [n, 3, h, w] of all images and the positions of broken ones, whose pixels stay 0.

    Without `skip_bad` the first broken image is an error. SizesDifferError where (h, w) is given and one differs.
    """
    pixels: Pixels | None = None
    bad: list[int] = []
    for index, image in _decoded(items, size, skip_bad=skip_bad):
        if isinstance(image, DataError):
            bad.append(index)
            continue
        if pixels is None:
            pixels = np.zeros((len(items), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            raise SizesDifferError
        pixels[index] = image
    if pixels is None:
        raise DataError(f"{items.root}: none of the {len(items)} images can be decoded; check the files")
    return pixels, np.array(bad, dtype=np.int64)


def find_bad(items: Items, *, skip_bad: bool) -> Ints:
    """Positions of broken images; reads and decodes everything, keeps nothing. Without `skip_bad` as `decode_all`."""
    # To a pixel: those that wait for their turn take no memory.
    decoded = _decoded(items, Square(1, 1), skip_bad=skip_bad)
    bad = [index for index, image in decoded if isinstance(image, DataError)]
    return np.array(bad, dtype=np.int64)


def _decoded(items: Items, size: Size, *, skip_bad: bool) -> Iterator[tuple[int, Pixels | DataError]]:
    """(index, pixels or what is wrong) in order, decoded by a few threads: Pillow frees the interpreter.

    Without `skip_bad` what is wrong is raised.
    """

    def task(start: int) -> list[Pixels | DataError]:
        stop = min(start + TASK, len(items))
        return [_decode_or_error(items, index, size) for index in range(start, stop)]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for index, image in enumerate(_ordered(pool, task, len(items))):
            if isinstance(image, DataError) and not skip_bad:
                raise image
            yield index, image


def _ordered(
    pool: ThreadPoolExecutor, task: Callable[[int], list[Pixels | DataError]], count: int
) -> Iterator[Pixels | DataError]:
    waiting: deque[Future[list[Pixels | DataError]]] = deque()
    for start in range(0, count, TASK):
        waiting.append(pool.submit(task, start))
        if len(waiting) > WAITING:
            yield from waiting.popleft().result()
    for future in waiting:
        yield from future.result()


def _decode_or_error(items: Items, index: int, size: Size) -> Pixels | DataError:
    try:
        return decode(items, index, size)
    except DataError as error:
        return error


def _header(items: Items, index: int) -> tuple[int, int] | None:
    """(h, w) as displayed, or None for a broken image, which decoding will report."""
    try:
        with Image.open(io.BytesIO(items.read(index))) as image:
            _area(image)
            return _shown(image)
    except Exception:
        return None


def _area(image: Image.Image) -> int:
    """Pixels; raises ValueError for more than are taken."""
    area = image.size[0] * image.size[1]
    if area > MOST_PIXELS:
        raise ValueError(f"{area:,} pixels, more than the {MOST_PIXELS:,} that are taken")
    return area


def _shown(image: Image.Image) -> tuple[int, int]:
    """(h, w) as displayed, of an image that is not decoded yet."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size Pillow has turned already
        width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, turned as its EXIF says."""
    image.load()  # Pillow turns a TIFF by itself here
    # Not by ImageOps.exif_transpose, which writes the EXIF anew, and fails where a tag has a type of its own.
    turn = TURNS.get(_orientation(image))
    return _rgb(image) if turn is None else _rgb(image).transpose(turn)


def _orientation(image: Image.Image) -> object:
    """From 1 to 8 in a sound file."""
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scale
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels, whose range is unknown")
    if image.mode == "P" and "transparency" in image.info:  # converted in one step, Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def usual_square(size: int) -> Square:
    """As published for DeiT: what is cut out is 224/256 of the shorter side."""
    return Square(size, round(size * 256 / 224))


def _centre(image: Image.Image, square: Square) -> Image.Image:
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.size[0]:,} x {image.size[1]:,} pixels, one side more than {LONGEST} times the other")
    size, shorter = square.size, square.shorter
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
