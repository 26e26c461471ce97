"""Checkpoints: all that a stage needs to go on as if nothing had happened, as safetensors and JSON.

Nothing is pickled, nothing is run on loading. A checkpoint is there whole or not at all, and says if it was damaged.
"""

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upop.disk import disk_errors, sweep, sync, take_away
from upop.errors import UpopError, said
from upop.folder import digest
from upop.reading import read_json

log = logging.getLogger(__name__)

FORMAT = 1
KEEP = 2  # the last good ones: the newer may have been cut off by what ended the run
FILES = ("state.json", "tensors.safetensors")
SEAL = "seal.json"  # written last: the digests of the others


class Keeper:
    """Writes checkpoints below `folder`: every `minutes` (0: never), and at once when the process is asked to end."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self._seconds = folder, 60 * minutes
        self.signal: str | None = None
        self._latest = time.monotonic()

    @property
    def due(self) -> bool:
        if self.signal is not None:
            return True
        return self._seconds > 0 and time.monotonic() - self._latest >= self._seconds

    @property
    def asked(self) -> int:
        """The number of the signal that has asked for an end, or 0."""
        return 0 if self.signal is None else signal.Signals[self.signal].value

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and forget all but the last two."""
        with disk_errors(self.folder):
            path = write(self.folder, state)
            for old in _numbered(self.folder)[:-KEEP]:
                take_away(old)
        self._latest = time.monotonic()
        return path

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile SIGTERM and SIGINT only ask for a checkpoint; a second SIGINT ends the process as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number).name
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            for number in before:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def write(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write `state` (nested dicts and lists of tensors, arrays, numbers, texts) as the next checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _numbered(folder)
    path = folder / f"{int(known[-1].name) + 1 if known else 0:08}"
    sweep(folder)
    temporary = folder / f".{path.name}.partial"
    try:
        temporary.mkdir()
        tensors: dict[str, Tensor] = {}
        text = json.dumps({"format": FORMAT, "state": _encode(state, "", tensors)})
        save_file(tensors, temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(text, encoding="utf-8")
        seal = {name: digest(temporary / name) for name in FILES}
        (temporary / SEAL).write_text(json.dumps(seal), encoding="utf-8")
        for name in (*FILES, SEAL):
            sync(temporary / name)
        temporary.rename(path)
    except BaseException:
        # On a full disk, half a checkpoint is in the way of the next.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)
    return path


def read(path: Path) -> dict[str, Any]:
    """What `write` was given. Raises UpopError, one line, for anything that is not a whole checkpoint."""
    try:
        seal = read_json(path / SEAL)
        found = {name: digest(path / name) for name in FILES}
        if seal != found:
            raise UpopError(f"{path}: damaged, its files are not those that were written")
        saved = read_json(path / "state.json", finite=False)
        if saved["format"] != FORMAT:
            raise UpopError(f"{path}: expected checkpoint format {FORMAT}, got {saved['format']}")
        state = _decode(saved["state"], load_file(path / "tensors.safetensors"))
        if not isinstance(state, dict):
            raise UpopError(f"{path}: expected the state of a run, got {type(state).__name__}")
        return state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        if isinstance(error, UpopError):
            raise
        raise UpopError(f"{path}: not a whole checkpoint ({said(error)})") from error


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint in `folder` that is whole; None where there is none. Says in the log what it passed by."""
    state, damaged = newest(folder)
    for what in damaged:
        log.warning("%s; %s", what, "going back to the one before" if state is not None else "it is of no use")
    return state


def newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, `kept_as` a number, and what is wrong with those after it."""
    damaged: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            return {**read(path), "kept_as": int(path.name)}, damaged
        except UpopError as error:
            damaged.append(str(error))
    return None, damaged


def forget_after(folder: Path, number: int) -> None:
    """Remove the checkpoints after `number`, which were passed by: of those that are kept none must be damaged."""
    with disk_errors(folder):
        for path in _numbered(folder):
            if int(path.name) > number:
                take_away(path)


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit())


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON, with tensors put aside under their place's name; keys that are no texts survive as pairs."""
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach()
        tensors[name] = tensor.cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return {"$dict": [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    assert value is None or isinstance(value, bool | int | float | str), f"{name}: {type(value)} has no place in JSON"
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        return {key: _decode(item, tensors) for key, item in value["$dict"]}
    return value
