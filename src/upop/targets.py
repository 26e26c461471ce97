"""Targets: how much is to go, in the user's units, checked against what a model can give.

Must not know searches, masks or scores.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from upop.costs import Cost, macs_cost, params_cost
from upop.errors import TargetError, nearest
from upop.latency import LatencyTable, latency_cost
from upop.methods import Method
from upop.ranking import NO_ALIGNMENT, group_price, removable
from upop.structures import Structure, whole_layers

UNITS = ("params", "macs", "latency", "prunable")
# What a number may end in, per unit: (suffix, factor to parameters, MACs, milliseconds).
SUFFIXES: Mapping[str, Mapping[str, float]] = {
    "params": {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "prunable": {},
}
ROUNDING = 1e-9  # how far above the reachable range a target may be, as a share of it
TOLERANCE = 0.01  # of the whole model's cost: how far the removal may be above the target
TOLERANCE_LATENCY = 0.03  # of the time asked for: the same, by the table
MEASURED_LATENCY = 0.05  # of the time asked for: how far the measured time may be off, prediction and noise included


@dataclass(frozen=True)
class Target:
    """How much to remove. Exactly one is given, either as a fraction REMOVED, a number in [0, 1), or as what is LEFT,
    a text: `params="11M"`, `macs="2.3G"`, `latency="4ms"`.

    Attributes:
        params: of all parameters; prunable: of those that belong to some unit.
        macs: of the multiply-accumulates of one image.
        latency: of the time of one forward pass, as measured in a latency table.

    What is removed is at most 1 % of the model above the target, or the target is refused; only whole heads or blocks
    with nothing smaller left beside them may overshoot by more. A measured time may be 5 % off the one asked for.
    """

    params: float | str | None = None
    prunable: float | None = None
    macs: float | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise TargetError(f"target: expected exactly one of params=, macs=, latency=, prunable=, got {given or 0}")
        if not isinstance(self.value, Real | str):
            raise TargetError(f"target {self}: expected a number or a text, got {type(self.value).__name__}")
        if self.left is None and not 0 <= self.fraction < 1:
            raise TargetError(
                f"target {self}: expected a fraction removed, 0 <= x < 1, or what is left, such as "
                f"{EXAMPLES[self.unit]}, got {self.value}; {self.unit}=0.5 removes half"
            )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`params=0.5` or `latency=4ms`, as typed on a command line. Raises TargetError for anything else."""
        unit, _, number = (part.strip() for part in text.partition("="))
        if unit not in UNITS:
            raise TargetError(
                f"target {text!r}: expected {', '.join(f'{u}=...' for u in UNITS)}, got unit {unit!r}"
                + nearest(unit, list(UNITS))
            )
        value: Any = number
        with contextlib.suppress(ValueError):
            value = float(number)
        if isinstance(value, str) and _absolute(unit, value) is None:
            raise TargetError(
                f"target {text!r}: expected a fraction removed or what is left after '=', such as 0.5 or "
                f"{EXAMPLES[unit]}, got {number!r}"
            )
        return cls(**{unit: value})

    @property
    def unit(self) -> str:
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def currency(self) -> str:
        """What costs are counted in: `params`, `macs` or `latency`."""
        return "params" if self.unit == "prunable" else self.unit

    @property
    def value(self) -> float | str:
        """As given."""
        value: float | str = getattr(self, self.unit)
        return value

    @property
    def fraction(self) -> float:
        """The fraction to remove; only where `left` is None."""
        assert not isinstance(self.value, str), "an absolute target has no fraction of its own"
        return self.value

    @property
    def left(self) -> float | None:
        """What is to be left, in parameters, MACs or milliseconds; None for a fraction."""
        if not isinstance(self.value, str):
            return None
        left = _absolute(self.unit, self.value)
        if left is None:
            raise TargetError(
                f"target {self}: expected what is left, such as {EXAMPLES[self.unit]}, got {self.value!r}"
            )
        return left

    def slack(self, cost: Cost, budget: float) -> float:
        """How much more than `budget` may go, in the currency of `cost`."""
        return TOLERANCE_LATENCY * (cost.dense - budget) if self.unit == "latency" else TOLERANCE * cost.dense

    def __str__(self) -> str:
        return f"{self.unit}={self.value}"

    def budget(self, cost: Cost, align: Mapping[str, int] = NO_ALIGNMENT, *, unified: bool = True) -> float:
        """How much of `cost` to remove, in its currency; `unified`: from all kinds together, not from each its share.

        Raises TargetError, with the reachable range, where floors forbid the target or one step is too large.
        """
        base = cost.prunable if self.unit == "prunable" else cost.dense
        most = removable(cost, align)
        budget = self.fraction * base if self.left is None else cost.dense - self.left
        if budget < 0:
            raise TargetError(
                f"target {self}: cannot be met: the model has {amount(cost.dense, self.currency)} as it is"
            )
        if budget > most * (1 + ROUNDING):
            way = "; whole blocks among the structures, more images a pass or ONNX may allow more"
            raise TargetError(
                f"target {self}: cannot be met; reachable here is {self.unit}=0 to {self.unit}="
                f"{floor4(most / base)} ({amount(cost.dense - most, self.currency)} left of "
                f"{amount(cost.dense, self.currency)}), since {what_stays(cost.structures, align)}"
                + (way if self.unit == "latency" else "")
            )
        check = self._check_shares if cost.additive and not unified else self._check_steps
        check(cost, align, budget)
        return min(budget, most)

    def _check_steps(self, cost: Cost, align: Mapping[str, int], budget: float) -> None:
        """Raise TargetError where not even the finest kind comes in steps that meet the target."""
        if budget <= 0:
            return
        worst: dict[str, float] = {}
        for s in cost.structures:
            if not s.fixed:
                worst[s.kind] = max(worst.get(s.kind, 0.0), group_price(s, cost, align))
        kind = min(worst, key=lambda kind: worst[kind])
        slack = self.slack(cost, budget)
        if worst[kind] > slack:
            each = align.get(kind, 1)
            what = f"one unit of {kind}" if each == 1 else f"a step of {each} units of {kind}"
            raise TargetError(
                f"target {self}: cannot be met within {100 * slack / cost.dense:.2g}%: {what} alone is "
                f"{amount(worst[kind], self.currency)} of the model's {amount(cost.dense, self.currency)}; "
                + (COARSE.get(kind, TOO_SMALL) if each == 1 else "align less")
            )

    def _check_shares(self, cost: Cost, align: Mapping[str, int], budget: float) -> None:
        """Raise TargetError where the same ratio of every kind, in whole steps, goes too far."""
        kinds = dict.fromkeys(s.kind for s in cost.structures)
        parts = [cost.only(s for s in cost.structures if s.kind == kind) for kind in kinds]
        over = sum(_overshoot(part, align, budget / cost.prunable) for part in parts) if budget > 0 else 0.0
        slack = self.slack(cost, budget)
        if over > slack:
            raise TargetError(
                f"target {self}: cannot be met within {100 * slack / cost.dense:.2g}%: the same ratio in "
                f"every kind, in whole steps, is up to {amount(over, self.currency)} more, of the model's "
                f"{amount(cost.dense, self.currency)}; use a unified method, finer kinds, or align less"
            )


