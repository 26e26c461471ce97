"""Paired comparisons over seeds: who is compared with whom, mean, spread, interval and p value.

Pure functions from runs to numbers, in per cent and points; what the numbers mean for a claim is for `claims`.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from upop.report.records import CONTINUED, OPEN, Run, removal, share, show

LEAST = 3  # pairs without which nothing is judged
SAME_RATIO = 0.02  # achieved ratios further apart than this are not "the same ratio"
LEVEL = 0.05


@dataclass(frozen=True)
class Stat:
    """Mean, standard deviation (None for one value; divisor n - 1) and number of values."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Side:
    """Which runs stand on one side: of `method`, with the settings `fixed` and otherwise the method's standard.

    `varied`: settings that must depart from the standard, to whatever value. Several such runs of one seed and
    target count with their mean.
    """

    method: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    varied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        settings = [f"{key}={show(value)}" for key, value in self.fixed.items()]
        return ", ".join([self.method, *settings, *(f"any {key}" for key in self.varied)])

    def holds(self, run: Run) -> bool:
        departs = {key for key, _ in run.variant}
        allowed = {*self.fixed, *self.varied}
        right = all(run.config.get(key) == value for key, value in self.fixed.items())
        return run.method == self.method and right and departs <= allowed and departs >= set(self.varied)


@dataclass(frozen=True)
class Row:
    """One target: both sides over the paired seeds, and their difference a - b in points."""

    target: str
    removed: float  # share, in [0, 1], see `share`
    a: Stat
    b: Stat
    difference: Stat
    p: float | None  # two-sided, None below two pairs and without any spread


@dataclass(frozen=True)
class Comparison:
    """All targets at which both sides have paired seeds, and the test over seeds.

    The test takes the targets and seeds of `rectangle`: each seed's differences are averaged over those targets, and
    the averages tested against 0.
    """

    rows: tuple[Row, ...]
    targets: tuple[str, ...]  # in the test
    seeds: tuple[int, ...]  # in the test
    overall: Stat | None
    half_width: float | None  # of the 95 % interval of the mean difference
    p: float | None
    unequal: int  # pairs left out because their achieved ratios differ
    identical: int | None  # pairs with equal accuracy and equal widths; None if not all are


def stat(values: Sequence[float]) -> Stat:
    """Of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Stat(statistics.fmean(values), sd, len(values))


def t_test(values: Sequence[float]) -> tuple[float | None, float]:
    """p value (two-sided t test that the mean is 0) and half-width of the mean's 95 % interval; two values or more.

    For paired differences this is the paired t test. Without any spread the test is undefined: then p is 1 where all
    values are 0, and None where all are the same other value, since seeds that change nothing are no evidence.
    """
    n, mean, sd = len(values), statistics.fmean(values), statistics.stdev(values)
    if sd < 1e-9:
        return (1.0 if abs(mean) < 1e-9 else None), 0.0
    p = float(stats.ttest_1samp(values, 0.0).pvalue)
    return p, float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)


def compare(runs: Iterable[Run], a: Side, b: Side, *, stage: str, at_least: float = 0.0) -> Comparison:
    """Side `a` against `b` in test accuracy at `stage`; only targets that remove `at_least` enter the test."""
    runs = list(runs)
    pairs, unequal = _pairs(runs, a, b, stage)
    cells = {
        key: statistics.fmean(accuracy_at(x, stage) for x in left)
        - statistics.fmean(accuracy_at(y, stage) for y in right)
        for key, (left, right) in pairs.items()
    }
    rows = _rows(pairs, stage)
    high = {row.target for row in rows if row.removed >= at_least}
    targets, seeds = rectangle([key for key in cells if key[1] in high])
    per_seed = [statistics.fmean(cells[seed, target] for target in targets) for seed in seeds]
    p, half_width = t_test(per_seed) if len(per_seed) >= LEAST else (None, None)
    overall = stat(per_seed) if per_seed else None
    same = [_same(x, y, stage) for left, right in pairs.values() for x in left for y in right]
    identical = len(same) if same and all(same) else None
    return Comparison(rows, targets, seeds, overall, half_width, p, unequal, identical)


def rectangle(cells: Collection[tuple[int, str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Targets and seeds such that every seed has every target, at least `LEAST` seeds if that can be had.

    While too few seeds have all targets, the target with the fewest seeds is dropped, the highest among equals: not
    always the most targets that could be had, but few steps however many there are.
    """
    targets = sorted({target for _, target in cells}, key=removal)
    seeds = sorted({seed for seed, _ in cells})
    while targets:
        having = tuple(seed for seed in seeds if all((seed, target) in cells for target in targets))
        if len(having) >= LEAST or len(targets) == 1:
            return tuple(targets), having
        targets.remove(min(reversed(targets), key=lambda target: sum((seed, target) in cells for seed in seeds)))
    return (), ()


