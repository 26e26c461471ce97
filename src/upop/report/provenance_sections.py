"""The last sections of a report: published numbers beside ours, all runs, and where every number comes from.

Under the same promises as `sections`.
"""

from collections.abc import Collection, Mapping

from upop.report.figures import dense_levels, levels_text, spread, values
from upop.report.paired import Stat, accuracy_at
from upop.report.records import CONTINUED, DENSE, Group, Results, Run, removal, show
from upop.report.references import CAVEATS, OWN, OWN_SETTING, PAPER, PUBLISHED, Published
from upop.report.sections import NOTHING, Section, Table, baseline, percent, points, ratio_name, seconds

SPLIT = {DENSE: "test", "search": "validation", "slim": "test", "retrain": "test"}
STAGES = tuple(SPLIT)


def published(results: Results) -> Section:
    rows = [
        (
            entry.what,
            f"{entry.ratio:g}" if entry.ratio else NOTHING,
            _printed(entry),
            ours(entry, results),
            "paper" if entry.source == PAPER else "earlier report",
        )
        for entry in PUBLISHED
    ]
    reached = sorted(
        {removal(g.target)[1] for g in results.groups if _is_in(g, "upop", OWN) and removal(g.target)[1] <= 1}
        - {e.ratio for e in PUBLISHED if e.source == PAPER}
    )
    for ratio in reached:
        entry = Published(PAPER, f"the paper's setting, not printed there: {OWN_SETTING}", ratio, 0.0, "%", "upop")
        rows.append((entry.what, f"{ratio:g}", NOTHING, ours(entry, results), NOTHING))
    sources = tuple(dict.fromkeys(entry.source for entry in PUBLISHED))
    columns = ("what", "ratio removed", "published", "ours, mean ± sd (n)", "source")
    table = Table(columns, tuple(rows), baseline(results))
    return Section("published", "Published numbers beside ours", (*sources, *CAVEATS), (table,), listed=True)


def _printed(entry: Published) -> str:
    if entry.unit != "%":
        return f"{points(entry.value)} points"
    dense = next(e.value for e in PUBLISHED if e.source == entry.source and e.method == DENSE)
    beside = f" ({points(entry.value - dense)} against its dense)" if entry.method != DENSE else ""
    return f"{entry.value:.1f} %{beside}"


def _is_in(group: Group, method: str, settings: Mapping[str, str], varied: Collection[str] = ()) -> bool:
    """Whether a group is of `method` in these settings, standard or not, and varies nothing but `varied`."""
    departs = {key for key, _ in group.variant}
    right = all(group.runs[0].config.get(key) == value for key, value in settings.items())
    return group.method == method and right and set(varied) <= departs <= {*settings, *varied}


def ours(entry: Published, results: Results) -> str:
    """Our number for a published one, in its terms."""
    if entry.method == DENSE:
        levels = list(dense_levels(results).values())
        return levels_text(levels[0]) if len(levels) == 1 else NOTHING
    wanted = OWN if entry.method == "upop" else {}
    wanted = wanted | ({"schedule": entry.schedule} if entry.schedule else {})
    varied = ("tolerance",) if entry.adaptive else ()
    found = []
    for group in results.groups:
        if _is_in(group, entry.method, wanted, varied):
            found += [(group, text) for text in [_in_terms(entry, group, results)] if text]
    at = [(group, text) for group, text in found if abs(removal(group.target)[1] - entry.ratio) < 1e-9]
    return "; ".join(f"{text} ({group.target.partition('=')[0]})" for group, text in at) or NOTHING


def _in_terms(entry: Published, group: Group, results: Results) -> str:
    def value(run: Run) -> float | None:
        own = run.accuracy("retrain")
        if own is None or entry.minus is None:
            return own
        other = run.accuracy(DENSE) if entry.minus == DENSE else _other(entry.minus, run, results)
        return None if other is None else own - other

    found = values(group, value)
    if found is None:
        return ""
    if entry.minus:
        return _difference(found)
    against = values(
        group, lambda run: None if (own := run.accuracy("retrain")) is None else own - accuracy_at(run, DENSE)
    )
    return f"{spread(found)}, {points(against.mean) if against else NOTHING} against its dense"