def _overshoot(part: Cost, align: Mapping[str, int], ratio: float) -> float:
    """How far above `ratio` of one kind's cost its steps end, at most; exactly where they are all alike."""
    steps = {group_price(s, part, align) for s in part.structures}
    alike = len(steps) == 1 and all(s.width % align.get(s.kind, 1) == 0 for s in part.structures)
    # Less what a ranking takes for rounding.
    budget = ratio * part.prunable
    return (1e-6 * max(1.0, budget * 1e-6) - budget) % max(steps) if alike else max(steps)


def find_cost(
    model: nn.Module, structures: Sequence[Structure], currency: str, table: LatencyTable | None = None
) -> Cost:
    """What `model` costs in `currency`. Raises TargetError for a latency without a table, or with another model's."""
    if currency == "params":
        return params_cost(model, structures)
    if currency == "macs":
        return macs_cost(model, structures)
    if table is None:
        raise TargetError(
            "target latency: expected a latency table of this model on this device, got none; measure one with "
            "upop.measure_latency_table(model, batch=..., image_size=...) and give it as latency="
        )
    return latency_cost(structures, table)


def check_goal(
    target: Target | None,
    method: Method,
    *,
    threshold: float | None = None,
    max_drop: float | None = None,
    tolerance: float | None = None,
) -> None:
    """Raise TargetError for goals of a search that contradict each other or its method, or none at all."""
    rules = {"threshold": threshold, "max_drop": max_drop, "tolerance": tolerance}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) > 1:
        raise TargetError(f"search: expected one of threshold, max_drop, tolerance, got {' and '.join(given)}")
    if target is None and not given and method.score != "none":
        raise TargetError("search: an open-ended search needs one of threshold, max_drop, tolerance")
    if target is not None and threshold is not None:
        raise TargetError(f"search: a threshold decides the ratio itself; leave out the target {target}")
    if threshold is not None and math.isnan(threshold):
        raise TargetError(f"threshold: expected a number, got {threshold}")
    for name, value in (("max_drop", max_drop), ("tolerance", tolerance)):
        if value is None:
            continue
        if not 0 <= value < 1:
            raise TargetError(f"{name}: expected a fraction from 0 to 1 (0.01 = one point), got {value}")
        if method.shrink != "progressive":
            raise TargetError(f"{name}: needs a progressive search, and this one cuts once at the end")
    if method.score == "mask" and method.shrink == "progressive":
        raise TargetError("shrink: a method that trains its masks cuts once; progressive would overwrite them")


TOO_SMALL = "the model is too small or too narrow for structured pruning"
COARSE = dict.fromkeys(("head", "block"), "add a finer kind to the structures, such as attn or mlp")
EXAMPLES = {"params": "params=11M", "macs": "macs=2.3G", "latency": "latency=4ms", "prunable": "prunable=0.5"}


def amount(value: float, currency: str) -> str:
    """A cost for people: `5,717,416 parameters`, `1.258 GMACs`, `12.3 ms`."""
    if currency == "params":
        return f"{value:,.0f} parameters"
    if currency == "macs":
        return f"{value / 1e9:,.3f} GMACs" if value >= 1e7 else f"{value / 1e6:.3g} MMACs"
    return f"{value:.3g} ms"


def _absolute(unit: str, text: str) -> float | None:
    """`11M` in parameters, `2.3G` in MACs, `4ms` in ms; None for any other text."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    factor = SUFFIXES[unit].get(found[2]) if found else None
    return float(found[1]) * factor if found and factor is not None else None


def what_stays(structures: Sequence[Structure], align: Mapping[str, int]) -> str:
    """Why no more can go, in words."""
    each = "one aligned width" if any(n > 1 for n in align.values()) else "one unit of each kind"
    whole = ", ".join(map(str, whole_layers(structures)))
    return f"every layer keeps at least {each}" + (f", and those ignored ({whole}) all of theirs" if whole else "")


def floor4(ratio: float) -> str:
    """Rounded DOWN to four decimals: a target that is met."""
    return f"{int(ratio * 10_000 + 1e-9) / 10_000:.4f}"
