"""The sections of a report: text, tables and figures, the same for the page and for its Markdown twin.

Pure functions over results; must not read files or know HTML. Cells are plain text: templates escape them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upop.report import figures, progress_figures, verdicts
from upop.report.figures import Figure, dense_levels, levels_text, spread, values
from upop.report.paired import Row, Stat
from upop.report.records import CONTINUED, ONE_SHOT, OPEN, Group, Results, Run, in_words, show

NOTHING = "–"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Table:
    """`details`: per row, a table to unfold below it, or nothing."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    details: tuple["Table", ...] = ()
    prose: bool = False  # cells of text: stacked on a phone


@dataclass(frozen=True)
class Card:
    """A judged claim."""

    id: str
    text: str
    verdict: str
    reason: str
    rule: str
    parts: tuple[tuple[verdicts.Part, Table | None], ...]


@dataclass(frozen=True)
class Section:
    """`empty`: the one line that stands instead of content where there is none."""

    id: str
    title: str
    lead: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    cards: tuple[Card, ...] = ()
    empty: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    listed: bool = False  # the lead as a list

    @property
    def is_empty(self) -> bool:
        return not (any(table.rows for table in self.tables) or any(f.choices for f in self.figures) or self.cards)


def percent(value: Stat | None) -> str:
    """`81.23 ± 0.45 (3)`: mean, standard deviation, n."""
    if value is None:
        return NOTHING
    sd = f" ± {value.sd:.2f}" if value.sd is not None else ""
    return f"{value.mean:.2f}{sd} ({value.n})".replace("-", MINUS)


def points(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.2f}".replace("-", MINUS)


def ratio_name(target: str) -> str:
    return "open-ended" if target == OPEN else target or NOTHING


def baseline(results: Results) -> str:
    """What every table is to be read against."""
    continued = [group for group in results.groups if group.method == CONTINUED]
    controls = {group.name: values(group, lambda run: run.accuracy("last")) for group in continued}
    levels = dense_levels(results)
    if len(levels) <= 1:
        control = next(iter(controls.values()), None)
        against = spread(control) if control else "not run"
        return f"Dense {levels_text(*levels.values())}; {CONTINUED} {against}."
    each = [f"dense{in_words(place)}: {levels_text(found)}" for place, found in levels.items()]
    each += [f"{name}: {spread(level)}" for name, level in controls.items() if level]
    return "D" + "; ".join(each)[1:] + "."


# ---- what was run ----


def overview(results: Results) -> Section:
    runs = (*results.runs, *results.dense)
    states = [state.partition(":")[0] for state in results.absent.values()]
    facts = {
        "model": _every(runs, lambda run: run.config.get("model")),
        "data": _every(runs, _data),
        "seeds": _every(results.runs, lambda run: run.seed),
        "epochs of search / retraining": _every(
            results.runs,
            lambda run: f"{show(run.config.get('epochs_search'))} / {show(run.config.get('epochs_retrain'))}",
        ),
        "hardware": str(results.study.get("hardware") or _every(runs, lambda run: run.data["hardware"].get("device"))),
        "wall-clock": str(
            results.study.get("wall_clock")
            or f"{sum(max(seconds(run)) for run in runs) / 3600:.2f} hours, runs added up"
        ),
        "runs": f"{len(runs)} done, {states.count('failed')} failed, {len(states) - states.count('failed')} missing",
    }
    absent = tuple((label, state) for label, state in results.absent.items())
    tables = (Table(("run", "state"), absent, "Not here, so in no number below."),) if absent else ()
    expected = str(results.study.get("expected") or "")
    lead = tuple(
        filter(None, (str(results.study.get("about") or ""), expected and f"Expected of a repetition: {expected}"))
    )
    return Section("overview", "What was run", lead, tables, facts=facts)


def _every(runs: Sequence[Run], read: Callable[[Run], Any]) -> str:
    found = {read(run): None for run in sorted(runs, key=lambda run: (run.seed, run.label))}
    return ", ".join(show(value) for value in found if value not in (None, "")) or NOTHING


