"""Figures as plain plotly dictionaries (`data`, `layout`), drawn by the page's own script.

Pure functions over results; must not import plotly or format HTML. Colours that follow light and dark (text, grid,
background) are left to the page. Text from results is escaped: plotly reads a little HTML in labels.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upop.report.paired import Stat, stat
from upop.report.records import (
    CONTINUED,
    DENSE,
    ONE_SHOT,
    OPEN,
    PLACES,
    Group,
    Results,
    Run,
    Variant,
    in_words,
    removal,
)

Json = dict[str, Any]
# Okabe and Ito's palette (told apart by the colour-blind); dash and symbol repeat what the colour says.
COLORS = {
    "upop": "#0072B2",
    ONE_SHOT: "#332288",
    "progressive": "#56B4E9",
    "unified": "#D55E00",
    "mask": "#E69F00",
    "magnitude": "#009E73",
    "taylor": "#CC79A7",
    "random": "#999999",
    CONTINUED: "#8C6BB1",
    DENSE: "#7A7A7A",
}
SYMBOLS = {
    "upop": "circle",
    ONE_SHOT: "pentagon",
    "progressive": "square",
    "unified": "diamond",
    "mask": "triangle-up",
    "magnitude": "x",
    "taylor": "cross",
    "random": "star",
}
DASHES = {CONTINUED: "dash", DENSE: "dot", "random": "dot"}
KINDS = {"attn": "head dims", "mlp": "hidden neurons"}
SCALE = "Cividis"
PANEL_GAP = 64  # pixels between panels: tick labels and a title


@dataclass(frozen=True)
class Figure:
    """A drawing with a choice: `choices` maps what the reader may pick to a plotly dictionary. `id` is fixed."""

    id: str
    caption: str
    choices: Mapping[str, Json]
    label: str = ""

    @property
    def has_buttons(self) -> bool:
        """Whether the names are few and short enough to stand beside each other."""
        return len(self.choices) <= 6 and sum(map(len, self.choices)) <= 100


def standard(results: Results) -> list[Group]:
    """Groups of every method's standard settings, on each model and data set."""
    return [group for group in results.groups if not group.settings]


def values(group: Group, read: Callable[[Run], float | None]) -> Stat | None:
    """Over the group's runs that have the value."""
    found = [value for run in group.runs if (value := read(run)) is not None]
    return stat(found) if found else None


def dense_levels(results: Results) -> dict[Variant, list[Stat]]:
    """Test accuracy of the dense models that runs start from, in per cent, for each model and data set.

    One level, over a dense model a seed at most; several where runs of one seed start from several. Without pruned
    runs: of the dense ones, each shape for itself.
    """
    found: dict[Variant, list[dict[int, float]]] = {}
    for group in results.groups:
        found.setdefault(group.place, []).append({run.seed: _start(run) for run in group.runs})
    if found:
        return {place: _levels(starts) for place, starts in found.items()}
    for run in results.dense:
        shape = tuple((key, run.config.get(key)) for key in PLACES)
        found.setdefault(shape, []).append({run.seed: _start(run)})
    return {(): sorted((level for starts in found.values() for level in _levels(starts)), key=_mean)}


def _start(run: Run) -> float:
    """Of the dense model, also for a control, which goes on from there."""
    value = run.accuracy(DENSE)
    assert value is not None
    return value


def _levels(starts: Sequence[Mapping[int, float]]) -> list[Stat]:
    """Of accuracies by seed, those joined that have the same for the seeds they share."""
    joined: list[dict[int, float]] = []
    for these in starts:
        fits = [known for known in joined if all(known.get(seed, value) == value for seed, value in these.items())]
        if not fits:
            joined.append({})
        (fits or joined[-1:])[0].update(these)
    every = [sorted(known.values()) for known in joined]
    levels = [stat(values if len(set(values)) > 1 else values[:1]) for values in every]
    return sorted(levels, key=_mean)


def _mean(level: Stat) -> float:
    return level.mean


def levels_text(levels: Sequence[Stat]) -> str:
    return ("several: " if len(levels) > 1 else "") + ", ".join(map(spread, levels))


def plain(text: str) -> str:
    return html.escape(text, quote=False)


