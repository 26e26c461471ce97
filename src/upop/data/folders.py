"""Images in folders: a folder per class, and CIFAR-10's original batches.
Must not decode images, nor run anything a pickle asks for beyond numpy arrays and plain containers.
"""

import codecs
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from upop.data.items import FileItems, Pixels
from upop.data.listing import Listing, by_split, key_of, split_of
from upop.errors import DataError, one_line
from upop.folder import MARK

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
        ".tga",
    ]
)
# What Windows and network drives leave there; hidden files are ignored as well.
IGNORED = frozenset({"thumbs.db", "desktop.ini", "@eadir", "@__thumb", "#recycle", "@recycle"})
# What upop leaves in folders of its own.
OURS = (MARK, "study.json", "bench.json")
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_FILES = (*CIFAR_TRAIN, "test_batch", "batches.meta")


def image_folder(folder: Path, *, skip_bad: bool) -> Listing:
    """`train/`, `val/` and `test/` with a folder per class each, or the class folders alone."""
    splits = _split_folders(folder)
    classes = _classes(splits["train"])
    names: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    parts: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for split, place in splits.items():
        _check_same_classes(classes, _classes(place), splits["train"], place)
        first = len(names)
        for label, name in enumerate(classes):
            good, bad = _images(place / name, skip_bad=skip_bad)
            names += [file.relative_to(folder).as_posix() for file in good]
            labels += [label] * len(good)
            skipped += map(str, bad)
        parts[split] = np.arange(first, len(names))
    items = FileItems(folder, names)
    key = key_of(folder, names)
    return Listing(folder.resolve().name, classes, items, np.array(labels), parts, key, tuple(skipped))


def is_cifar_batches(folder: Path) -> bool:
    """Whether this is the `cifar-10-batches-py` of torchvision and of the original site."""
    return any((folder / name).is_file() for name in CIFAR_TRAIN)


def cifar_batches(folder: Path) -> Listing:
    """CIFAR-10 as first published: pickles of pixels."""
    if missing := [name for name in CIFAR_FILES if not (folder / name).is_file()]:
        raise DataError(f"{folder}: expected {', '.join(CIFAR_FILES)}, got no {missing[0]}; unpack it again")
    content = [_cifar_batch(folder / name) for name in (*CIFAR_TRAIN, "test_batch")]
    classes = _cifar_classes(folder / "batches.meta")
    labels = np.concatenate([labels for _, labels in content])
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{folder}: expected labels from 0 to {len(classes) - 1}, got {labels.max()}; unpack it again")
    train = sum(len(labels) for _, labels in content[:-1])
    parts = {"train": np.arange(train), "test": np.arange(train, len(labels))}
    return Listing(folder.resolve().name, classes, np.concatenate([pixels for pixels, _ in content]), labels, parts)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is of a run, a study or a benchmark, or holds nothing but such: who works where the images are
    has them beside the classes."""
    if any((folder / name).exists() for name in OURS):
        return True
    found = False
    for file in folder.iterdir():  # most have images: the first one settles it
        if not file.name.startswith("."):
            if not (file.is_dir() and _is_ours(file)):
                return False
            found = True
    return found


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, by name; without hidden files and those that systems leave behind."""
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return [file for file in found if not file.name.startswith(".") and file.name.lower() not in IGNORED]


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split, train first; a folder of class folders is all train.

    A class may have a split's name: beside class folders of other names its folder, too, holds images itself.
    """
    inside = [file for file in _visible(folder) if file.is_dir() and not _is_ours(file)]
    found = [file for file in inside if split_of(file.name)]
    others = [file for file in inside if file not in found and _holds_images(file)]
    if not found or (others and all(map(_is_class, found))):
        return {"train": folder}
    splits = {split: folder / name for split, name in by_split((file.name for file in found), str(folder)).items()}
    if "train" not in splits:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{folder}: expected a folder train beside {names}, got none; add or rename it")
    if others:
        raise DataError(
            f"{folder}: expected splits alone beside {splits['train'].name}, got {others[0].name} with images in it; "
            "call it train, val or test, or take it out"
        )
    return {"train": splits.pop("train")} | splits


def _is_class(folder: Path) -> bool:
    """Whether a folder holds images itself."""
    return any(file.is_file() and file.suffix.lower() in SUFFIXES for file in _visible(folder))


def _holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder, or in a folder in it."""
    return _is_class(folder) or any(_is_class(file) for file in _visible(folder) if file.is_dir())


