"""The pictures of the documentation, from the schedules in the code and the results that are checked in.

python docs/pictures/draw.py [FOLDER]     writes units.svg, schedules.svg, masks.svg, survivors.svg and
sizes.svg there
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from upop.schedules import SCHEDULES

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))
import overview  # noqa: E402

CLAIMS = HERE.parents[1] / "results/claims"
BLUE, ORANGE, PALE, GREY = "#2b6cb0", "#c05621", "#dbe4ee", "#4a5568"
# What helped most with the dense model as teacher: its augmentation at 50 %, flips and crops where less is left.
TEACHER = tuple(f"upop, one-shot, {how}soft labels alone, rate 0.0025" for how in ("TrivialAugment, mixup, ", ""))
# Rows of README's table: name, what they are about (later ones first), epochs in all, colour, marker.
SERIES = (
    ("upop, 20 epochs, the dense model as teacher", TEACHER, 20, "#2b6cb0", "o"),
    ("upop, 6 epochs, the dense model as teacher", TEACHER, 6, "#7c4dbe", "P"),
    ("upop, 20 epochs", ("upop, one-shot",), 20, "#63a4dd", "s"),
    ("upop, 6 epochs: the default", ("upop, one-shot",), 6, "#9cc4e8", "^"),
    ("upop, the paper's search, 1 + 5 epochs", ("upop, search",), 6, "#c05621", "v"),
    ("Torch-Pruning, 6 epochs", ("Torch-Pruning, taylor-isomorphic",), 6, "#4a5568", "D"),
)
TITLES = {"attn": "attn: head dims", "mlp": "mlp: hidden neurons"}


def draw(folder: Path) -> None:
    """Write all pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes for the same numbers, and letters that a page can search.
    style = {"svg.hashsalt": "upop", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    with plt.rc_context({**style, "axes.spines.right": False, "font.family": "sans-serif", "text.color": GREY}):
        for picture in (units, schedules, masks, survivors, sizes):
            figure = picture()
            figure.savefig(folder / f"{picture.__name__}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


def units() -> plt.Figure:
    """Which rows and columns go with one unit of each of the paper's two kinds."""
    figure, (attn, mlp) = plt.subplots(1, 2, figsize=(8.4, 3.0), width_ratios=(5, 3))
    for number, name in enumerate(("q", "k", "v")):
        _matrix(attn, 2.7 * number, 0, 2, 4, name)
        for row in (1.0, 3.0):  # the same head dim in both heads
            _matrix(attn, 2.7 * number, row, 2, 0.5, "", ORANGE)
    _matrix(attn, 8.4, 1, 4, 2, "output projection")
    for column in (1.0, 3.0):
        _matrix(attn, 8.4 + column, 1, 0.5, 2, "", ORANGE)
    _matrix(mlp, 0, 0, 2, 4, "fc1")
    _matrix(mlp, 0, 2.5, 2, 0.4, "", BLUE)
    _matrix(mlp, 3.2, 1, 4, 2, "fc2")
    _matrix(mlp, 3.2 + 2.5, 1, 0.4, 2, "", BLUE)
    for axes, title, width in (
        (
            attn,
            "attn: one head dim, the same in every head (here 2),\nof q, k and v, and its columns of the output",
            12.8,
        ),
        (mlp, "mlp: one hidden neuron,\nits row and its column", 7.6),
    ):
        axes.set(xlim=(-0.3, width), ylim=(5, -1.2), aspect="equal")
        axes.set_title(title, fontsize=9, color=GREY)
        axes.axis("off")
    return figure


def _matrix(axes: Axes, x: float, y: float, width: float, height: float, name: str, colour: str = PALE) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    axes.text(x + width / 2, y - 0.25, name, ha="center", fontsize=9)


def schedules() -> plt.Figure:
    """How much of the target is pruned at which progress of the search."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    progress = np.linspace(0, 1, 101)
    for name, schedule in SCHEDULES.items():
        width = 2.4 if name == "sine" else 1.2
        axes.plot(progress, [schedule(float(u)) for u in progress], label=name, linewidth=width)
    axes.set(xlabel="progress of the search", ylabel="share of the target", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    return figure


def masks() -> plt.Figure:
    """The mean mask of every layer over one search for 80 % of the prunable parameters."""
    found = json.loads((CLAIMS / "upop_prunable0.8_s0.json").read_text(encoding="utf-8"))["trajectory"]
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.7), width_ratios=(1, 1.15, 1.15), layout="constrained")
    steps = found["step"]
    panels[0].plot(steps, found["ratio"], color=GREY)
    panels[0].set(title="removed, of all prunable", xlabel="step", ylim=(0, 1), xlim=(0, steps[-1]))
    for axes, (kind, rows) in zip(panels[1:], found["mean_mask"].items(), strict=True):
        extent = (0, steps[-1], len(rows[0]) - 0.5, -0.5)
        image = axes.imshow(np.array(rows).T, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent)
        axes.set(title=TITLES[kind], xlabel="step", ylabel="layer", yticks=range(len(rows[0])))
    figure.colorbar(image, ax=panels[1:], label="mean mask", shrink=0.9)
    return figure


def survivors() -> plt.Figure:
    """What is left per layer and kind after searches for three ratios, mean over the seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 2.9), sharey=True, layout="constrained")
    targets = ("0.5", "0.8", "0.9")
    for axes, kind in zip(panels, TITLES, strict=True):
        for number, (target, shade) in enumerate(zip(targets, (0.35, 0.65, 1.0), strict=True)):
            left = _left(kind, target)
            layers = np.arange(len(left))
            axes.bar(layers + 0.27 * (number - 1), left, 0.25, color=BLUE, alpha=shade, label=f"{target} removed")
            axes.axhline(1 - float(target), color=ORANGE, linewidth=0.8, linestyle=":")
        axes.set(title=TITLES[kind], xlabel="layer", xticks=layers, ylim=(0, 1))
    panels[0].set_ylabel("units left")
    panels[1].legend(frameon=False)
    return figure