def spread(value: Stat, unit: str = " %") -> str:
    sd = f" ± {value.sd:.2f}" if value.sd is not None else ""
    return f"{value.mean:.2f}{sd}{unit} (n = {value.n})"


def base_layout(x: str, y: str, height: int = 440, **more: Any) -> Json:
    axis = {"automargin": True, "zeroline": False}
    return {
        "height": height,
        "margin": {"l": 12, "r": 12, "t": 24, "b": 12},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}},
        **more,
    }


def rounded(number: float) -> float:
    return float(f"{number:.6g}")


# ---- accuracy against size ----


def tradeoff(results: Results) -> Figure:
    """Retrained test accuracy over what a model costs; the choice is the cost."""
    axes: dict[str, tuple[str, Callable[[Run, str], float | None]]] = {
        "parameters": ("parameters, millions", lambda run, side: run.data["params"][side] / 1e6),
        "MACs": ("multiply-accumulates per image, millions", lambda run, side: run.data["macs"][side] / 1e6),
    }
    pruned = [group for group in standard(results) if group.target]
    for batch in sorted({b for g in pruned for run in g.runs for b in run.data["latency"]}, key=lambda b: (len(b), b)):
        axes[f"latency, batch {batch}"] = (f"measured latency of a batch of {batch}, ms", _latency(batch))
    choices = {name: _tradeoff(results, pruned, title, read) for name, (title, read) in axes.items()}
    caption = (
        "Mean over seeds, error bars: one standard deviation; lines join the ratios of one method. Horizontal: the "
        "dense model, and the dense model trained as long as the pruned ones. Click the legend to choose methods."
    )
    return Figure("tradeoff", caption, choices if any(c["data"] for c in choices.values()) else {}, "Against")


def _latency(batch: str) -> Callable[[Run, str], float | None]:
    def read(run: Run, side: str) -> float | None:
        sides = run.data["latency"].get(batch)
        return float(sides[side]["median_ms"]) if sides else None

    return read


def _tradeoff(results: Results, groups: Sequence[Group], title: str, read: Callable[[Run, str], float | None]) -> Json:
    data, xs = [], []
    for name in dict.fromkeys((group.name, group.target == OPEN) for group in groups):
        mine = [group for group in groups if (group.name, group.target == OPEN) == name]
        trace, places = _curve(mine, read)
        if places:
            data.append(trace)
            xs += places
    befores = [value for group in groups for run in group.runs if (value := read(run, "before")) is not None]
    if xs and befores:
        data += _horizontals(results, min(xs), sum(befores) / len(befores))
    return {"data": data, "layout": base_layout(title, "test accuracy, %")}


def _curve(groups: Sequence[Group], read: Callable[[Run, str], float | None]) -> tuple[Json, list[float]]:
    method, is_open = groups[0].method, groups[0].target == OPEN
    points = []
    for group in groups:
        y = values(group, lambda run: run.accuracy("retrain"))
        x = values(group, lambda run: read(run, "after") if run.accuracy("retrain") is not None else None)
        if x and y:
            points.append((x.mean, y, group.target))
    points.sort(key=lambda point: (point[0], point[2]))
    trace = {
        "type": "scatter",
        "mode": "markers" if is_open else "lines+markers",
        "name": plain(groups[0].name + (", open-ended" if is_open else "")),
        "x": [rounded(x) for x, _, _ in points],
        "y": [rounded(y.mean) for _, y, _ in points],
        "error_y": {"type": "data", "array": [rounded(y.sd or 0.0) for _, y, _ in points], "thickness": 1.2},
        "text": [f"{plain(groups[0].name)}, {plain(target)}: {spread(y)}" for _, y, target in points],
        "hovertemplate": "%{text}<br>at %{x}<extra></extra>",
        "line": {"color": color(method), "width": 2, "dash": DASHES.get(method, "solid")},
        "marker": {
            "size": 8,
            "color": color(method),
            "symbol": SYMBOLS.get(method, "circle") + ("-open" if is_open else ""),
        },
    }
    return trace, [x for x, _, _ in points]


def color(method: str) -> str:
    return COLORS.get(method, "#666666")


