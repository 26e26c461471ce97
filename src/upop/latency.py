"""Latency tables: what the forward pass of a model takes at some widths, as measured, and the cost that follows.

Plain numbers. Must not measure: see `upop.timing`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from upop.costs import Cost, Term
from upop.errors import TargetError
from upop.structures import Structure

MOST_SAVED = 0.99  # of the dense model's time

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class LatencyTable:
    """Times of one forward pass, ms, with one kind narrowed in all layers alike and all others whole.

    Attributes:
        dense_ms: the model as it is.
        points: kind -> (fraction of units kept, ms), by rising fraction, without the dense model; for the kind
            `block`, the fraction of blocks.
        scale: how much more (or less) several kinds together save than one by one, as measured.
        runtime, dtype, batch, image_size, device, threads: of the measured passes.
        widths: structure name -> width in the dense model, of which this is the table.
        noise: standard error of the least certain of the measured times, as a share of it.
    """

    dense_ms: float
    points: Mapping[str, Points]
    widths: Mapping[str, int]
    runtime: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    image_size: int = 224
    device: str = "cpu"
    threads: int = 1
    scale: float = 1.0
    noise: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """A few characters that differ from those of any other table."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """From `to_dict()`, also after JSON has made lists of tuples. Raises TargetError for anything else."""
        try:
            points = {k: tuple((float(f), float(ms)) for f, ms in points) for k, points in values["points"].items()}
            table = cls(**{**values, "points": points, "widths": dict(values["widths"])})
            numbers = [table.dense_ms, table.scale, table.noise, *(ms for row in points.values() for _, ms in row)]
            right = all(math.isfinite(n) and n >= 0 for n in numbers) and table.dense_ms > 0
            rising = all(
                all(low < high for (low, _), (high, _) in pairwise([(-1e-9, 0.0), *row, (1.0, 0.0)]))
                for row in points.values()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TargetError(f"latency table: expected what LatencyTable.to_dict() gives, got {error!r}") from None
        if not right or not rising:
            raise TargetError("latency table: expected times in ms and fractions that rise from 0 to below 1")
        return table

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.runtime}, {self.dtype}, {self.device}, {self.threads} thread(s)"


def latency_cost(structures: Sequence[Structure], table: LatencyTable) -> Cost:
    """Milliseconds of a pass, by `table`. Raises TargetError where the table is one of another model.

    What a kind can save at most is spread over its layers by their parameters, and follows the measured curve in each.
    Heads and blocks also save what is left of them when their dims or neurons are gone.
    """
    for s in structures:
        if table.widths.get(s.name) != s.width or s.kind not in table.points:
            raise TargetError(
                f"latency table: expected one of this model, with {s.name} of width {s.width}, got "
                f"{table.widths.get(s.name, 'none')}; measure a table with upop.measure_latency_table(model, ...)"
            )
    kinds = list(dict.fromkeys(s.kind for s in structures))
    saved = {kind: table.dense_ms - _at_zero(table, kind) for kind in kinds}
    within = {
        "head": sum(saved[kind] for kind in kinds if kind in ("attn", "dims", "qk", "v")),
        "block": sum(saved[kind] for kind in kinds if kind not in ("head", "block")),
    }
    own = {kind: max(0.0, saved[kind] - within.get(kind, 0.0)) for kind in kinds}
    if "block" in kinds and "head" in kinds:
        own["block"] = max(0.0, own["block"] - own["head"])
    # Never all of the time: what a busy machine makes of a table must not promise that.
    scale = min(table.scale, MOST_SAVED * table.dense_ms / max(sum(own.values()), 1e-9))
    own = {kind: scale * ms for kind, ms in own.items()}
    terms = []
    for s in structures:
        of_kind = [each for each in structures if each.kind == s.kind]
        share = s.units * s.cost / sum(each.units * each.cost for each in of_kind)
        terms.append(Term(own[s.kind] * share, (s.name, *_around(s, structures))))
    curves = {s.name: _curve(table, s.kind) for s in structures if s.kind != "block"}
    return Cost("latency", tuple(structures), table.dense_ms - sum(own.values()), tuple(terms), curves)


def _around(s: Structure, structures: Sequence[Structure]) -> list[str]:
    """Names of the heads and the block that the units of `s` are in."""
    wanted = {"block"} if s.kind in ("head", "mlp") else {"head", "block"} if s.kind != "block" else set()
    return [each.name for each in structures if each.kind in wanted and s.block and each.block == s.block]


def _rising(table: LatencyTable, kind: str) -> list[tuple[float, float]]:
    """Fractions and times, never falling: what noise lets a wider layer be faster is taken for no difference."""
    points = [*table.points[kind], (1.0, table.dense_ms)]
    times: list[float] = []
    for _, ms in points:
        times.append(min(max([ms, *times]), table.dense_ms))
    return [(fraction, ms) for (fraction, _), ms in zip(points, times, strict=True)]


def _at_zero(table: LatencyTable, kind: str) -> float:
    """The time with nothing left of `kind`: the line through the two lowest points, not below 0."""
    (x0, y0), *more = _rising(table, kind)
    # A kind that has but one width has the dense model's point alone, and saves nothing.
    if not more or x0 == 0:
        return y0
    x1, y1 = more[0]
    return max(0.0, y0 - x0 * (y1 - y0) / (x1 - x0))


def _curve(table: LatencyTable, kind: str) -> Points:
    zero = _at_zero(table, kind)
    span = table.dense_ms - zero
    rising = _rising(table, kind)
    points = [(0.0, zero), *rising] if rising[0][0] > 0 else rising
    return tuple((fraction, (ms - zero) / span if span > 0 else fraction) for fraction, ms in points)
