"""Tables of accuracy at 50, 80 and 90 % of the parameters removed: upop's, other tools' and published.

A table is of one dense model, from which all its rows start; read from the results that are checked in.

    python benchmarks/overview.py again      prints that of docs/results.md; short: README's; claims: that of
                                             docs/recipe.md. A test holds them
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from upop.report.page import load_results
from upop.report.references import PAPER, PUBLISHED, REPORT

RESULTS = Path(__file__).parents[1] / "results"
RATIOS = (0.5, 0.8, 0.9)
NOTHING = 0.0  # removed
# What was trained from scratch, by folder of results.
SCRATCH = {"from-scratch": "a dense model of that size", "same-shape": "what pruning left, random weights"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
USUAL_RATE = {"adamw": 1e-3, "muon": 5e-3}  # of retraining
# What a row says of a run of a study, rates going with the optimizer: runs that differ in more need rows of their own.
SAID = {"epochs_search", "epochs_retrain", "optimizer", "lr", "lr_search", "lr_retrain", "lr_mask"}
SAID |= {"compensate", "normalise"}  # these go with the search
SAID |= {"randaugment", "mixup", "distill"}  # see `_how`
METHODS = {
    "upop": "upop, search",
    "unified": "trained masks, one ranking (upop's `unified`)",
    "mask": "trained masks, a ratio per kind (`mask`)",
    "magnitude": "smallest weights (`magnitude`)",
    "taylor": "smallest effect on the loss (`taylor`)",
    "dense-continued": "the dense model, trained on",
}
# By how effects on the loss are normalised.
ONE_SHOT = {"zscore": "upop, one-shot", "none": "upop, one-shot, effects as they are"}


class Start(NamedTuple):
    """A dense model, and the folders of what began with it."""

    page: str  # with the table
    studies: tuple[str, ...]
    peers: tuple[str, ...]
    published: bool = False  # whether the table ends with what others have published
    looks: bool = True  # whether rows of one seed alone are among it
    left_out: tuple[str, ...] = ()  # rows that are not, by what they are about or how they begin to say how long


AGAIN = Start("docs/results.md", ("recipe-again", "recipe-soft-labels"), ("peers-again",), published=True, looks=False)
DETAILS = (METHODS["unified"], METHODS["mask"], METHODS["taylor"], ONE_SHOT["none"], SCRATCH["same-shape"])
STARTS = {
    "again": AGAIN,
    "short": AGAIN._replace(page="README.md", left_out=(*DETAILS, "36 from scratch", "70 from scratch")),
    "claims": Start(
        "docs/recipe.md",
        ("recipe-long", "recipe"),
        ("peers-20epochs-muon", "peers-6epochs-muon", "peers-6epochs", "peers"),
    ),
}


class Kind(NamedTuple):
    """What a row is about."""

    what: str
    search: float  # epochs
    retrain: float
    optimizer: str


@dataclass
class Row:
    """Test accuracies in per cent by share of parameters removed, and the folders of results they come from."""

    found: dict[float, list[float]] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)


def rows_of(start: Start) -> dict[Kind, Row]:
    """All that is measured from one dense model, by what was done to it."""
    rows: dict[Kind, Row] = {}
    for kind, ratio, accuracy, source in (*_of_studies(start.studies), *_of_peers(start.peers)):
        if ratio in (*RATIOS, NOTHING):
            row = rows.setdefault(kind, Row())
            row.found.setdefault(ratio, []).append(accuracy)
            row.sources[source] = None
    return rows


def table(start: Start) -> str:
    """Markdown for the file that `start` names."""
    rows = {kind: row for kind, row in rows_of(start).items() if kind.what not in start.left_out}
    if not start.looks:
        rows = {kind: row for kind, row in rows.items() if max(map(len, row.found.values())) > 1}
    lines = ["| | epochs | | 50 % removed | 80 % | 90 % | runs |", "|---" * 7 + "|"]
    for kind in sorted(rows, key=lambda kind: (-kind.search - kind.retrain, -_hardest(rows[kind]))):
        epochs = f"{kind.search:g} + {kind.retrain:g}"
        lines.append(_line(kind.what, epochs, kind.optimizer, rows[kind].found, *rows[kind].sources))
    for (source, epochs, optimizer), found in from_scratch().items():
        if SCRATCH[source] in start.left_out or epochs.startswith(start.left_out):
            continue
        lines.append(_line(SCRATCH[source], epochs, optimizer, found, source))
    text = "\n".join(lines + (_published() if start.published else []))
    # The site has pages to link to, no folders.
    return text if start.page == "README.md" else re.sub(r"\[[^]]+\]\((results/[^)]+)\)", r"`\1`", text)


def _published() -> list[str]:
    paper = {e.ratio: e.value for e in PUBLISHED if e.source == PAPER and e.method in ("dense", "upop")}
    drops = {e.ratio: e.value for e in PUBLISHED if e.source == REPORT and e.schedule == "linear"}
    lost = " | ".join(f"{drops[ratio]:+.0f} points".replace("-", "−") for ratio in RATIOS)
    return [
        f"| the paper: DeiT-Small on ImageNet, {paper[0.0]} dense | 60 + 300 | AdamW | {paper[0.5]} (of the "
        "prunable) | | | [Shi et al.](https://arxiv.org/abs/2301.13741) |",
        f"| the reproduction study before this one, against its own, damaged baseline | | | {lost} | one run each; "
        "nothing cut out, decided on the test set |",
    ]


def _of_studies(names: tuple[str, ...]) -> Iterator[tuple[Kind, float, float, str]]:
    for name in names:
        for run in load_results(RESULTS / name).runs:
            assert {key for key, _ in run.variant} <= SAID, f"{name}, {run.label}: needs a row of its own"
            c = run.config
            what = METHODS[run.method] if c["epochs_search"] else ONE_SHOT[c["normalise"]]
            what = ", ".join((what, *_how(c)))
            kind = Kind(what, c["epochs_search"], c["epochs_retrain"], OPTIMIZERS[c["optimizer"]])
            accuracy = run.accuracy("last")
            assert accuracy is not None
            yield kind, float(run.target.partition("=")[2]) if run.target else NOTHING, accuracy, name


def _how(config: Mapping[str, Any]) -> Iterator[str]:
    """How the retraining was not the usual one; results of older code do not know all options."""
    for option, name in (("randaugment", "TrivialAugment"), ("mixup", "mixup")):
        if config.get(option):
            yield name
    if share := config.get("distill"):
        yield "soft labels alone" if share == 1 else f"{100 * share:g} % soft labels"
    if config["lr_retrain"] != USUAL_RATE[config["optimizer"]]:
        yield f"rate {config['lr_retrain']:g}"


def _of_peers(names: tuple[str, ...]) -> Iterator[tuple[Kind, float, float, str]]:
    for name in names:
        for path in sorted((RESULTS / name).glob("*_s[0-9]*.json")):
            data = json.loads(path.read_text())
            spec = data["spec"]
            if data["status"] != "complete":  # a target that was not met
                continue
            once = ONE_SHOT[(spec["how"] or {}).get("normalise", "none")]
            ours = {"upop": METHODS["upop"], "upop-one-shot": once}
            what = ours.get(spec["setting"], f"Torch-Pruning, {spec['setting']}")
            search = spec["epochs"] * spec.get("search_share", 0.5) if spec["setting"] == "upop" else 0
            kind = Kind(what, search, spec["epochs"] - search, OPTIMIZERS[spec["optimizer"]])
            yield kind, spec["ratio"], 100 * data["accuracy"]["retrained"]["test"], name


def from_scratch() -> dict[tuple[str, str, str], dict[float, list[float]]]:
    """(Folder, epochs, optimizer) -> accuracies by the ratio whose pruned model has about as many parameters."""
    dense = json.loads((RESULTS / "claims/dense.json").read_text())["params"]["after"]
    rows: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for source in SCRATCH:
        paths = sorted((RESULTS / source).glob("*.json"))
        assert paths, f"no results in {source}"
        for data in (json.loads(path.read_text()) for path in paths):
            ratio = min(RATIOS, key=lambda ratio: abs(ratio - 1 + data["params"]["after"] / dense))
            epochs = f"{data['config']['epochs_dense']:g} from scratch"
            # What the smallest of these had was mixup alone, as the dense model of `claims`.
            epochs += ", TrivialAugment" if data["config"].get("randaugment") else ""
            row = rows.setdefault((source, epochs, OPTIMIZERS[data["config"]["optimizer"]]), {})
            row.setdefault(ratio, []).append(100 * data["accuracy"]["dense"]["test"])
    return rows


def _hardest(row: Row) -> float:
    return statistics.fmean(row.found[max(row.found)])


def _line(what: str, epochs: str, optimizer: str, found: dict[float, list[float]], *sources: str) -> str:
    cells = " | ".join(_cell(found.get(ratio, [])) for ratio in RATIOS)
    if NOTHING in found:
        cells = f"nothing removed: {_cell(found[NOTHING])} | |"
    links = ", ".join(f"[{source}](results/{source})" for source in sources)
    return f"| {what} | {epochs} | {optimizer} | {cells} | {links} |"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"


if __name__ == "__main__":
    print(table(STARTS[sys.argv[1]]))
