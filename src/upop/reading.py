"""Reading small files that others may have written: bounded in size, and what is wrong with them in one line.

Must not know what the files mean.
"""

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from upop.errors import UpopError, said

MOST_BYTES = 64 * 2**20  # of a JSON or TOML file; what upop writes is far below
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """A file's content, `most` bytes at most.

    Raises UpopError for what is larger or no ordinary file, such as a pipe, whose reading would never end, and OSError
    for what cannot be read.
    """
    check_file(path, most=most)
    with path.open("rb") as file:
        return file.read(most + 1)[:most]


def check_file(path: Path, *, most: int | None = None) -> None:
    """Raise UpopError for what is no ordinary file or larger than `most` bytes, and OSError where there is none."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UpopError(f"{path}: expected a file, got {_kind(found.st_mode)}; remove or replace it")
    if most is not None and found.st_size > most:
        raise UpopError(f"{path}: expected at most {size(most)}, got {size(found.st_size)}; remove or replace it")


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """A text file in UTF-8. Raises UpopError for what is none, with a hint, and OSError for what cannot be read."""
    content = read_bytes(path, most=most)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")  # the mark that editors on Windows begin with
    except UnicodeDecodeError as error:
        raise UpopError(
            f"{path}: expected text in UTF-8, got byte 0x{content[error.start]:02x} at {error.start}; save it as UTF-8"
        ) from None


def read_json(path: Path, *, finite: bool = True, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. With `finite` all its numbers are.

    Raises UpopError, one line that says what is wrong, for everything else, and OSError for what cannot be read.
    """
    try:
        found = parse_json(read_text(path, most=most), finite=finite)
    except UpopError as error:
        raise error if str(error).startswith(str(path)) else UpopError(f"{path}: {error}") from None
    return found


def parse_json(text: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a text. Raises UpopError, without saying where the text came from."""
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        found = json.loads(text, **hooks)
    except RecursionError:
        raise UpopError("expected readable JSON, got some that is nested too deeply") from None
    except ValueError as error:
        # Of a number with thousands of digits Python says how to raise its limit: that is not what to do here.
        what = str(error).partition(";")[0].splitlines()[0] if str(error) else "none"
        raise UpopError(f"expected readable JSON, got {what}") from None
    if not isinstance(found, dict):
        raise UpopError(f"expected a JSON object, got {type(found).__name__}")
    # An escape such as \ud800 makes a text that no file and no terminal takes.
    if "\\ud" in text.lower() and _LONE_SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise UpopError("expected readable JSON, got text that is no Unicode (half of a surrogate pair)")
    return found


@contextmanager
def taking_over(what: str) -> Iterator[None]:
    """Whatever a state that no run of ours has written does to who takes it over, as one clear line."""
    try:
        yield
    except UpopError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UpopError(
            f"{what}: the checkpoint does not fit this run ({said(error)}); start the run again with --overwrite"
        ) from error


def size(count: int) -> str:
    """A number of bytes as one reads it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}".replace(".0 ", " ")
    return f"{count} bytes"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"the number {word}")


def _finite(word: str) -> float:
    value = float(word)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {word[:20]}")
    return value
