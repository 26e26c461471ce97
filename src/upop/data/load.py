"""From the name of a data set to its three splits: list, cut, then decode or stream.
Must not read file formats itself.

Shapes: n images, h height, w width.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from upop.data import cache
from upop.data.items import (
    Chosen,
    Ints,
    Items,
    Pixels,
    Size,
    SizesDifferError,
    Square,
    common_size,
    decode_all,
    find_bad,
    full_name,
    usual_square,
)
from upop.data.listing import Listing
from upop.data.rows import ParquetItems, for_random_access, free_row_groups
from upop.data.sources import find
from upop.data.splits import ImageData, MemorySplit, Split, StreamSplit, check_classes, cut
from upop.errors import DataError

PARTS = ("train", "validation", "test")
# Each cut draws from a stream of its own, so that none moves when another one is asked for.
STREAMS = {"test": 0, "validation": 1, "subset of train": 3, "subset of validation": 4, "subset of test": 5}


# Images of one size are kept as they are up to so many times the side that the model needs: whole batches of them are
# augmented in float32, and resized at last.
MOST_KEPT = 3


@dataclass(frozen=True)
class _Limits:
    memory: int  # bytes of decoded images
    square: Square  # of resized images
    skip_bad: bool
    common: tuple[int, int] | None = None  # (h, w) that images are kept at


def load_data(
    spec: str,
    *,
    validation: int | float | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    memory_limit: int = 4 * 2**30,
    image_size: int = 224,
    shorter_side: int | None = None,
    subset: int | None = None,
) -> ImageData:
    """Load a data set: "cifar10", "digits", `owner/name` on the Hub, or a local folder.

    validation: how many images of train (or which part of it, as a float) become the validation split; by
        default a tenth, or nothing where the data set has one of its own. A missing test split is a tenth
        too. Cuts are stratified and depend on the seed and the labels alone.
    skip_bad: leave out files that are no images, instead of an error; `skipped` names them.
    memory_limit: bytes that decoded images may take; beyond, they are decoded as they are used.
    image_size: pixels of a side of the central square that is cut out of images of differing sizes, and of streamed
        ones, once their shorter side has been brought to `shorter_side` pixels (default: 256/224 of that, as
        published for DeiT). Where the first, the middle and the last 64 images of the set have one size, no more than
        three times that, nothing is cut off the central square, and images are kept as they are, if memory allows.
    subset: keep this many images of each split (all, where there are fewer).
    """
    listing = find(spec, skip_bad=skip_bad)
    check_classes(listing.labels, listing.parts, listing.classes, listing.name)
    parts = _with_subset(_with_all_parts(listing, validation, seed), listing, subset, seed)
    square = usual_square(image_size) if shorter_side is None else Square(image_size, shorter_side)
    splits, bad, shorter = _splits(listing, parts, _Limits(memory_limit, square, skip_bad))
    fingerprint = _fingerprint(splits)
    free_row_groups()
    return ImageData(
        name=listing.name,
        classes=listing.classes,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        fingerprint=fingerprint,
        skipped=(*listing.skipped, *bad),
        shorter_side=shorter,
    )


def _with_all_parts(listing: Listing, validation: int | float | None, seed: int) -> dict[str, Ints]:
    """Train, validation and test; the missing ones cut from train."""
    parts = dict(listing.parts)
    total = len(parts["train"])
    _check_enough(listing)
    default = max(round(listing.share * total), len(listing.classes))
    if validation is not None and "validation" in parts:
        raise DataError(
            f"{listing.name}: validation={validation} given, but the data set has a validation split of "
            f"{len(parts['validation'])} images; leave validation out"
        )
    counts = {"test": default, "validation": default if validation is None else _count(validation, total)}
    for part, count in counts.items():
        if part not in parts:
            pool = parts["train"]
            rest, taken = _cut(listing, pool, count, seed, part)
            parts["train"], parts[part] = pool[rest], pool[taken]
    return parts


def _check_enough(listing: Listing) -> None:
    """Raise DataError where a class has too few images to be in train and in all that is cut from it."""
    cut_off = [part for part in PARTS[1:] if part not in listing.parts]
    least = 1 + len(cut_off)
    sizes = np.bincount(listing.labels[listing.parts["train"]], minlength=len(listing.classes))
    for label in np.flatnonzero((sizes > 0) & (sizes < least)).tolist()[:1]:
        raise DataError(
            f"{listing.name}: expected {least} images or more of every class in train, to cut {' and '.join(cut_off)} "
            f"from, got {sizes[label]} of {listing.classes[label]!r}; add images"
        )


def _count(validation: int | float, total: int) -> int:
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise DataError(f"validation: expected a float between 0 and 1, got {validation}; give a part of train")
        return round(validation * total)
    return validation


def _cut(listing: Listing, pool: Ints, count: int, seed: int, what: str, rest: int = 1) -> tuple[Ints, Ints]:
    where, stream = f"{listing.name}: {what}", STREAMS[what]
    labels = listing.labels[pool]
    return cut(labels, count, seed=seed, stream=stream, what=where, classes=listing.classes, rest=rest)


def _with_subset(parts: dict[str, Ints], listing: Listing, subset: int | None, seed: int) -> dict[str, Ints]:
    if subset is None:
        return parts
    kept = dict(parts)
    for part, pool in parts.items():
        if subset < len(pool):
            kept[part] = pool[_cut(listing, pool, subset, seed, f"subset of {part}", rest=0)[1]]
    return kept


def _splits(listing: Listing, parts: dict[str, Ints], limits: _Limits) -> tuple[dict[str, Split], list[str], int]:
    """The splits, the names of broken images, which are in none of them, and what shorter sides are brought to."""
    items, labels = listing.images, listing.labels
    if isinstance(items, np.ndarray):
        return _in_memory(items, labels, parts), [], limits.square.size
    # By all that there are, so that a model sees as much of a picture whatever the subset and the memory.
    common = common_size(items)
    if common is not None and common[0] * common[1] <= MOST_KEPT**2 * limits.square.shorter**2:
        limits = replace(limits, square=Square(limits.square.size, limits.square.size), common=common)
    needed = np.unique(np.concatenate(list(parts.values())))
    decoded = _decoded(items, needed, listing.key, limits)
    bad = needed[decoded[1]] if decoded else _broken(items, parts, listing.key, skip_bad=limits.skip_bad)
    if len(bad):
        parts = {part: np.setdiff1d(index, bad) for part, index in parts.items()}
        check_classes(labels, parts, listing.classes, f"{listing.name} without its broken files")
    names = [full_name(items, index) for index in bad.tolist()]
    if decoded is None:
        return _streamed(items, labels, parts, listing.key, limits), names, limits.square.shorter
    places = {part: np.searchsorted(needed, index) for part, index in parts.items()}
    return _in_memory(decoded[0], labels[needed], places), names, limits.square.shorter


def _in_memory(pixels: Pixels, labels: Ints, parts: dict[str, Ints]) -> dict[str, Split]:
    return {
        part: MemorySplit(torch.from_numpy(pixels[index]), torch.from_numpy(labels[index]))
        for part, index in parts.items()
    }


def _streamed(
    items: Items, labels: Ints, parts: dict[str, Ints], key: str | None, limits: _Limits
) -> dict[str, Split]:
    if isinstance(items, ParquetItems) and key is not None:
        items = for_random_access(items, key)
    return {
        part: StreamSplit(Chosen(items, index), torch.from_numpy(labels[index]), limits.square)
        for part, index in parts.items()
    }


def _decoded(items: Items, needed: Ints, key: str | None, limits: _Limits) -> tuple[Pixels, Ints] | None:
    """Pixels of the needed images and which of these are broken; None where they would not fit in memory."""
    # Once sizes are known to differ, there is no use in decoding up to the first odd one every time.
    mark = f"{key}-differ" if key and len(needed) == len(items) else None
    differ = cache.read(mark, np.int64, (0,)) is not None
    for size in _sizes(len(needed), limits, differ=differ):
        try:
            return _at_size(items, needed, size, key, limits.skip_bad)
        except SizesDifferError:
            cache.write(mark, np.empty(0, dtype=np.int64))
    return None


def _sizes(count: int, limits: _Limits, *, differ: bool) -> list[Size]:
    """Sizes to decode to that fit in memory, the best first: as they are, unless they differ."""
    wanted: list[tuple[Size, int]] = [(limits.square, limits.square.size**2)]
    if limits.common and not differ:
        wanted.insert(0, (limits.common, limits.common[0] * limits.common[1]))
    return [size for size, area in wanted if 3 * area * count <= limits.memory]


def _at_size(items: Items, needed: Ints, size: Size, key: str | None, skip_bad: bool) -> tuple[Pixels, Ints]:
    """As `_decoded`; out of the cache, which holds whole data sets only, where it can be."""
    how, shape = (f"{size.size}-of-{size.shorter}", (size.size,) * 2) if isinstance(size, Square) else ("kept", size)
    name = f"{key}-{how}" if key else None
    pixels = cache.read(name, np.uint8, (len(items), 3, *shape))
    bad = cache.read(f"{name}-bad", np.int64, (None,)) if name else None
    if pixels is not None and bad is not None and (skip_bad or not len(bad)):
        bad = np.intersect1d(needed, bad)
        # What could not be read once may have been mended: then all are decoded again.
        if len(find_bad(Chosen(items, bad), skip_bad=True)) == len(bad):
            whole = len(needed) == len(items)
            return pixels if whole else pixels[needed], np.searchsorted(needed, bad)
    pixels, bad = decode_all(Chosen(items, needed), size, skip_bad=skip_bad)
    if name and len(needed) == len(items):
        cache.write(f"{name}-bad", bad)
        cache.write(name, pixels)
    return pixels, bad


def _broken(items: Items, parts: dict[str, Ints], key: str | None, *, skip_bad: bool) -> Ints:
    """Positions of the broken images of a stream, where these may be skipped: each image is decoded once to find out.

    Else DataError for the first that is held out: training meets its own in its first epoch, the test its own last.
    """
    wanted = np.unique(np.concatenate([index for part, index in parts.items() if skip_bad or part != "train"]))
    name = f"{key}-good" if key else None
    good = cache.read(name, np.bool_, (len(items),))
    good = np.zeros(len(items), dtype=np.bool_) if good is None else good.copy()
    # The broken ones are looked at every time: they may have been mended.
    unknown = wanted[~good[wanted]]
    bad: Ints = unknown[find_bad(Chosen(items, unknown), skip_bad=skip_bad)]
    if len(unknown) > len(bad):
        good[np.setdiff1d(unknown, bad)] = True
        cache.write(name, good)
    return bad


def _fingerprint(splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for split in (splits[part] for part in PARTS):
        if isinstance(split, MemorySplit):
            digest.update(split.images.numpy().data)
        else:
            names = [split.items.name(index) for index in range(len(split))]
            digest.update("\n".join(names).encode(errors="surrogateescape"))
            digest.update(split.items.sizes(np.arange(len(split))).data)
        digest.update(split.labels.numpy().data)
    return digest.hexdigest()
