"""README's table: accuracy at 50, 80 and 90 % of the parameters removed, upop's, other tools' and published.

Ours and theirs start from one dense model and are read from the results that are checked in.

python benchmarks/overview.py           prints it; a test holds README against it
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.report.page import load_results
from upop.report.references import PAPER, PUBLISHED, REPORT

RESULTS = Path(__file__).parents[1] / "results"
RATIOS = (0.5, 0.8, 0.9)
STUDIES = ("recipe",)
PEERS = ("peers-6epochs", "peers")
SCRATCH = "from-scratch"
# What a row says; rates go with the optimizer.
SHOWN = {
    "epochs_search",
    "epochs_retrain",
    "optimizer",
    "lr",
    "lr_search",
    "lr_retrain",
    "lr_mask",
    "compensate",
    "normalise",
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Row:
    """One line: what it is, and its test accuracies in per cent by share of parameters removed."""

    what: str
    epochs: str
    optimizer: str
    found: dict[float, list[float]]
    source: str


def rows() -> Iterator[Row]:
    """All rows, source by source."""
    for found in (*map(_study, STUDIES), *map(_peers, PEERS), _scratch()):
        # What removes nothing first, then by what is left of the accuracy where most is removed.
        yield from sorted(found, key=lambda row: (min(row.found) > 0, -statistics.fmean(row.found[max(row.found)])))


def _study(name: str) -> Iterator[Row]:
    found: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for run in load_results(RESULTS / name).runs:
        c = run.config
        search, retrain = c["epochs_search"], c["epochs_retrain"]
        what = "upop, search" if search else "upop, one-shot"
        epochs = f"{search:g} + {retrain:g}"
        if run.method == "dense-continued":
            what, epochs = "the dense model trained on", f"{search + retrain:g}"
        ratio = 0.0 if run.method == "dense-continued" else float(run.target.partition("=")[2])
        accuracy = run.accuracy("last")
        assert accuracy is not None
        assert not run.variant or set(dict(run.variant)) <= SHOWN, f"{run.label}: a row of its own is needed"
        found.setdefault((what, epochs, OPTIMIZERS[c["optimizer"]]), {}).setdefault(ratio, []).append(accuracy)
    for (what, epochs, optimizer), values in found.items():
        yield Row(what, epochs, optimizer, values, name)


def _peers(name: str) -> Iterator[Row]:
    found: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for path in sorted((RESULTS / name).glob("*_s[0-9].json")):
        data = json.loads(path.read_text())
        spec = data["spec"]
        if data["status"] != "complete":  # a target that was not met
            continue
        what = spec["setting"].replace("upop-one-shot", "upop, one-shot")
        what = "upop, search" if what == "upop" else what
        what = what if what.startswith("upop") or spec["how"] is None else f"Torch-Pruning, {what}"
        accuracy = 100 * data["accuracy"]["retrained"]["test"]
        key = (what, _share(what, spec), OPTIMIZERS[spec["optimizer"]])
        found.setdefault(key, {}).setdefault(spec["ratio"], []).append(accuracy)
    for (what, epochs, optimizer), values in found.items():
        yield Row(what, epochs, optimizer, {ratio: values[ratio] for ratio in RATIOS if ratio in values}, name)


def _share(what: str, spec: dict[str, Any]) -> str:
    """Epochs of search and of retraining."""
    search = spec["epochs"] * spec.get("search_share", 0.5) if what == "upop, search" else 0
    return f"{search:g} + {spec['epochs'] - search:g}"


def _scratch() -> Iterator[Row]:
    paths = sorted((RESULTS / SCRATCH).glob("*.json"))
    assert paths, f"no results in {SCRATCH}"
    for path in paths:
        data = json.loads(path.read_text())
        dense = json.loads((RESULTS / "claims/dense.json").read_text())["params"]["after"]
        ratio = min(RATIOS, key=lambda ratio: abs(ratio - 1 + data["params"]["after"] / dense))
        epochs = f"{data['config']['epochs_dense']:g} from scratch"
        accuracy = 100 * data["accuracy"]["dense"]["test"]
        yield Row(
            "a dense model of that size", epochs, OPTIMIZERS[data["config"]["optimizer"]], {ratio: [accuracy]}, SCRATCH
        )


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"


def table() -> str:
    """Markdown."""
    lines = ["| | epochs | | 50 % removed | 80 % | 90 % | runs |", "|---" * 7 + "|"]
    for row in rows():
        cells = [_cell(row.found.get(ratio, [])) for ratio in RATIOS]
        if 0.0 in row.found:
            cells = [f"{_cell(row.found[0.0])}, nothing removed", "", ""]
        link = f"[{row.source}](results/{row.source})"
        lines.append(f"| {row.what} | {row.epochs} | {row.optimizer} | {' | '.join(cells)} | {link} |")
    paper = {e.ratio: e.value for e in PUBLISHED if e.source == PAPER and e.method in ("dense", "upop")}
    lines.append(
        f"| the paper: DeiT-Small on ImageNet, {paper[0.0]} dense | 60 + 300 | AdamW | {paper[0.5]} | | "
        "| [Shi et al.](https://arxiv.org/abs/2301.13741) |"
    )
    drops = {e.ratio: e.value for e in PUBLISHED if e.source == REPORT and e.schedule == "linear"}
    published = " | ".join(f"{drops[ratio]:+.0f} points".replace("-", "−") for ratio in RATIOS)
    lines.append(f"| the earlier report, against its own baseline | | | {published} | one run each, nothing cut out |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
