"""The two pictures of a run, drawn from its Result: what survives per layer and kind, accuracy over the stages.

Must not need torch: pictures can be redrawn from a result.json anywhere.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KIND_LABELS = {"attn": "head dims", "mlp": "hidden neurons"}
STAGE_LABELS = {
    "dense": "dense",
    "search": "masked\n(after search)",
    "slim": "slimmed",
    "retrain": "retrained",
}
COLORS = {"attn": "#4363d8", "mlp": "#e6762b", "validation": "#8a8f98", "test": "#2f7d4f"}


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
    axes.set_xlabel("layer")
    removed = 100 * (1 - result["params"]["after"] / result["params"]["before"])
    figure.suptitle(f"What survives with {removed:.0f} % of the parameters removed (numbers: units left)", fontsize=10)
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
