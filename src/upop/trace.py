"""The record of a search: the masks of all units at a number of its steps, as one small file, `trace.npz`.

Knows numpy and files; must not import torch, draw, or know how masks are decided.

Shape suffixes: F frames, S structures, U units of all structures, one structure after the other.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upop.errors import UpopError

if TYPE_CHECKING:
    from torch import Tensor

    from upop.structures import Structure

MOST_BYTES = 256 * 2**20  # unpacked: ten times the largest models in 120 frames
# What a file can do wrong while numpy reads it, from a missing end to an array that only pickle could load.
_BROKEN = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile),
    # Of an array's header: no Python, or a shape that no memory holds.
    *(SyntaxError, tokenize.TokenError, MemoryError, OverflowError, TypeError),
)


@dataclass(frozen=True, eq=False)
class Trace:
    """Masks of all units at F steps of a search, F >= 1.

    step [F], increasing, is the steps done; 0 is the state before the search. ratio [F] in [0, 1] is the fraction
    removed. masks [F, U]: 255 is exactly mask 1 (untouched), 0 exactly mask 0 (removed), others are within 1/255.
    kinds, layers and units [S] describe the structures; units sum to U.
    """

    step: NDArray[np.int32]
    ratio: NDArray[np.float32]
    masks: NDArray[np.uint8]
    kinds: NDArray[np.str_]
    layers: NDArray[np.int32]
    units: NDArray[np.int32]

    @property
    def kind_names(self) -> list[str]:
        """Each kind once, in the order of the structures."""
        return list(dict.fromkeys(str(kind) for kind in self.kinds))

    @property
    def spans(self) -> list[slice]:
        """Where the units of each structure are in U."""
        ends = np.cumsum(self.units)
        return [slice(int(end - n), int(end)) for end, n in zip(ends, self.units, strict=True)]

    def summary(self, frames: int = 25) -> dict[str, Any]:
        """At most `frames` evenly chosen frames, first and last among them, as plain numbers for JSON.

        `mean_mask` holds, per kind, a row of means in [0, 1] for each frame, one number a layer, exact where all masks
        are 0 or 1 and else within 1/255.
        """
        chosen = _evenly(len(self.step) - 1, frames)
        means_FS = np.stack([self.masks[chosen, span].mean(axis=1) / 255 for span in self.spans], axis=1)
        return {
            "step": [int(n) for n in self.step[chosen]],
            "ratio": [round(float(ratio), 4) for ratio in self.ratio[chosen]],
            "mean_mask": {
                kind: [[round(float(mean), 4) for mean in row] for row in means_FS[:, self.kinds == kind]]
                for kind in self.kind_names
            },
        }

    def save(self, path: Path) -> None:
        """Write `path` whole or not at all. Raises UpopError where it cannot be written."""
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    step=self.step,
                    ratio=self.ratio,
                    masks=self.masks,
                    kinds=self.kinds,
                    layers=self.layers,
                    units=self.units,
                )
            temporary.replace(path)
        except OSError as error:
            raise UpopError(f"{path}: cannot be written ({error.strerror or error})") from error
        finally:
            # Where the folder itself is missing there is nothing to take away, and this must not hide why.
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)


class TraceRecorder:
    """Keeps at most `frames` of the masks that `record` is shown, evenly spaced over a search of `steps` steps.

    The first call and the last step are always kept. Call it after every step, or after every update: a call that is
    not due costs a comparison, a frame four bytes per unit on the masks' device until it is asked for.
    """

    def __init__(self, structures: "Sequence[Structure]", steps: int, frames: int = 120) -> None:
        if steps < 1 or frames < 2:
            raise UpopError(f"TraceRecorder: expected steps >= 1 and frames >= 2, got {steps=}, {frames=}")
        self.structures, self.steps = tuple(structures), steps
        self._due = [int(step) for step in _evenly(steps, frames)]
        self._next = 0
        self._step: list[int] = []
        self._ratio: list[float] = []
        self._frames: list[NDArray[np.uint8]] = []
        self._waiting: list[list[Tensor]] = []  # frames still where the masks are: fetching them waits for the device

    def record(self, step: int, ratio: float, masks: "Mapping[str, Tensor]") -> None:
        """Show the state after `step` steps: `ratio` in [0, 1], `masks` by structure name, each [units].

        A trained mask may be below 0, and is as far from removed as one that is as much above.
        Steps come in increasing order, 0 (before the search) to `steps`. Raises UpopError for any other.
        """
        last = self._step[-1] if self._step else -1
        if not last < step <= self.steps:
            raise UpopError(f"TraceRecorder.record(): expected a step above {last}, up to {self.steps}, got {step}")
        if self._step and step < self._due[self._next]:
            return
        while self._next < len(self._due) and self._due[self._next] <= step:
            self._next += 1
        values = [masks[s.name].detach().float().abs() for s in self.structures]
        assert [v.shape for v in values] == [(s.units,) for s in self.structures], "one mask per unit"
        self._step.append(step)
        self._ratio.append(ratio)
        self._waiting.append(values)

    def _fetch(self) -> None:
        self._frames += [quantise(np.concatenate([v.cpu().numpy() for v in values])) for values in self._waiting]
        self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far, for `load_state_dict` of another recorder of the same search."""
        self._fetch()
        frames = np.stack(self._frames) if self._frames else np.zeros((0, 0), dtype=np.uint8)
        return {"step": list(self._step), "ratio": list(self._ratio), "next": self._next, "frames": frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._step, self._ratio, self._next = list(state["step"]), list(state["ratio"]), state["next"]
        self._frames, self._waiting = list(np.asarray(state["frames"])), []

    def trace(self) -> Trace:
        """What was recorded so far. Raises UpopError where that is nothing."""
        if not self._step:
            raise UpopError("TraceRecorder: nothing was recorded; call record() after the steps of the search")
        self._fetch()
        return Trace(
            np.array(self._step, dtype=np.int32),
            np.array(self._ratio, dtype=np.float32),
            np.stack(self._frames),
            np.array([s.kind for s in self.structures], dtype=np.str_),
            np.array([s.layer for s in self.structures], dtype=np.int32),
            np.array([s.units for s in self.structures], dtype=np.int32),
        )

    def save(self, path: Path) -> None:
        """Write the trace, whole or not at all."""
        self.trace().save(path)

    def summary(self, frames: int = 25) -> dict[str, Any]:
        """See `Trace.summary`."""
        return self.trace().summary(frames)


def quantise(masks: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Masks as bytes: 0 only for masks <= 0, 255 only for masks >= 1, else the nearest of 1 to 254."""
    between = np.clip(np.rint(255 * masks), 1, 254)
    return np.where(masks <= 0, 0, np.where(masks >= 1, 255, between)).astype(np.uint8)


def load_trace(path: Path) -> Trace:
    """Read a `trace.npz`. Raises UpopError, in one line, for anything that is not one; unpickles nothing."""
    if not path.is_file():
        raise UpopError(f"{path}: not found; expected the trace that a pruning run with a search leaves there")
    names = ("step", "ratio", "masks", "kinds", "layers", "units")
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise UpopError(f"{path}: expected a trace of a search, got a single array")
        with found:
            if missing := [name for name in names if name not in found.files]:
                raise UpopError(f"{path}: expected a trace of a search, but it holds no array {missing[0]!r}")
            # A few bytes of an archive can be a gigabyte: it says so itself, and no more than that is ever unpacked.
            sizes = [member.file_size for member in found.zip.infolist()] if found.zip is not None else []
            if sum(sizes) > MOST_BYTES:
                raise UpopError(f"{path}: expected a trace of at most {MOST_BYTES >> 20} MiB, got a larger one")
            arrays = [found[name] for name in names]
    except UpopError:
        raise
    except _BROKEN as error:
        raise UpopError(f"{path}: cannot be read as a trace, it is damaged; run the search again") from error
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise UpopError(f"{path}: not a trace of a search: not all of it are arrays")
    if (reason := _fault(*arrays)) is not None:
        raise UpopError(f"{path}: not a trace of a search: {reason}")
    step, ratio, masks, kinds, layers, units = arrays
    as_int = np.int32
    return Trace(
        step.astype(as_int), ratio.astype(np.float32), masks, kinds, layers.astype(as_int), units.astype(as_int)
    )


def _fault(
    step: NDArray[Any],
    ratio: NDArray[Any],
    masks: NDArray[Any],
    kinds: NDArray[Any],
    layers: NDArray[Any],
    units: NDArray[Any],
) -> str | None:
    """What is wrong with arrays that are to be a trace, or None."""
    types = "".join(array.dtype.kind for array in (step, ratio, kinds, layers, units))
    if types != "ifUii" or masks.dtype != np.uint8:
        return f"arrays of types {types} and masks of {masks.dtype}, expected ifUii and uint8"
    if not (step.ndim == 1 and step.shape == ratio.shape and len(step) > 0):
        return f"{step.shape} steps for {ratio.shape} ratios"
    if not (units.ndim == 1 and units.shape == kinds.shape == layers.shape and len(units) > 0 and (units > 0).all()):
        return "kinds, layers and units do not fit each other"
    if masks.shape != (len(step), int(units.sum())):
        return f"masks of shape {masks.shape}, expected {(len(step), int(units.sum()))}"
    if not ((np.diff(step) > 0).all() and step[0] >= 0 and np.isfinite(ratio).all()):
        return "steps do not increase from 0, or ratios are not numbers"
    return None


def _evenly(last: int, count: int) -> NDArray[np.int64]:
    """At most `count` integers from 0 to `last`, both among them, evenly spaced."""
    return np.unique(np.rint(np.linspace(0, last, max(2, min(count, last + 1)))).astype(np.int64))
