"""Timing: a model's latency table, measured on the machine at hand.

Builds narrowed copies of the model and times them in turns. Must not decide what is pruned, and prints nothing.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from upop.errors import UpopError
from upop.families import find_structures
from upop.latency import LatencyTable, latency_cost
from upop.methods import DEFAULT_KINDS
from upop.profiling import own_channels, time_in_turns
from upop.ranking import NO_ALIGNMENT
from upop.runtimes import make_runner
from upop.slim import slim
from upop.structures import Structure

log = logging.getLogger(__name__)

MOST_NOISE = 0.025  # half of what a target in latency may miss
FRACTIONS = (0.125, 0.25, 0.5, 0.75)
# Measured jointly, to see what kinds save together: these fractions of what can go at all.
JOINT = (0.3, 0.55, 0.8)


def measure_latency_table(
    model: nn.Module,
    *,
    batch: int = 1,
    image_size: int,
    runtime: str = "eager",
    dtype: str = "float32",
    structures: Sequence[str] = DEFAULT_KINDS,
    align: Mapping[str, int] = NO_ALIGNMENT,
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda text: None,
) -> LatencyTable:
    """Time one pass of `batch` images at several widths of each kind, in turns with the dense model.

    `seconds` is the time for all passes that are timed, at least five each; building, compiling and exporting come on
    top. Kinds in `structures` are narrowed one at a time, then all together, which gives the table's `scale`. Logs a
    warning where passes differ so much that the table is no basis for a target: on a machine that is busy.
    """
    if batch < 1:
        raise UpopError(f"latency: expected a batch of 1 image or more, got {batch}")
    found = find_structures(model, structures)
    kinds = list(dict.fromkeys(s.kind for s in found))
    size = (batch, own_channels(model), image_size, image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    noise = 0.0
    # By what is kept: of few heads, or in coarse steps, several fractions may come to one width, or to all of it.
    widths: dict[str, dict[float, dict[str, Tensor]]] = {}
    for kind in kinds:
        narrowed = [_narrowed(found, {kind: f}, align) for f in _fractions(kind, found)]
        widths[kind] = {kept: keep for keep in narrowed if (kept := _kept(found, keep, kind)) < 1}
    keeps: dict[object, dict[str, Tensor]] = {
        (kind, kept): keep for kind, own in widths.items() for kept, keep in own.items()
    }

    def times(models: Mapping[object, dict[str, Tensor]], seconds: float) -> dict[object, float]:
        passes = {"dense": make_runner(model, images, runtime=runtime, dtype=dtype)}
        for number, (name, keep) in enumerate(models.items()):
            progress(f"latency table: {number + 1} of {len(models)} widths built")
            passes[str(name)] = make_runner(slim(model, keep), images, runtime=runtime, dtype=dtype)
        progress("latency table: timing")
        timed = time_in_turns(passes, device=_device(model), min_runs=5, max_seconds=seconds)
        dense = timed["dense"]
        # Each against the dense model's pass of the same turn: a machine that slows down for a while slows both.
        turns = {
            name: [a / b for a, b in zip(timed[str(name)].runs_ms, dense.runs_ms, strict=True)] for name in models
        }
        nonlocal noise
        noise = max([noise, *(standard_error(shares) / median(shares) for shares in turns.values())])
        return {"dense": dense.median_ms} | {name: median(s) * dense.median_ms for name, s in turns.items()}

    ms = times(keeps, seconds * 2 / 3)
    points = {kind: tuple((kept, ms[kind, kept]) for kept in sorted(own)) for kind, own in widths.items()}
    table = LatencyTable(
        dense_ms=ms["dense"],
        points=points,
        widths={s.name: s.width for s in found},
        runtime=runtime,
        dtype=dtype,
        batch=batch,
        image_size=image_size,
        device=str(_device(model)),
        threads=torch.get_num_threads(),
    )
    table = _scaled(table, found, align, lambda keeps: times(keeps, seconds / 3))
    if noise > MOST_NOISE:
        log.warning(
            "latency table: its times are uncertain by %.0f %%: the machine is busy, or slows down as it gets hot; "
            "a target in latency may be missed by as much; measure again on a quiet machine",
            100 * noise,
        )
    return replace(table, noise=noise)


def standard_error(values: Sequence[float]) -> float:
    """Of the median of `values`, by their quartiles, which a few slow passes do not move: as if they were normal."""
    low, _, high = quantiles(values, n=4)
    return 1.253 * (high - low) / 1.349 / math.sqrt(len(values))


def _scaled(
    table: LatencyTable,
    structures: Sequence[Structure],
    align: Mapping[str, int],
    times: Callable[[Mapping[object, dict[str, Tensor]]], dict[object, float]],
) -> LatencyTable:
    """The table with the `scale` that narrowing all kinds at once shows."""
    leaves = dict.fromkeys(s.kind for s in structures if s.kind not in ("head", "block"))
    if len(leaves) < 2:
        return table
    keeps: dict[object, dict[str, Tensor]] = {
        f: _narrowed(structures, dict.fromkeys(leaves, 1 - f), align) for f in JOINT
    }
    ms = times(keeps)
    cost = latency_cost(structures, table)
    # Relative to the dense model of the same turns: the machine may have slowed down since.
    measured = sum(1 - ms[f] / ms["dense"] for f in JOINT)
    expected = sum(cost.removed(keeps[f]) / cost.dense for f in JOINT)
    return replace(table, scale=measured / expected) if expected > 0 and measured > 0 else table


def _fractions(kind: str, structures: Sequence[Structure]) -> list[float]:
    width = min(s.width for s in structures if s.kind == kind)
    if kind == "block":
        return [0.5]
    return [f for f in FRACTIONS if f * width >= 1]


def _narrowed(
    structures: Sequence[Structure], fractions: Mapping[str, float], align: Mapping[str, int]
) -> dict[str, Tensor]:
    """A keep with these fractions of some kinds, at widths that a search could leave, and all of the others."""
    keep = {}
    blocks = [s.name for s in structures if s.kind == "block"]
    for s in structures:
        fraction = fractions.get(s.kind, 1.0)
        if s.kind == "block":
            keep[s.name] = torch.tensor([blocks.index(s.name) < max(1, round(fraction * len(blocks)))])
            continue
        each = align.get(s.kind, 1)
        width = s.width if fraction >= 1 else min(s.width, max(1, round(fraction * s.width / each)) * each)
        if each == 1 and fraction < 1 and s.width >= 16:
            # Searches leave any width; times at powers of two would promise too much.
            width = min(s.width, width | 1)
        keep[s.name] = (torch.arange(s.width) < width).repeat(s.lanes)
    return keep


def _kept(structures: Sequence[Structure], keep: Mapping[str, Tensor], kind: str) -> float:
    own = [s for s in structures if s.kind == kind]
    return sum(int(keep[s.name].sum()) for s in own) / sum(s.units for s in own)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