def _data(run: Run) -> str:
    data = run.data.get("data") or {}
    images = ", ".join(f"{count:,} {split}" for split, count in (data.get("images") or {}).items())
    return f"{data.get('name', run.config.get('data'))} ({images} images)" if images else str(run.config.get("data"))


def seconds(run: Run) -> tuple[float, float]:
    """What a run took by its own account, and its stages together: more where older code had resumed it."""
    parts = dict(run.data.get("seconds") or {})
    return float(parts.pop("all", 0.0)), float(sum(parts.values()))


def limits(results: Results, judged: Sequence[verdicts.Verdict]) -> Section:
    seeds = len({run.seed for run in results.runs or results.dense})
    places: set[object] = {group.place for group in results.groups}
    places = places or {(run.config.get("model"), _data(run)) for run in results.dense}
    over_ratios, at_one = _tests(judged)
    control = any(run.method == CONTINUED for run in results.runs)
    lead = [
        "Throughout: mean ± standard deviation over seeds (n); accuracy in per cent, differences in points.",
        f"{seeds} seed{'s' if seeds != 1 else ''}: standard deviations and tests over so few are rough; the smallest "
        "difference that could have been told apart stands in every verdict of 'no difference'.",
        "Seeds vary the search and the retraining; where all runs start from one dense model, its own luck is in no "
        "standard deviation.",
        "One model and one data set: nothing here says how far the answers carry to larger ones."
        if len(places) <= 1
        else "Several models or data sets: compare rows of the same one only, as the claims do, with the commonest.",
    ]
    if over_ratios or at_one:
        lead.append(
            f"{over_ratios} different paired t tests of accuracy on this page over all ratios of a comparison, and "
            f"{at_one} more at single ratios, none corrected for their number: at p < .05 about one in twenty "
            "comparisons without any effect looks like one."
        )
    if any(run.method == ONE_SHOT for run in results.runs):
        lead.append(
            f"No claim is about {ONE_SHOT}: upop with epochs_search = 0, which ranks units on a few batches and cuts "
            "them at once. Where this page says upop, it searched."
        )
    if not control:
        lead.append("No dense-continued control: a gain over the dense model may be the extra training alone.")
    return Section("limits", "Limits", (*lead, *results.notes), listed=True)


def _tests(judged: Sequence[verdicts.Verdict]) -> tuple[int, int]:
    """How many different paired tests the claims have over their ratios, and how many more their tables have."""
    over_ratios, at_one = set(), set()
    for part in (part for v in judged for part in v.parts):
        c, contrast = part.comparison, part.contrast
        if c is None or contrast is None or c.identical:  # equal to the last unit: nothing was tested
            continue
        sides = (contrast.a.name, contrast.b.name, contrast.stage)
        if c.p is not None:
            over_ratios.add((*sides, c.targets))
        at_one |= {(*sides, (row.target,)) for row in c.rows if row.p is not None}
    return len(over_ratios), len(at_one - over_ratios)


# ---- verdicts ----


def judgements(id_: str, title: str, judged: Sequence[verdicts.Verdict], results: Results) -> Section:
    rows = tuple((v.claim.id, v.claim.text, v.verdict, v.reason) for v in judged)
    table = Table(("", "claim", "verdict", "because"), rows, baseline(results), prose=True)
    cards = tuple(
        Card(
            v.claim.id,
            v.claim.text,
            v.verdict,
            v.reason,
            v.claim.rule,
            tuple((part, comparison_table(part, results)) for part in v.parts),
        )
        for v in judged
    )
    return Section(id_, title, (verdicts.RULE,) if id_ == "claims" else (), (table,), cards=cards)


