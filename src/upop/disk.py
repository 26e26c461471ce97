"""Files and folders written whole or not at all, whatever the moment at which the machine stops.

Must not know what is in them.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from upop.errors import UpopError, one_line, said

log = logging.getLogger(__name__)

OLDER = ".older.partial"  # what a folder is called while another takes its name
# What file systems say that open no folder as a file, or cannot bring one onto the disk; a full one says otherwise.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Onto the disk, so that a rename never comes before what it names; of folders, where the file system can."""
    unable = NO_SYNC if path.is_dir() else ()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in unable:
            raise


def sweep(folder: Path) -> None:
    """Take away what writes, and removals, that were cut off left in `folder`, and put back what they put aside."""
    for path in folder.glob(f".*{OLDER}"):
        put_back(path)
    for path in folder.glob(".*.partial"):
        delete(path)


def put_back(older: Path) -> None:
    """Give the folder that was put aside its name again where there is none of that name; else it is not needed."""
    place = older.with_name(older.name.removeprefix(".").removesuffix(OLDER))
    if older.exists() and not place.exists():
        older.rename(place)
    shutil.rmtree(older, ignore_errors=True)


def take_away(path: Path) -> None:
    """Remove a folder; it is out of sight first, so that a kill meanwhile leaves no half of it under its name."""
    gone = path.with_name(f".{path.name}.partial")
    delete(gone)
    path.rename(gone)
    delete(gone)


def delete(path: Path, *, quietly: bool = True) -> None:
    """Remove a file, a folder with all that is in it, or a link, not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=quietly)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Full and read-only disks as one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for what the system says
        what = getattr(error, "strerror", None) or one_line(error)
        raise UpopError(f"{path}: cannot be written ({what}); free space or choose another out") from error


@contextlib.contextmanager
def spare(path: Path, warnings: list[str]) -> Iterator[None]:
    """What a run can do without: where it cannot be made, a warning says so, and nothing that was computed is lost."""
    try:
        yield
    except Exception as error:  # a picture may fail in any way
        what = getattr(error, "strerror", None) or said(error, 150)
        warnings.append(f"{path.name}: could not be written ({what}); all else is there")
        log.warning("%s", warnings[-1])
        with contextlib.suppress(OSError):  # half of it may be there
            path.unlink(missing_ok=True)