def _left(kind: str, target: str) -> np.ndarray:
    """Share of the units of `kind` left, by layer."""
    files = sorted(CLAIMS.glob(f"upop_prunable{target}_s?.json"))
    found = [json.loads(file.read_text(encoding="utf-8"))["widths"] for file in files]
    return np.mean([np.divide(widths["after"][kind], widths["before"][kind]) for widths in found], axis=0)


def sizes() -> plt.Figure:
    """Test accuracy against the parameters left, all from one dense model."""
    rows = overview.rows_of(overview.STARTS["again"])
    dense = json.loads((overview.RESULTS / "recipe-again/dense.json").read_text(encoding="utf-8"))
    whole, accuracy = dense["params"]["after"] / 1e6, 100 * dense["accuracy"]["dense"]["test"]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.axhline(accuracy, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("the dense model", (whole, accuracy), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    for label, names, epochs, colour, marker in SERIES:
        of_epochs = {kind.what: row.found for kind, row in rows.items() if kind.search + kind.retrain == epochs}
        found: dict[float, list[float]] = {}
        for name in names:
            found |= of_epochs.get(name, {})
        found = dict(sorted(found.items()))
        axes.errorbar(
            [whole * (1 - ratio) for ratio in found],
            [statistics.fmean(values) for values in found.values()],
            [statistics.stdev(values) if len(values) > 1 else 0 for values in found.values()],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
        )
    marks = [
        (whole * (1 - ratio), statistics.fmean(values), f"from scratch, {epochs.split()[0]} epochs", "left")
        for (source, epochs, _), found in overview.from_scratch().items()
        for ratio, values in found.items()
        if source == "from-scratch"
    ]
    marks += [
        (whole, statistics.fmean(row.found[0.0]), f"trained on, {kind.search + kind.retrain:g} epochs", "right")
        for kind, row in rows.items()
        if kind.what == overview.METHODS["dense-continued"]
    ]
    for x, y, text, side in marks:
        axes.plot(x, y, "x", color="black", clip_on=False)
        away = {"left": (7, 4), "right": (-7, -3)}[side]
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        axes.annotate(text, (x, y), away, textcoords="offset points", ha=side, fontsize=8, bbox=paper)
    axes.set(xlabel="million parameters left", ylabel="test accuracy, %", xscale="log")
    ticks = [whole * (1 - ratio) for ratio in (0, *overview.RATIOS)]
    axes.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