def accuracy_at(run: Run, stage: str) -> float:
    """Test accuracy in per cent, for runs that are known to have it; of a dense control always its last."""
    value = run.accuracy(_stage(run, stage))
    assert value is not None
    return value


Pairs = dict[tuple[int, str], tuple[list[Run], list[Run]]]


def _pairs(runs: list[Run], a: Side, b: Side, stage: str) -> tuple[Pairs, int]:
    """(seed, target) -> the runs of both sides there, and how many were left out because their ratios differ.

    A dense control has no target: its runs stand beside the other side's at every target. An open-ended run stands
    at every target whose runs on the other side came out at its ratio.
    """
    pairs, unequal = {}, 0
    measured = [run for run in runs if run.accuracy(_stage(run, stage)) is not None]
    sides = [[run for run in measured if side.holds(run)] for side in (a, b)]
    targets = {(run.seed, run.target) for side in sides for run in side if run.target not in ("", OPEN)}
    for key in sorted(targets, key=_order):
        left, right = (_at(side, *key) for side in sides)
        if not left or not right or set(map(id, left)) & set(map(id, right)):
            continue
        left, right = _without_strays(left, right), _without_strays(right, left)
        if left and right and _equal_ratios(left, right):
            pairs[key] = (left, right)
        else:
            unequal += 1
    return pairs, unequal


def _at(side: list[Run], seed: int, target: str) -> list[Run]:
    return [run for run in side if run.seed == seed and run.target in ("", OPEN, target)]


def _without_strays(side: list[Run], others: list[Run]) -> list[Run]:
    """Less the open-ended runs that came out at another ratio than the other side's."""
    return [run for run in side if run.target != OPEN or _equal_ratios([run], others)]


def _order(key: tuple[int, str]) -> tuple[tuple[str, float], int]:
    return removal(key[1]), key[0]


def _stage(run: Run, stage: str) -> str:
    return "last" if run.method == CONTINUED else stage


def _equal_ratios(left: list[Run], right: list[Run]) -> bool:
    runs = (*left, *right)
    if any(not run.target for run in runs):
        return True
    targets = {run.target for run in runs}
    # Milliseconds are measured: no share of them says better than the target that two runs had the same.
    if len(targets) == 1 and min(targets).startswith("latency="):
        return True
    kinds = {target.partition("=")[0] for target in targets - {OPEN}}
    ratios = [run.removed(min(kinds) if len(kinds) == 1 else "prunable") for run in runs]
    return max(ratios) - min(ratios) <= SAME_RATIO


def _same(x: Run, y: Run, stage: str) -> bool:
    return accuracy_at(x, stage) == accuracy_at(y, stage) and x.data.get("widths") == y.data.get("widths")


def _rows(pairs: Pairs, stage: str) -> tuple[Row, ...]:
    rows = []
    for target in sorted({target for _, target in pairs}, key=removal):
        here = [pair for (_, at), pair in pairs.items() if at == target]
        sides = [[statistics.fmean(accuracy_at(r, stage) for r in pair[n]) for pair in here] for n in (0, 1)]
        differences = [x - y for x, y in zip(*sides, strict=True)]
        p = t_test(differences)[0] if len(differences) > 1 else None
        removed = share(target, [run for pair in here for side in pair for run in side])
        rows.append(Row(target, removed, stat(sides[0]), stat(sides[1]), stat(differences), p))
    return tuple(rows)
