"""The comparison's report: results in a folder -> one page of Markdown. A pure function of what is on disk.

Must not need torch or Torch-Pruning, so that a report is made wherever the files are.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.report.paired import LEAST, LEVEL, Stat, rectangle, stat, t_test
from upop.report.verdicts import p_text

OURS = ("upop", "upop-one-shot")  # settings of upop; all others are peers
Result = Mapping[str, Any]
Key = tuple[str, float, int]  # setting, ratio, seed

CURRENCY = (
    "Ratios are of ALL parameters of the dense model, embedding and head included, met within 1 %. Torch-Pruning "
    "counts channels, so its `pruning_ratio` is bisected until the parameters are right (`tries`)."
)
FAIRNESS = (
    "Equal for all: dense model, data and split, batch size, optimizer, augmentation, number of training "
    "epochs in all, and the way to a learning rate for retraining: the best on validation of the same few, at 80 % "
    "with another seed. upop searches for a part of the epochs and retrains for the rest; Torch-Pruning does not "
    "train while it prunes and gets ALL epochs for retraining, and so does upop-one-shot (ranked four times on 16 "
    "batches without training, least-squares compensation). The learning rate of upop's search was found on the same "
    "dense model before."
)
LIMITS = (
    "One model, one data set and short runs. The spread is over seeds of search and retraining from one dense model. "
    "Magnitude pruning has no randomness of its own: all its seeds retrain the same pruned model. Test was read once "
    "a run. Latency: PyTorch eager, float32, dense and pruned in turns in one process. Pruning alone is for "
    "Torch-Pruning its gradients and all tries, for upop what search steps take longer than ordinary ones; CPU "
    "seconds are of all threads, and on one thread what an idle core takes. Peak memory is what the process holds "
    "beyond what it held before pruning; a search trains meanwhile, Torch-Pruning does not."
)


@dataclass(frozen=True)
class Results:
    """What a folder holds: runs by setting, ratio and seed; targets that were not met apart; choices by setting."""

    runs: Mapping[Key, Result]
    unreachable: Mapping[Key, Result]
    choices: Mapping[str, Result]
    dense: Result

    @property
    def settings(self) -> list[str]:
        """upop's first, the others as they come in the alphabet."""
        names = {setting for setting, _, _ in (*self.runs, *self.unreachable)}
        return sorted(names, key=lambda name: (name not in OURS, name))

    @property
    def ours(self) -> list[str]:
        """upop's settings among them."""
        return [name for name in self.settings if name in OURS]

    @property
    def ratios(self) -> list[float]:
        return sorted({ratio for _, ratio, _ in (*self.runs, *self.unreachable)})

    def of(self, setting: str, ratio: float) -> dict[int, Result]:
        """Seed -> run."""
        return {seed: run for (s, r, seed), run in sorted(self.runs.items()) if (s, r) == (setting, ratio)}


