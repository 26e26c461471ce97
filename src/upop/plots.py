"""The pictures of a run, drawn from its Result (what survives, accuracy over the stages), and of a benchmark.

Must not need torch: pictures can be redrawn from a result.json or bench.json anywhere.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upop.errors import UpopError

KIND_LABELS = {
    "attn": "head dims",
    "dims": "head dims, each head its own",
    "qk": "head dims of queries and keys",
    "v": "head dims of values",
    "head": "heads",
    "mlp": "hidden neurons",
    "block": "blocks",
}
STAGE_LABELS = {
    "dense": "dense",
    "search": "masked\n(after search)",
    "slim": "slimmed",
    "retrain": "retrained",
}
COLORS = {
    **dict.fromkeys(("attn", "dims", "qk", "v", "head"), "#4363d8"),
    "mlp": "#e6762b",
    "block": "#8e44ad",
    "validation": "#8a8f98",
    "test": "#2f7d4f",
}
MODEL_COLORS = ("#8a8f98", "#2f7d4f", "#4363d8", "#e6762b", "#8e44ad", "#c0392b", "#16808c", "#7a5c3e")


def widths(result: Mapping[str, Any], path: Path) -> None:
    """What share of each layer's units survives, one row of bars per kind; writes a PNG."""
    from matplotlib.figure import Figure

    before, after = result["widths"]["before"], result["widths"]["after"]
    layers = len(next(iter(before.values())))
    figure = Figure(figsize=(max(5.0, 0.62 * layers + 1.6), 1.4 + 1.7 * len(before)), layout="constrained")
    for row, kind in enumerate(before):
        axes = figure.add_subplot(len(before), 1, row + 1)
        share = [100 * a / b for a, b in zip(after[kind], before[kind], strict=True)]
        axes.bar(range(layers), [100.0] * layers, color="#eceef1")
        bars = axes.bar(range(layers), share, color=COLORS.get(kind, "#555555"))
        axes.bar_label(bars, labels=[str(n) for n in after[kind]], fontsize=8, padding=1)
        kept = 100 * sum(after[kind]) / sum(before[kind])
        axes.set_title(
            f"{KIND_LABELS.get(kind, kind)}: {kept:.0f} % of {sum(before[kind]):,} stay",
            fontsize=10,
            loc="left",
        )
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        axes.set_xticks(range(layers), [str(n) for n in range(layers)])
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("layer; numbers: units left")
    removed = 100 * (1 - result["params"]["after"] / result["params"]["before"])
    figure.suptitle(f"What survives with {removed:.0f} % of the parameters removed", fontsize=10)
    figure.savefig(path, dpi=150)


def stages(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy after each stage, on validation and test; writes a PNG."""
    from matplotlib.figure import Figure

    accuracy = result["accuracy"]
    names = list(accuracy)
    splits = list(accuracy[names[0]])
    figure = Figure(figsize=(1.7 + 1.35 * len(names), 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(splits)
    for index, split in enumerate(splits):
        # The masked model is judged on the validation split alone.
        values = [100 * accuracy[name].get(split, math.nan) for name in names]
        places = [n + (index - (len(splits) - 1) / 2) * width for n in range(len(names))]
        bars = axes.bar(places, values, width=width * 0.94, color=COLORS.get(split, "#555555"), label=split)
        axes.bar_label(bars, labels=["" if math.isnan(v) else f"{v:.1f}" for v in values], fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), [STAGE_LABELS.get(name, name) for name in names])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 109)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    params = result["params"]
    axes.set_title(f"{params['before'] / 1e6:.2f} M to {params['after'] / 1e6:.2f} M parameters", fontsize=11)
    figure.savefig(path, dpi=150)


def accuracy_over_time(
    bench: Mapping[str, Any],
    path: Path,
    *,
    runtime: str | None = None,
    dtype: str | None = None,
    batch: int | None = None,
) -> None:
    """A benchmark's models as points, accuracy against the time of a pass, a panel per runtime and dtype; a PNG.

    `bench` is what bench.json holds. `runtime` and `dtype` choose panels, None = all; `batch` is one for all panels,
    None = the largest that was measured. Bars are as long as the interquartile range; numbers: times as fast.
    Raises UpopError where no model with a known accuracy was measured so.
    """
    from matplotlib.figure import Figure

    split, known = _accuracies(bench)
    wanted = {"runtime": runtime, "dtype": dtype, "batch": batch}
    rows = [row for row in bench["rows"] if row["median_ms"] is not None and row["model"] in known]
    rows = [row for row in rows if all(value in (None, row[key]) for key, value in wanted.items())]
    if not rows:
        asked = " ".join(str(value) for value in wanted.values() if value is not None) or "any way"
        raise UpopError(f"{path}: nothing to draw, no model of a known accuracy was measured in {asked}")
    batch = max(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    panels = list(dict.fromkeys((row["runtime"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(1.2 + 2.7 * len(panels), 3.6 + 0.2 * math.ceil(len(known) / 2)), layout="constrained")
    first = None
    for column, panel in enumerate(panels):
        first = axes = figure.add_subplot(1, len(panels), column + 1, sharey=first)
        _points(axes, [row for row in rows if (row["runtime"], row["dtype"]) == panel], known, list(known))
        axes.set_title(" ".join(panel), fontsize=10, loc="left")
    figure.axes[0].set_ylabel(f"{split} accuracy, %")
    # A model may have been refused in some of the panels.
    shown = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2, frameon=False)
    where = bench["hardware"]["device"] + (f", threads: {bench['threads']}" if bench["device"] == "cpu" else "")
    figure.suptitle(f"Accuracy against the time of a pass of {batch} images ({where})", fontsize=10)
    figure.savefig(path, dpi=150)


def _points(axes: Any, rows: list[Any], known: Mapping[str, float], names: list[str]) -> None:
    for row in rows:
        color = MODEL_COLORS[names.index(row["model"]) % len(MODEL_COLORS)]
        x, y, spread = row["median_ms"], 100 * known[row["model"]], row["spread_ms"]
        axes.errorbar(x, y, xerr=spread / 2, fmt="o", color=color, capsize=3, label=row["model"])
        if row["speedup"] is not None and row["speedup"] != 1:
            axes.annotate(
                f"{row['speedup']:.2f}x", (x, y), (0, 7), textcoords="offset points", fontsize=8, ha="center"
            )
    axes.set_xlim(0, 1.15 * max(row["median_ms"] + row["spread_ms"] for row in rows))
    axes.margins(y=0.2)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)


def _accuracies(bench: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The split, test wherever all have it, and the accuracy per model, of those whose runs have recorded one."""
    found = {model["name"]: model["accuracy"] for model in bench["models"] if model["accuracy"]}
    split = "test" if all("test" in accuracy for accuracy in found.values()) else "validation"
    return split, {name: accuracy[split] for name, accuracy in found.items() if split in accuracy}
