"""The claims that a study checks and the experiments it makes, as data, with the checks that are no paired contrast.

Pure functions; must not read files or format pages. What decides a claim is said in words beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from upop.report.paired import LEAST, LEVEL, Side, Stat, accuracy_at, compare, stat, t_test
from upop.report.records import CONTINUED, OPEN, Results, Run, share
from upop.report.verdicts import (
    NOT_SUPPORTED,
    SUPPORTED,
    UNTESTABLE,
    Claim,
    Contrast,
    Part,
    interval_text,
    no_spread,
    p_text,
    points_text,
)

HIGH = 0.8  # ratios from here on are "high"
COLLAPSE = 10.0  # points below the dense control at which a method has collapsed
CHANCE = 5.0  # points above chance up to which accuracy is "at chance"


# ---- checks that are no contrast ----


@dataclass(frozen=True)
class Level:
    """A method at one target beside the dense control of the same seeds."""

    target: str
    accuracy: Stat
    below: Stat  # points below the control
    collapsed: bool


def levels(results: Results, method: str, stage: str = "retrain") -> tuple[Level, ...]:
    """At high ratios, for targets with at least `LEAST` seeds that also have the dense control.

    Collapsed means: on average more than `COLLAPSE` points below the control, or within `CHANCE` points of chance.
    """
    comparison = compare(results.runs, Side(CONTINUED), Side(method), stage=stage)
    chance = 100 / results.classes if results.classes else 0.0
    return tuple(
        Level(row.target, row.b, row.difference, row.difference.mean > COLLAPSE or row.b.mean <= chance + CHANCE)
        for row in comparison.rows
        if row.removed >= HIGH and row.difference.n >= LEAST
    )


def collapse(results: Results) -> Part:
    """C2: at some high ratio mask-based collapses and unified does not, and at none the other way round."""
    unified = {level.target: level for level in levels(results, "unified")}
    mask = {level.target: level for level in levels(results, "mask")}
    both = [target for target in unified if target in mask]
    name = "who collapses"
    if not both:
        return Part(
            name, UNTESTABLE, f"no ratio of {HIGH:g} or more has {LEAST} seeds of unified, mask and dense-continued"
        )
    says = "; ".join(f"{target}: unified {_level(unified[target])}, mask {_level(mask[target])}" for target in both)
    better = any(mask[target].collapsed and not unified[target].collapsed for target in both)
    worse = any(unified[target].collapsed and not mask[target].collapsed for target in both)
    return Part(name, SUPPORTED if better and not worse else NOT_SUPPORTED, says)


def _level(level: Level) -> str:
    word = "collapses" if level.collapsed else "holds"
    return f"{word} ({level.accuracy.mean:.2f} %, {points_text(-level.below.mean)} against the control)"


def holds_up(results: Results) -> Part:
    """Experiment 1: retrained, upop collapses at no high ratio."""
    found = levels(results, "upop")
    name = "upop beside dense-continued at high ratios"
    if not found:
        return Part(name, UNTESTABLE, f"no ratio of {HIGH:g} or more has {LEAST} seeds of upop and dense-continued")
    verdict = NOT_SUPPORTED if any(level.collapsed for level in found) else SUPPORTED
    return Part(name, verdict, "; ".join(f"{level.target}: {_level(level)}" for level in found))


def small_drop(results: Results) -> Part:
    """C4: slimming costs the progressive methods at most `COLLAPSE` points of their dense model's accuracy."""
    reasons, drops = [], []
    for method in ("upop", "progressive"):
        values = slim_drops(results.runs, method)
        if len(values) >= LEAST:
            drop = stat(values)
            drops.append(drop.mean)
            reasons.append(f"{method} {points_text(drop.mean)} ± {drop.sd or 0:.2f} points (n = {drop.n} seeds)")
    name = f"dense to slimmed at ratios of {HIGH:g} and more"
    if not drops:
        return Part(name, UNTESTABLE, f"neither upop nor progressive has {LEAST} seeds there")
    return Part(name, SUPPORTED if min(drops) >= -COLLAPSE else NOT_SUPPORTED, ", ".join(reasons))