def read(folder: Path) -> Results:
    """All whole results in `folder`; files that are broken or of something else are left out."""
    runs, unreachable, choices, dense = {}, {}, {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if path.stem == "dense":
            dense = found
        elif "validation" in found:
            choices[found["spec"]["setting"]] = found
        elif "spec" in found:
            spec = found["spec"]
            kept = runs if found["status"] == "complete" else unreachable
            kept[spec["setting"], float(spec["ratio"]), int(spec["seed"])] = found
    return Results(runs, unreachable, choices, dense)


@dataclass(frozen=True)
class Difference:
    """Test accuracy of one of ours less a peer's, in points, over the seeds that both have; p of the paired t test."""

    ours: str
    setting: str
    where: str
    points: Stat
    p: float | None  # None below LEAST pairs, and where all of them differ by the same

    @property
    def verdict(self) -> str:
        """`ahead`, `behind`, `not told apart`, or that the pairs cannot say."""
        if self.p is None:
            return f"not judged (n = {self.points.n})"
        return "not told apart" if self.p >= LEVEL else "ahead" if self.points.mean > 0 else "behind"


def differences(results: Results) -> list[Difference]:
    """Each of ours against every peer, at each ratio and over all ratios that enough seeds have."""
    peers = [setting for setting in results.settings if setting not in OURS]
    return [d for ours in results.ours for setting in peers for d in _compared(results, ours, setting)]


def _compared(results: Results, ours: str, setting: str) -> Iterator[Difference]:
    cells = _cells(results, ours, setting)
    for ratio in results.ratios:
        if values := [points for (_, target), points in cells.items() if target == f"params={ratio:g}"]:
            yield _difference(ours, setting, _percent(ratio), values)
    targets, seeds = rectangle(cells)
    if len(targets) > 1:
        means = [statistics.fmean(cells[seed, target] for target in targets) for seed in seeds]
        yield _difference(ours, setting, f"over {len(targets)} ratios", means)


def _cells(results: Results, ours: str, setting: str) -> dict[tuple[int, str], float]:
    """(seed, target) -> test accuracy of `ours` less the setting's, in points."""
    cells = {}
    for ratio in results.ratios:
        mine, theirs = results.of(ours, ratio), results.of(setting, ratio)
        for seed in sorted(mine.keys() & theirs.keys()):
            cells[seed, f"params={ratio:g}"] = _test(mine[seed]) - _test(theirs[seed])
    return cells


def _difference(ours: str, setting: str, where: str, values: Sequence[float]) -> Difference:
    return Difference(ours, setting, where, stat(values), t_test(values)[0] if len(values) >= LEAST else None)


def _test(run: Result) -> float:
    return 100 * float(run["accuracy"]["retrained"]["test"])


def report(results: Results) -> str:
    """The page."""
    found = differences(results)
    parts = ["# upop against Torch-Pruning", *_about(results)]
    for ours in results.ours or OURS[:1]:
        parts += [f"## Where {ours} is not ahead", *_in_words(ours, [d for d in found if d.ours == ours])]
    for ratio in results.ratios:
        parts += [f"## {_percent(ratio)} of all parameters removed", _accuracy_table(results, found, ratio)]
        parts += [_cost_table(results, ratio)]
    parts += ["## Over all ratios", _overall_table(found), "## Learning rates", _rates_table(results)]
    return "\n\n".join([*parts, "## Limits", LIMITS, _multiple(found)]) + "\n"


def _search_share(every: Iterable[Result]) -> str:
    """What part of the epochs searches, where a run of upop's search is among `every`."""
    shares = sorted({run["spec"].get("search_share", 0.5) for run in every if run["spec"]["setting"] == "upop"})
    return f", upop's search gets {', '.join(f'{share:g}' for share in shares)} of them" if shares else ""


def _about(results: Results) -> list[str]:
    every = [*results.runs.values(), *results.unreachable.values()]
    if not every:
        return ["There are no results yet."]

    def all_of(read_one: Callable[[Result], Any]) -> str:
        return ", ".join(sorted({str(read_one(run)) for run in every}))

    versions = sorted({f"{name} {x}" for run in every for name, x in run["versions"].items() if name != "numpy"})
    lines = [
        f"- data: {all_of(lambda r: r['spec']['data'])}"
        + "".join(f", {n} images of each split only" for n in {r["spec"]["subset"] for r in every} if n),
        f"- training epochs in all: {all_of(lambda r: r['spec']['epochs'])}{_search_share(every)}; batch size "
        f"{all_of(lambda r: r['spec']['batch_size'])}, optimizer {all_of(lambda r: r['spec']['optimizer'])}",
        f"- runs: {len(results.runs)}, targets not met: {len(results.unreachable)}",
        f"- hardware: {all_of(lambda r: r['hardware']['device'])}, {all_of(lambda r: r['spec']['threads'])} thread(s) "
        "a run",
        f"- versions: {', '.join(versions)}",
        f"- upop's code: {all_of(lambda r: r['code'])}, commit {all_of(lambda r: r['commit'])}",
    ]
    if results.dense:
        accuracy = results.dense["accuracy"]
        lines.insert(
            0,
            f"- dense model: {100 * accuracy['test']:.2f} % test, {100 * accuracy['validation']:.2f} % validation, "
            f"{results.dense['params']:,} parameters, {results.dense['macs'] / 1e6:.1f} M MACs",
        )
    return ["\n".join(lines), CURRENCY, FAIRNESS]


def _in_words(ours: str, found: Sequence[Difference]) -> list[str]:
    """A sentence for every place where `ours` is not ahead by more than the spread."""
    if not found:
        return ["Nothing to compare yet."]
    lines = []
    for verdict, words in (("behind", "is BEHIND"), ("not told apart", "cannot be told apart from")):
        lines += [f"- {ours} {words} {d.setting}, {d.where}: {_judged(d)}." for d in found if d.verdict == verdict]
    lines += [f"- not judged: {d.setting}, {d.where}: {_judged(d)}." for d in found if d.p is None]
    ahead = sum(d.verdict == "ahead" for d in found)
    summary = f"{ours} is ahead beyond the spread in {ahead} of {len(found)} comparisons"
    return [f"{summary}; the others:" if lines else f"{summary}.", *(["\n".join(lines)] if lines else [])]


def _judged(d: Difference) -> str:
    spread = "" if d.points.sd is None else f" ± {d.points.sd:.2f}"
    test = "" if d.p is None else f", {p_text(d.p)}"
    return f"{_signed(d.points.mean)}{spread} points (n = {d.points.n}{test})"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _accuracy_table(results: Results, found: Sequence[Difference], ratio: float) -> str:
    head = ["setting", "n", "removed %", "validation, pruned", "retrained", "test"]
    for ours in results.ours:
        head += [f"{ours} − it, points", f"{ours} is"]
    here = {(d.ours, d.setting): d for d in found if d.where == _percent(ratio)}
    return _table(head, [_accuracy_row(results, setting, ratio, here) for setting in results.settings])


def _accuracy_row(
    results: Results, setting: str, ratio: float, here: Mapping[tuple[str, str], Difference]
) -> list[str]:
    runs = list(results.of(setting, ratio).values())
    if not runs:
        return [setting, *_missing(results, setting, ratio)]
    row = [
        setting,
        str(len(runs)),
        _pm([100 * run["removed"] for run in runs]),
        _pm([100 * run["accuracy"]["pruned"]["validation"] for run in runs]),
        _pm([100 * run["accuracy"]["retrained"]["validation"] for run in runs]),
        _pm([_test(run) for run in runs]),
    ]
    for ours in results.ours:
        d = here.get((ours, setting))
        row += [_judged(d) if d else "", d.verdict if d else ""]
    return row


def _missing(results: Results, setting: str, ratio: float) -> list[str]:
    near = [run["removed"] for (s, r, _), run in results.unreachable.items() if (s, r) == (setting, ratio)]
    return [
        "0",
        f"target not met, nearest {100 * near[0]:.1f}" if near else "no runs",
        *[""] * (3 + 2 * len(results.ours)),
    ]


def _cost_table(results: Results, ratio: float) -> str:
    head = ["setting", "M parameters", "M MACs", "speed-up, batch 1", "batch 64", "tries", "pruning alone, CPU s"]
    head += ["pruning and training, CPU s", "peak MiB of pruning"]
    rows = []
    for setting in results.settings:
        if runs := list(results.of(setting, ratio).values()):
            row = [_pm([run[name]["after"] / 1e6 for run in runs], digits=3) for name in ("params", "macs")]
            row += [_pm([_speed_up(run, batch) for run in runs]) for batch in ("1", "64")]
            row += [_pm([run.get("tries") for run in runs], digits=0)]
            seconds = [run["cpu_seconds"] for run in runs]
            row += [_pm([s["pruning"] for s in seconds], digits=1)]
            row += [_pm([s["pruning"] + s["training"] for s in seconds], digits=0)]
            rows.append([setting, *row, _pm([_memory(run) for run in runs], digits=0)])
    return _table(head, rows)


def _speed_up(run: Result, batch: str) -> float:
    pair = run["latency"][batch]
    return float(pair["dense"]["median_ms"] / pair["pruned"]["median_ms"])


def _memory(run: Result) -> float | None:
    memory = run["memory"]
    known = memory["before_mib"] is not None and memory["peak_mib"] is not None
    return memory["peak_mib"] - memory["before_mib"] if known else None


def _overall_table(found: Sequence[Difference]) -> str:
    rows = [[d.ours, d.setting, d.where, _judged(d), d.verdict] for d in found if d.where.startswith("over")]
    note = "Each seed's differences are averaged over the ratios, and the averages tested.\n\n"
    return note + _table(["ours", "setting", "where", "ours − it, test, points", "ours is"], rows)


def _rates_table(results: Results) -> str:
    rows = []
    for setting, choice in results.choices.items():
        tried = ", ".join(f"{rate}: {100 * accuracy:.2f}" for rate, accuracy in choice["validation"].items())
        tried = tried or "it was the only one"
        rows.append([setting, f"{choice['rate']:g}", tried])
    return _table(["setting", "chosen", "validation after retraining, % (80 %, a seed of its own)"], rows)


def _multiple(found: Sequence[Difference]) -> str:
    tests = sum(d.p is not None for d in found)
    return (
        f"{tests} paired t tests on this page, none corrected for their number: at p < .05 about one in twenty "
        "comparisons without any effect looks like one. With three seeds the tests are rough."
    )


def _pm(values: Iterable[float | None], *, digits: int = 2) -> str:
    """Mean ± standard deviation of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    found = stat(known)
    return f"{found.mean:.{digits}f}" + ("" if found.sd is None else f" ± {found.sd:.{digits}f}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