def comparison_table(part: verdicts.Part, results: Results) -> Table | None:
    c, contrast = part.comparison, part.contrast
    if c is None or contrast is None or not c.rows:
        return None
    rows = [_row(row) for row in c.rows]
    if c.overall and len(c.rows) > 1:
        tested = "all" if len(c.targets) == len(c.rows) else ", ".join(c.targets)
        rows.append((f"in the test: {tested}", "", "", _spread(c.overall), str(c.overall.n), _p(c.p)))
    columns = ("ratio", f"A: {contrast.a.name}", f"B: {contrast.b.name}", "A minus B, points", "n", "p")
    return Table(columns, tuple(rows), baseline(results))


def _row(row: Row) -> tuple[str, ...]:
    return row.target, percent(row.a), percent(row.b), _spread(row.difference), str(row.difference.n), _p(row.p)


def _spread(difference: Stat) -> str:
    return points(difference.mean) + (f" ± {difference.sd:.2f}" if difference.sd is not None else "")


def _p(p: float | None) -> str:
    return NOTHING if p is None else verdicts.p_text(p).removeprefix("p ").removeprefix("= ")


# ---- the trade-off ----


def tradeoff(results: Results) -> Section:
    groups = [group for group in figures.standard(results) if group.target]
    batches = sorted({b for g in groups for run in g.runs for b in run.data["latency"]}, key=lambda b: (len(b), b))
    timed = tuple(f"ms, batch {batch} (speed-up)" for batch in batches)
    columns = ("method", "ratio", "removed: prunable / all, %", "M parameters", "M MACs", *timed)
    rows = tuple((*_size(group), *(_speed(group, b) for b in batches), _last(group)) for group in groups)
    table = Table((*columns, "test accuracy retrained, %"), rows, baseline(results) + " " + _befores(groups))
    return Section(
        "tradeoff",
        "Accuracy against size and speed",
        ("Latency: dense and pruned timed in turns in one process; medians, averaged over seeds.",),
        (table,),
        (figures.tradeoff(results),),
        empty="No pruned runs in their method's standard settings.",
    )


def _size(group: Group) -> tuple[str, ...]:
    def mean(read: Callable[[Run], float]) -> float:
        return sum(read(run) for run in group.runs) / len(group.runs)

    removed = [100 * mean(lambda run, key=key: run.data["ratio"][key]) for key in ("prunable", "params")]  # type: ignore[misc]
    sizes = [mean(lambda run, key=key: run.data[key]["after"] / 1e6) for key in ("params", "macs")]  # type: ignore[misc]
    first = (group.name, ratio_name(group.target), f"{removed[0]:.2f} / {removed[1]:.2f}")
    return (*first, *(f"{size:.2f}" for size in sizes))


def _speed(group: Group, batch: str) -> str:
    sides = [run.data["latency"][batch] for run in group.runs if batch in run.data["latency"]]
    if not sides:
        return NOTHING
    before, after = (sum(side[name]["median_ms"] for side in sides) / len(sides) for name in ("before", "after"))
    return f"{after:.2f} ({before / after:.2f}x)"


def _last(group: Group) -> str:
    return percent(values(group, lambda run: run.accuracy("retrain")))


def _befores(groups: Sequence[Group]) -> str:
    sizes = {(run.data["params"]["before"], run.data["macs"]["before"]) for group in groups for run in group.runs}
    return "; ".join(f"Dense: {p / 1e6:.2f} M parameters, {m / 1e6:.2f} M MACs." for p, m in sorted(sizes))


# ---- what survives ----


def survivors(results: Results) -> Section:
    groups = [group for group in results.groups if group.target]
    kinds = sorted({kind for group in groups for run in group.runs for kind in run.data["widths"]["before"]})
    rows = tuple(
        (group.name, ratio_name(group.target), *_kept(group, kinds), str(len(group.runs))) for group in groups
    )
    columns = ("method", "ratio", *(f"{kind}: mean (layers), %" for kind in kinds), "n")
    return Section(
        "survivors",
        "What survives, per layer and kind",
        ("Surviving share of the units: head dims of attention, hidden neurons of the MLPs; mean over seeds.",),
        (Table(columns, rows, baseline(results)),),
        (figures.survivors(results),),
        empty="No pruned runs.",
    )


