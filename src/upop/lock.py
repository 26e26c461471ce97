"""One run in a folder at a time: a lock that ends with the process that holds it, however it ends.

Knows processes and one file. Where the file system has no locks a run goes on without, and says so.
"""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from upop.errors import UpopError

log = logging.getLogger(__name__)

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def refuse_if_held(folder: Path) -> None:
    """Raise UpopError where a run works in `folder`. Leaves nothing behind."""
    lock = folder / LOCK
    if lock.exists():
        # One that cannot be opened or locked says nothing; whoever goes on to write will hear of it.
        with contextlib.suppress(OSError):
            _acquire(lock).release()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Meanwhile `folder`, which must exist, is this process's alone. Raises UpopError where another has it.

    Raises OSError where the folder cannot be written.
    """
    try:
        lock = _acquire(folder / LOCK)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start no second run into the folder", folder)
        yield
        return
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        (folder / LOCK).write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        # While it is held: whoever has it open sees that it is gone, and makes a new one.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


def _acquire(path: Path) -> FileLock:
    # No second kind of lock where there is none of the first: it would outlive a run that is killed. Processes that
    # this one forks, such as workers that load data, do not hold on to it: filelock lets go of it there.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UpopError(
            f"out {path.parent}: another run works in it{_holder(path)}; wait for it, end it, or choose another folder"
        ) from None
    return lock


def _holder(path: Path) -> str:
    """Who wrote the lock file, in words; empty where it does not say."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f" (process {found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