def _horizontals(results: Results, left: float, right: float) -> list[Json]:
    lines: list[tuple[str, str, Stat | None]] = [
        (DENSE, DENSE + in_words(place), level) for place, levels in dense_levels(results).items() for level in levels
    ]
    continued = [group for group in standard(results) if group.method == CONTINUED]
    lines += [(CONTINUED, group.name, values(group, lambda run: run.accuracy("last"))) for group in continued]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(name),
            "x": [rounded(left), rounded((left + right) / 2), rounded(right)],
            "y": [rounded(level.mean)] * 3,
            "text": [f"{plain(name)}: {spread(level)}"] * 3,
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": color(method), "width": 2, "dash": DASHES[method]},
        }
        for method, name, level in lines
        if level
    ]


# ---- what survives ----


def survivors(results: Results) -> Figure:
    """Surviving share per layer and kind, a row per group; the choice is the ratio."""
    targets = sorted({group.target for group in results.groups if group.target}, key=removal)
    choices = {target: _survivors([g for g in results.groups if g.target == target]) for target in targets}
    caption = (
        "Share of the units that survives, in per cent, mean over seeds. A row per method; rows with settings are "
        "variants. One colour along a row would be a uniform cut."
    )
    return Figure("survivors", caption, choices, "Ratio")


def mean_kept(group: Group, kind: str) -> list[float]:
    """Surviving share per layer in per cent, mean over the group's runs; empty where not all have these layers."""
    widths = [run.data["widths"]["before"].get(kind, ()) for run in group.runs]
    if len({len(layers) for layers in widths}) > 1 or not widths[0]:
        return []
    return [100 * stat(layer).mean for layer in zip(*(run.kept(kind) for run in group.runs), strict=True)]


def _survivors(groups: Sequence[Group]) -> Json:
    kinds = list(dict.fromkeys(kind for group in groups for kind in group.runs[0].data["widths"]["before"]))
    height = 110 + len(kinds) * (PANEL_GAP + 24 * len(groups))
    layout = base_layout("", "", height)
    data: list[Json] = []
    for row, kind in enumerate(kinds):
        suffix = "" if row == 0 else str(row + 1)
        # Runs may have pruned other kinds.
        known = {plain(f"{g.name} (n = {len(g.runs)})"): share for g in groups if (share := mean_kept(g, kind))}
        names, shares = list(known), list(known.values())
        data.append(_heatmap([[round(value, 1) for value in share] for share in shares], names, kind, suffix))
        layout |= panel(row, len(kinds), suffix, f"{KINDS.get(kind, kind)}, by layer", height=height, reverse=True)
        layout[f"xaxis{suffix}"]["dtick"] = 1
    layout["annotations"] = [layout.pop(f"title{'' if row == 0 else row + 1}") for row in range(len(kinds))]
    return {"data": data, "layout": layout}


def _heatmap(z: list[list[float]], names: Sequence[str], kind: str, suffix: str) -> Json:
    return {
        "type": "heatmap",
        "z": z,
        "y": list(names),
        "zmin": 0,
        "zmax": 100,
        "colorscale": SCALE,
        "texttemplate": "%{z:.0f}" if len(z[0]) <= 12 else "",
        "hovertemplate": f"%{{y}}<br>{plain(kind)}, layer %{{x}}: %{{z:.1f}} %<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "showscale": suffix == "",
        "colorbar": {"orientation": "h", "y": 1.0, "ypad": 22, "yanchor": "bottom", "thickness": 8},
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
    }


def panel(row: int, rows: int, suffix: str, title: str, *, height: int, reverse: bool = False) -> Json:
    """Axes of one of `rows` panels under each other, and its title (key `title<suffix>`, for the annotations)."""
    gap = PANEL_GAP / (height - 110)
    share = (1 - gap * (rows - 1)) / rows
    top = 1 - row * (share + gap)
    axis = {"automargin": True, "zeroline": False}
    return {
        f"xaxis{suffix}": {**axis, "anchor": f"y{suffix}"},
        f"yaxis{suffix}": {
            **axis,
            "anchor": f"x{suffix}",
            "domain": [rounded(max(0.0, top - share)), rounded(top)],
            **({"autorange": "reversed"} if reverse else {}),
        },
        f"title{suffix}": {
            "text": plain(title),
            "x": 0,
            "y": rounded(top),
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
        },
    }