def slim_drops(runs: Sequence[Run], method: str) -> list[float]:
    """Per seed: slimmed minus dense test accuracy in points, averaged over the high ratios."""
    side = Side(method)
    found: dict[int, list[float]] = {}
    for run in runs:
        high = run.target not in ("", OPEN) and share(run.target, [run]) >= HIGH
        if high and side.holds(run) and run.accuracy("slim") is not None:
            found.setdefault(run.seed, []).append(accuracy_at(run, "slim") - accuracy_at(run, "dense"))
    return [sum(values) / len(values) for _, values in sorted(found.items())]


def adapts(results: Results) -> Part:
    """Experiment 2: the share that survives of `attn` and of `mlp` differs, where a uniform search has them equal."""
    gaps: dict[int, list[float]] = {}
    for run in results.runs:
        if Side("upop").holds(run) and {"attn", "mlp"} <= set(run.data["widths"]["before"]):
            shares = [sum(run.kept(kind)) / len(run.kept(kind)) for kind in ("attn", "mlp")]
            gaps.setdefault(run.seed, []).append(100 * (shares[0] - shares[1]))
    name = "upop: surviving share of attn minus that of mlp"
    if len(gaps) < LEAST:
        return Part(name, UNTESTABLE, f"n = {len(gaps)} seeds, {LEAST} needed", decides=False)
    values = [sum(v) / len(v) for _, v in sorted(gaps.items())]
    p, half_width = t_test(values)
    overall = stat(values)
    if p is None:
        return Part(name, UNTESTABLE, no_spread(overall), decides=False)
    interval = f"95 % interval {interval_text(overall, half_width)}"
    reason = f"{points_text(overall.mean)} points ({interval}, {p_text(p)}, n = {overall.n})"
    return Part(name, SUPPORTED if p < LEVEL else NOT_SUPPORTED, reason, decides=False)


def within_budget(results: Results) -> Part:
    """Experiment 7: every run with an accuracy budget ends within it, on validation and before retraining."""
    found = []
    for run in results.runs:
        budget, slim = run.config.get("max_drop"), run.accuracy("slim", "validation")
        if isinstance(budget, int | float) and slim is not None and run.method != CONTINUED:
            dense = run.accuracy("dense", "validation")
            assert dense is not None
            found.append((dense - slim, 100 * budget, run.seed))
    name = "validation drop within max_drop when the search stops"
    seeds = len({seed for *_, seed in found})
    if seeds < LEAST:
        return Part(name, UNTESTABLE, f"n = {seeds} seeds with an accuracy budget, {LEAST} needed")
    kept = sum(drop <= budget + 1e-9 for drop, budget, _ in found)
    worst = max(found, key=lambda entry: entry[0] - entry[1])
    reason = (
        f"{kept} of {len(found)} runs within; the furthest off drops {worst[0]:.2f} with {worst[1]:.2f} points allowed"
    )
    return Part(name, SUPPORTED if kept == len(found) else NOT_SUPPORTED, reason)


# ---- the questions ----


def _contrast(a: str, b: str, stage: str = "retrain", *, at_least: float = 0.0) -> Contrast:
    return Contrast(Side(a), Side(b), stage, at_least)


OFF = {"sparsity_attn": 0.0, "sparsity_mlp": 0.0}
STRONG = {"sparsity_attn": 4.8, "sparsity_mlp": 0.0}
SINE = {"schedule": "sine"}
ZSCORE = {"normalise": "zscore"}
NONE = {"normalise": "none"}
THRESHOLD = {"binarise": "threshold"}