def _kept(group: Group, kinds: Sequence[str]) -> list[str]:
    cells = []
    for kind in kinds:
        layers = figures.mean_kept(group, kind)
        text = " ".join(f"{share:.0f}" for share in layers)
        cells.append(f"{sum(layers) / len(layers):.2f} ({text})" if layers else NOTHING)
    return cells


# ---- how it goes ----


def trajectories(results: Results) -> Section:
    return Section(
        "trajectories",
        "Masks during the search",
        (),
        (),
        (progress_figures.trajectories(results),),
        empty="No run recorded its masks over the search.",
    )


def schedules(results: Results) -> Section:
    rows = tuple(
        (name, target, *_stages(group), str(len(group.runs)))
        for target, groups in progress_figures.by_schedule(results).items()
        for name, group in groups
    )
    columns = ("schedule", "ratio", "slimmed, %", "retrained, %", "n")
    lead = () if rows else ("No ratio was run with two schedules or more: only the formulas are shown.",)
    shown = (progress_figures.schedule_curves(), progress_figures.schedule_accuracy(results))
    return Section("schedules", "Schedules", lead, (Table(columns, rows, baseline(results)),), shown)


def _stages(group: Group) -> list[str]:
    return [percent(values(group, lambda run, s=stage: run.accuracy(s))) for stage in ("slim", "retrain")]  # type: ignore[misc]


def slimming(results: Results) -> Section:
    groups = [group for group in results.groups if group.target]
    rows = tuple((group.name, ratio_name(group.target), *_gap(group)) for group in groups)
    columns = (
        "method",
        "ratio",
        "masked, %",
        "slimmed, %",
        "slimmed minus masked, points",
        "largest logit difference",
    )
    return Section(
        "slimming",
        "The gap: before and after slimming",
        (
            "Validation accuracy. Masked: at the end of the search, with soft masks for mask and unified, and still "
            "unpruned for others that cut once. The logit difference is between that model and the slimmed one.",
        ),
        (Table(columns, rows, baseline(results)),),
        (progress_figures.slimming(results),),
        empty="No pruned runs.",
    )


def _gap(group: Group) -> list[str]:
    split = "validation"
    pairs = [[run.accuracy(stage, split) for stage in ("search", "slim")] for run in group.runs]
    stages = [values(group, lambda run, s=stage: run.accuracy(s, split)) for stage in ("search", "slim")]  # type: ignore[misc]
    steps = [slim - masked for masked, slim in pairs if masked is not None and slim is not None]
    gaps = [float(run.data["gap"]) for run in group.runs if run.data["gap"] is not None]
    step = points(sum(steps) / len(steps)) if steps else NOTHING
    return [*map(percent, stages), step, f"{max(gaps):.1e}" if gaps else NOTHING]


def stopping(results: Results) -> Section:
    rows = []
    for group in results.groups:
        if group.target == OPEN or {key for key, _ in group.variant} & {"tolerance", "max_drop", "threshold"}:
            removed = values(group, lambda run: 100 * run.data["ratio"]["prunable"])
            drop = values(group, lambda run: _validation_drop(run))
            rows.append((group.name, ratio_name(group.target), percent(removed), percent(drop), _last(group)))
    columns = (
        "settings",
        "ratio",
        "reached, % of prunable",
        "validation: slimmed minus dense, points",
        "retrained, %",
    )
    return Section(
        "stopping",
        "Open-ended searches and thresholds",
        ("Searches that decide for themselves how far to go; decided on validation, reported on test.",),
        (Table(columns, tuple(rows), baseline(results)),),
        (progress_figures.stopping(results),),
        empty="No open-ended, adaptive or threshold runs.",
    )


def _validation_drop(run: Run) -> float | None:
    slim, dense = run.accuracy("slim", "validation"), run.accuracy("dense", "validation")
    return None if slim is None or dense is None else slim - dense
