"""Decoded images kept between runs, in the user's cache folder.
Must never be the cause of an error: whatever is wrong with a file here, the images are decoded again.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def folder() -> Path:
    """Where upop keeps decoded images; $XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upop"


def read(key: str | None, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> npt.NDArray[Any] | None:
    """The array stored under this key, mapped and not to be written to, if it is whole and of this form.

    None in the shape stands for any length; a key of None is never stored.
    """
    try:
        array = _whole(folder() / f"{key}.npy")
    except Exception:  # numpy's reader raises about anything on a broken file
        return None
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    return array if fits and array.dtype == dtype else None


def write(key: str | None, array: npt.NDArray[Any]) -> None:
    """Store under this key, if there is one, the folder can be written to and the disk has room."""
    if key is None:
        return
    with contextlib.suppress(OSError, RuntimeError):  # Path.home() raises RuntimeError where there is none
        folder().mkdir(parents=True, exist_ok=True)
        _replace(folder() / f"{key}.npy", array)


def _whole(path: Path) -> npt.NDArray[Any]:
    mapped: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.offset + mapped.nbytes != path.stat().st_size:
        raise ValueError("the file is longer or shorter than its header says")
    return mapped


def _replace(path: Path, array: npt.NDArray[Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
