"""Rules that turn paired comparisons into verdicts: supported, not supported, untestable here.

Pure functions; must not know which claims there are, read files or format pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upop.report.paired import LEAST, LEVEL, Comparison, Side, Stat, compare
from upop.report.records import Results

SUPPORTED, NOT_SUPPORTED, UNTESTABLE = VERDICTS = ("supported", "not supported", "untestable here")
STAGES = {"retrain": "retrained", "slim": "slimmed, not retrained"}
RULE = (
    "Test accuracy, paired by seed: only seeds with both sides, at least 3 of them, each seed's differences averaged "
    "over the ratios, two-sided paired t test over the seeds. Supported: the mean difference has the claimed "
    "direction and p < .05."
)


@dataclass(frozen=True)
class Contrast:
    """Claimed: side `a` is above side `b` at `stage`. `every`: at each ratio of the test, not only on average.

    `decides`: enters the claim's verdict; others are shown beside it. `optional`: left out where nothing was run.
    """

    a: Side
    b: Side
    stage: str = "retrain"
    at_least: float = 0.0
    every: bool = False
    decides: bool = True
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.a.name} against {self.b.name}, {STAGES[self.stage]}"

    @property
    def short(self) -> str:
        """Only what the sides differ in."""
        a, b = self.a, self.b
        if a.method != b.method:
            return f"against {b.name}"
        own = {key: value for key, value in b.fixed.items() if key not in a.fixed or a.fixed[key] != value}
        return "against " + Side(b.method, own, b.varied).name.removeprefix(f"{b.method}, ")


@dataclass(frozen=True)
class Part:
    """One judged piece of a claim: a contrast, or a check without one."""

    name: str
    verdict: str
    reason: str
    decides: bool = True
    comparison: Comparison | None = None
    contrast: Contrast | None = None

    @property
    def short(self) -> str:
        """The name among the parts of one claim."""
        return self.contrast.short if self.contrast else self.name


@dataclass(frozen=True)
class Claim:
    """`rule` adds to `RULE`; `checks` judge what is no contrast of two sides."""

    id: str
    text: str
    rule: str
    contrasts: tuple[Contrast, ...] = ()
    checks: tuple[Callable[[Results], Part], ...] = ()


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str
    reason: str
    parts: tuple[Part, ...]


def evaluate(claim: Claim, results: Results) -> Verdict:
    """A claim holds if every deciding part does, fails if one fails, and is untestable otherwise."""
    parts = [check(results) for check in claim.checks]
    for contrast in claim.contrasts:
        comparison = compare(results.runs, contrast.a, contrast.b, stage=contrast.stage, at_least=contrast.at_least)
        if comparison.rows or comparison.unequal or not contrast.optional:
            verdict, reason = judge(comparison, contrast)
            parts.append(Part(contrast.name, verdict, reason, contrast.decides, comparison, contrast))
    deciding = [part for part in parts if part.decides]
    verdict = combine([part.verdict for part in deciding])
    telling = [part for part in deciding if part.verdict == verdict] or deciding
    several = len(deciding) > 1
    reason = "; ".join(f"{part.short}: {part.reason}" if several else part.reason for part in telling)
    return Verdict(claim, verdict, reason or "nothing was run for it", tuple(parts))


def combine(verdicts: Sequence[str]) -> str:
    """Of the deciding parts: one that is not supported settles it, then one that cannot be tested."""
    for verdict in (NOT_SUPPORTED, UNTESTABLE):
        if verdict in verdicts:
            return verdict
    return SUPPORTED if verdicts else UNTESTABLE


def judge(comparison: Comparison, contrast: Contrast) -> tuple[str, str]:
    """Verdict and its reason in one line, for the claim that side a is above side b."""
    c, n = comparison, len(comparison.seeds)
    if c.overall is None or c.half_width is None:
        return UNTESTABLE, _too_few(c, contrast)
    if c.p is None:
        return UNTESTABLE, no_spread(c.overall)
    if c.identical:
        return NOT_SUPPORTED, f"inert: accuracies and widths are exactly equal in all {c.identical} pairs"
    numbers = f"95 % interval {interval_text(c.overall, c.half_width)}, {p_text(c.p)}, n = {n}"
    left_out = [row.target for row in c.rows if row.target not in c.targets and row.removed >= contrast.at_least]
    if left_out:
        numbers += f"; {', '.join(left_out)} not in the test: too few seeds have it"
    if c.unequal:
        numbers += f"; {_unequal(c)}"
    mean = f"{points_text(c.overall.mean)} points"
    if c.p >= LEVEL:
        numbers += f"; under {c.half_width:.2f} could not have been told"
        return NOT_SUPPORTED, f"no difference told apart: {mean} ({numbers})"
    if c.overall.mean < 0:
        return NOT_SUPPORTED, f"opposite: {mean} ({numbers})"
    against = [row.target for row in c.rows if row.target in c.targets and row.difference.mean <= 0]
    if contrast.every and against:
        return NOT_SUPPORTED, f"not at every ratio, not at {', '.join(against)}; on average {mean} ({numbers})"
    return SUPPORTED, f"{mean} ({numbers})"


def no_spread(overall: Stat) -> str:
    said = f"all {overall.n} seeds differ by exactly {points_text(overall.mean)} points"
    return f"no spread: {said}, so that no test says how sure that is"


def _too_few(c: Comparison, contrast: Contrast) -> str:
    n = len(c.seeds)
    high = f" at ratios of {contrast.at_least:g} and more" if contrast.at_least else ""
    reason = f"n = {n} paired seeds{high}, {LEAST} needed"
    if c.unequal:
        reason += f"; {_unequal(c)}"
    if c.identical:
        reason += f"; accuracies and widths are exactly equal in all {c.identical} pairs there are"
    return reason


def _unequal(c: Comparison) -> str:
    return f"{c.unequal} pair{'' if c.unequal == 1 else 's'} left out because their achieved ratios differ"


def p_text(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def points_text(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def interval_text(overall: Stat, half_width: float) -> str:
    return f"{points_text(overall.mean - half_width)} to {points_text(overall.mean + half_width)}"