def _classes(folder: Path) -> tuple[str, ...]:
    """Names of the class folders."""
    visible = _visible(folder)
    loose = [file for file in visible if file.is_file() and file.suffix.lower() in SUFFIXES]
    classes = tuple(file.name for file in visible if file.is_dir() and not _is_ours(file))
    if loose:
        raise DataError(f"{loose[0]}: expected images inside class folders, got one beside them; move it into one")
    for name in classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that no config.json could hold
            raise DataError(f"{folder}: expected class folders with names in UTF-8, got {name!r}; rename it")
    if not classes:
        raise DataError(
            f"{folder}: no images: expected parquet files, cifar-10-batches-py or a folder per class, "
            f"got {', '.join(file.name for file in visible[:3]) or 'an empty folder'}; check the path"
        )
    return classes


def _check_same_classes(train: tuple[str, ...], other: tuple[str, ...], at: Path, beside: Path) -> None:
    if odd := sorted(set(train) ^ set(other)):
        here, there = (at, beside) if odd[0] in train else (beside, at)
        raise DataError(
            f"{beside}: expected the same classes as in {at}, got {odd[0]!r} in {here.name} but not in "
            f"{there.name}; give both the same class folders"
        )


def _images(folder: Path, *, skip_bad: bool) -> tuple[list[Path], list[Path]]:
    """Image files below a class folder and other files, which are errors unless they may be skipped."""
    good, bad = [], []
    seen: set[str] = set()
    for place, folders, _ in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to where it lies in itself, or a second one
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name.lower() not in IGNORED)
        files = [file for file in _visible(Path(place)) if not file.is_dir()]
        good += [file for file in files if file.suffix.lower() in SUFFIXES]
        bad += [file for file in files if file.suffix.lower() not in SUFFIXES]
    if bad and not skip_bad:
        raise DataError(
            f"{bad[0]}: expected an image, got a file ending in {bad[0].suffix or 'nothing'!r}; "
            "remove it, or leave such files out with --skip-bad (skip_bad=True)"
        )
    if not good:
        raise DataError(
            f"{folder}: expected images of class {folder.name!r}, got none; add images or remove the folder"
        )
    return good, bad


def _raise(error: OSError) -> None:
    raise error


def _cifar_batch(file: Path) -> tuple[Pixels, np.ndarray[Any, np.dtype[np.int64]]]:
    """Pixels [n, 3, 32, 32] and labels [n] of one file."""
    content = _plain(file)
    pixels, labels = content.get("data"), content.get("labels")
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,)):
        raise DataError(f"{file}: expected pixels uint8 [n, 3072], got something else; unpack it again")
    if not (isinstance(labels, list) and len(labels) == len(pixels) and {type(label) for label in labels} <= {int}):
        raise DataError(f"{file}: expected {len(pixels)} integer labels, got something else; unpack it again")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _cifar_classes(file: Path) -> tuple[str, ...]:
    names = _plain(file).get("label_names")
    if not (isinstance(names, list) and names):
        raise DataError(f"{file}: expected the classes' names as label_names, got none; unpack it again")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _plain(file: Path) -> dict[str, Any]:
    """The dictionary in a pickle of either Python, with text keys; nothing but data is ever built from it."""
    try:
        with file.open("rb") as stream:
            content = _DataUnpickler(stream, encoding="bytes").load()
    except Exception as error:  # a broken pickle raises about anything
        raise DataError(f"{file}: expected a CIFAR-10 batch, got {one_line(error)}; unpack it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a dictionary, got {type(content).__name__}; unpack it again")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2, held to the one encoding it uses."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return codecs.latin_1_encode(text)[0]


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle may name; numpy is asked for its helpers, since their modules have moved over the years."""
    array = np.empty(0)
    rebuild: Any = array.__reduce__()[0]
    from_buffer: Any = array.__reduce_ex__(5)[0]
    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = rebuild
        table[f"{core}.numeric", "_frombuffer"] = from_buffer
    for kind in (list, dict, tuple, set, frozenset, bytearray, bytes):
        table["builtins", kind.__name__] = table["__builtin__", kind.__name__] = kind
    return table


class _DataUnpickler(pickle.Unpickler):
    allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which could run code")
        return self.allowed[module, name]