def _difference(value: Stat) -> str:
    sd = f" ± {value.sd:.2f}" if value.sd is not None else ""
    return f"{points(value.mean)}{sd} points ({value.n})"


def _other(method: str, run: Run, results: Results) -> float | None:
    same = (
        other for other in results.runs if (other.method, other.target, other.seed) == (method, run.target, run.seed)
    )
    return next((other.accuracy("retrain") for other in same if not other.variant), None)


def all_runs(results: Results) -> Section:
    columns = (
        "settings",
        "ratio",
        "n",
        "dense",
        "masked (validation)",
        "slimmed",
        "retrained",
        "removed of prunable, %",
    )
    rows, details = [], []
    for group in results.groups:
        stages = [percent(values(group, lambda run, s=stage: run.accuracy(s, SPLIT[s]))) for stage in STAGES]  # type: ignore[misc]
        removed = values(group, _removed)
        rows.append((group.name, ratio_name(group.target), str(len(group.runs)), *stages, percent(removed)))
        details.append(_per_seed(group.runs))
    for run in results.dense:
        rows.append(
            (
                f"{DENSE} ({run.label})",
                NOTHING,
                "1",
                percent(values(Group(DENSE, "", (), (run,)), _dense)),
                *[NOTHING] * 4,
            )
        )
        details.append(_per_seed((run,)))
    caption = f"Test accuracy in per cent, mean ± standard deviation (n). {baseline(results)}"
    return Section("runs", "All runs", (), (Table(columns, tuple(rows), caption, tuple(details)),))


def _dense(run: Run) -> float | None:
    return run.accuracy(DENSE)


def _removed(run: Run) -> float | None:
    return None if run.method in (CONTINUED, DENSE) else 100 * float(run.data["ratio"]["prunable"])


def _per_seed(runs: tuple[Run, ...]) -> Table:
    columns = ("run", "seed", *(f"{stage}: validation / test" for stage in STAGES), "minutes", "warnings")
    rows = []
    for run in runs:
        pairs = [(run.accuracy(stage, "validation"), run.accuracy(stage)) for stage in STAGES]
        cells = [NOTHING if v is None else f"{v:.2f} / {NOTHING if t is None else f'{t:.2f}'}" for v, t in pairs]
        whole, stages = seconds(run)
        minutes = f"{whole / 60:.1f}" if whole and whole > stages - 0.1 else NOTHING
        said = "; ".join(map(str, run.data.get("warnings") or ())) or NOTHING
        rows.append((run.label, str(run.seed), *cells, minutes, said))
    return Table(columns, tuple(rows))


def origin(results: Results) -> Section:
    runs = sorted((*results.runs, *results.dense), key=lambda run: run.label)
    rows = tuple(
        (run.label, run.data["command"], str(run.data.get("commit") or NOTHING), _machine(run)) for run in runs
    )
    versions: dict[str, list[str]] = {}
    for run in runs:
        text = ", ".join(f"{name} {number}" for name, number in sorted(run.data["versions"].items()))
        versions.setdefault(text, []).append(run.label)
    lead = [f"Versions ({len(labels)} of {len(runs)} runs): {text}." for text, labels in sorted(versions.items())]
    command = results.study.get("command")
    again = f"Again from scratch: {command}; then " if command else "Again: each run's command below; then "
    lead.append(again + "upop report on the folder of results, which gives this page byte for byte.")
    base = results.study.get("base") or {}
    shared = tuple((key, show(base[key])) for key in sorted(base))
    tables = [Table(("run", "command", "commit", "hardware"), rows, "One line per run.")]
    if shared:
        tables.append(Table(("setting", "value"), shared, "Settings that all runs of the study share."))
    return Section("origin", "How every number was obtained", tuple(lead), tuple(tables))


def _machine(run: Run) -> str:
    hardware = run.data["hardware"]
    return ", ".join(f"{key} {show(hardware[key])}" for key in sorted(hardware) if hardware[key] is not None)