CLAIMS = (
    Claim(
        "C1",
        "Unified pruning beats mask-based pruning at every ratio.",
        "Besides the test, the mean difference must be positive at each ratio in it.",
        (Contrast(Side("unified"), Side("mask"), every=True),),
    ),
    Claim(
        "C2",
        "Unified pruning converges at higher ratios, where mask-based pruning does not.",
        f"No t test. At a ratio of {HIGH:g} or more a method collapses if its mean retrained accuracy over at least "
        f"{LEAST} seeds is more than {COLLAPSE:g} points below dense-continued of the same seeds, or within "
        f"{CHANCE:g} points of chance. Supported: mask collapses at some ratio where unified does not, and never the "
        "other way.",
        (Contrast(Side("unified"), Side("mask"), at_least=HIGH, decides=False),),
        (collapse,),
    ),
    Claim(
        "C3",
        "Unified pruning beats magnitude pruning at the same ratio and granularity.",
        "upop against magnitude is shown beside it and does not decide.",
        (_contrast("unified", "magnitude"), Contrast(Side("upop"), Side("magnitude"), decides=False, optional=True)),
    ),
    Claim(
        "C4",
        "Progressive pruning keeps accuracy at high ratios without extensive retraining.",
        f"Before retraining, ratios of {HIGH:g} and more: progressive must beat mask, upop must beat unified, and "
        f"slimming must cost each progressive method at most {COLLAPSE:g} points of its dense model on average.",
        (_contrast("progressive", "mask", "slim", at_least=HIGH), _contrast("upop", "unified", "slim", at_least=HIGH)),
        (small_drop,),
    ),
    Claim(
        "C5",
        "Normalising the scores is needed for the unified search.",
        "upop with z-scores against none decides; unified is shown beside it.",
        (
            Contrast(Side("upop", ZSCORE), Side("upop", NONE)),
            Contrast(Side("unified", ZSCORE), Side("unified", NONE), decides=False, optional=True),
        ),
    ),
    Claim(
        "C6",
        "The sparsity loss makes pruning earlier and more effective.",
        "Only effectiveness is tested: in the progressive rule the schedule alone says when. upop decides, and is "
        "inert if accuracies and widths with and without the loss are exactly equal; mask and unified are shown "
        "beside it.",
        (
            Contrast(Side("upop"), Side("upop", OFF)),
            Contrast(Side("mask"), Side("mask", OFF), decides=False, optional=True),
            Contrast(Side("unified"), Side("unified", OFF), decides=False, optional=True),
        ),
    ),
)

EXPERIMENTS = (
    Claim(
        "E1",
        "Progressive pruning holds at high ratios.",
        f"No t test. upop collapses, in the sense of C2, at no ratio of {HIGH:g} or more.",
        (Contrast(Side("upop"), Side(CONTINUED), decides=False, optional=True),),
        (holds_up,),
    ),
    Claim(
        "E2",
        "The unified search adapts what survives by itself, and that is better than a uniform ratio per kind.",
        "upop against progressive (the same search at a uniform ratio per kind) decides; what survives is below.",
        (_contrast("upop", "progressive"),),
        (adapts,),
    ),
    Claim(
        "E3",
        "Both parts together, progressive and unified, beat each part alone and neither.",
        "All three contrasts must hold.",
        (_contrast("upop", "unified"), _contrast("upop", "progressive"), _contrast("upop", "mask")),
    ),
    Claim(
        "E4",
        "The paper's sine schedule beats every other schedule that was run.",
        "All contrasts must hold.",
        tuple(
            Contrast(Side("upop", SINE), Side("upop", {"schedule": name}), optional=True)
            for name in ("linear", "sigmoid", "exponential", "cosine", "cubic")
        ),
    ),
    Claim(
        "E5",
        "z-scores beat every other normalisation, and the sparsity loss beats none.",
        "All contrasts that were run must hold. C5 and C6 have the same question for the other methods.",
        (
            *(
                Contrast(Side("upop", ZSCORE), Side("upop", {"normalise": name}), optional=True)
                for name in ("none", "minmax", "rank")
            ),
            Contrast(Side("upop"), Side("upop", OFF), optional=True),
            Contrast(Side("upop"), Side("upop", STRONG), decides=False, optional=True),
            Contrast(Side("upop"), Side("upop", {"gradient_order": "authors"}), decides=False, optional=True),
        ),
    ),
    Claim(
        "E6",
        "Binarising by top-k beats a fixed threshold on the score.",
        "A threshold has no ratio to aim at: its runs are paired with the top-k runs that removed the same share "
        "(within 2 points), if there are any; the ratios that were reached are listed further down.",
        (
            Contrast(Side("upop"), Side("upop", THRESHOLD, ("threshold",))),
            Contrast(
                Side("upop", NONE), Side("upop", {**NONE, **THRESHOLD}, ("threshold",)), decides=False, optional=True
            ),
        ),
    ),
    Claim(
        "E7",
        "The search can decide by itself when to stop, within an accuracy budget.",
        "No t test. Every run with max_drop must drop at most that much in validation accuracy between dense and "
        "slimmed. The adaptive rate (tolerance) against the plain one at the same ratio is shown beside it.",
        (Contrast(Side("upop", {}, ("tolerance",)), Side("upop"), decides=False, optional=True),),
        (within_budget,),
    ),
)
