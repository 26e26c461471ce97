"""Figures of what happens during and right after a search: masks over steps, schedules, slimming, stopping.

Plain plotly dictionaries as in `figures`, under the same promises.
"""

from collections.abc import Sequence

from upop.report.figures import KINDS, SCALE, Figure, Json, base_layout, color, panel, plain, rounded, spread, values
from upop.report.records import Group, Results, Run, removal
from upop.schedules import SCHEDULES

SCHEDULE_COLORS = dict(
    zip(SCHEDULES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"), strict=False)
)
SCHEDULE_DASHES = dict(zip(SCHEDULES, ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot"), strict=False))
CURVE_POINTS = 51


def trajectories(results: Results) -> Figure:
    """Mean mask per layer over the steps of a search; the choice is the run."""
    runs = [run for group in results.groups for run in group.runs if run.data.get("trajectory")]
    choices = {f"{run.label} ({run.method}, {run.target})": _trajectory(run) for run in runs}
    caption = "Mean mask value per layer (1: untouched, 0: removed) over the steps of the search, and the ratio."
    return Figure("trajectories", caption, choices, "Run")


def _trajectory(run: Run) -> Json:
    frames = run.data["trajectory"]
    kinds, steps = list(frames["mean_mask"]), frames["step"]
    height = 190 * (len(kinds) + 1)
    layout = base_layout("", "", height)
    layout |= panel(0, len(kinds) + 1, "", "ratio removed, %", height=height)
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": steps,
            "y": [rounded(100 * ratio) for ratio in frames["ratio"]],
            "line": {"color": color(run.method)},
            "marker": {"size": 4},
            "hovertemplate": "step %{x}: %{y:.1f} % removed<extra></extra>",
            "showlegend": False,
        }
    ]
    for row, kind in enumerate(kinds, start=1):
        suffix = str(row + 1)
        layout |= panel(row, len(kinds) + 1, suffix, f"{KINDS.get(kind, kind)}, by layer", height=height)
        layout[f"yaxis{suffix}"]["dtick"] = 1
        layout[f"xaxis{suffix}"]["matches"] = "x"
        data.append(_mask_map([list(layer) for layer in zip(*frames["mean_mask"][kind], strict=True)], steps, suffix))
    layout[f"xaxis{suffix}"]["title"] = {"text": "step of the search"}
    layout["annotations"] = [layout.pop(f"title{'' if n == 0 else n + 1}") for n in range(len(kinds) + 1)]
    return {"data": data, "layout": layout}


def _mask_map(layers: Sequence[Sequence[float]], steps: Sequence[int], suffix: str) -> Json:
    return {
        "type": "heatmap",
        "x": list(steps),
        "z": [[round(value, 3) for value in layer] for layer in layers],
        "zmin": 0,
        "zmax": 1,
        "colorscale": SCALE,
        "showscale": suffix == "2",
        "colorbar": {"orientation": "h", "y": 1.0, "ypad": 22, "yanchor": "bottom", "thickness": 8},
        "hovertemplate": "layer %{y}, step %{x}: mean mask %{z}<extra></extra>",
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
    }


def schedule_curves() -> Figure:
    """The formulas: fraction of the target over the progress of the search."""
    places = [n / (CURVE_POINTS - 1) for n in range(CURVE_POINTS)]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [rounded(u) for u in places],
            "y": [rounded(schedule(u)) for u in places],
            "line": {"color": SCHEDULE_COLORS[name], "dash": SCHEDULE_DASHES[name], "width": 2},
            "hovertemplate": f"{name}: s(%{{x:.2f}}) = %{{y:.3f}}<extra></extra>",
        }
        for name, schedule in SCHEDULES.items()
    ]
    layout = base_layout("progress of the search", "fraction of the target", 360)
    return Figure(
        "schedules", "The schedules as formulas (sine is the paper's).", {"": {"data": data, "layout": layout}}
    )


def by_schedule(results: Results) -> dict[str, list[tuple[str, Group]]]:
    """Target -> (schedule, group) of upop, for targets with at least two schedules."""
    found: dict[str, list[tuple[str, Group]]] = {}
    for group in results.groups:
        departs = {key for key, _ in group.variant}
        if group.method == "upop" and departs <= {"schedule"} and group.target:
            found.setdefault(group.target, []).append((str(group.runs[0].config["schedule"]), group))
    order = list(SCHEDULES)
    return {
        target: sorted(found[target], key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
        for target in sorted(found, key=removal)
        if len(found[target]) > 1
    }


def schedule_accuracy(results: Results) -> Figure:
    """Accuracy of upop by schedule, before and after retraining; the choice is the ratio."""
    choices = {
        target: _stages([(name, group) for name, group in groups], {"slim": "slimmed", "retrain": "retrained"})
        for target, groups in by_schedule(results).items()
    }
    return Figure("schedule-accuracy", "Mean and standard deviation over seeds.", choices, "Ratio")


def slimming(results: Results) -> Figure:
    """Accuracy around slimming, per group; the choice is the ratio."""
    stages = {"search": "masked, at the end of the search", "slim": "slimmed", "retrain": "retrained"}
    choices = {}
    for target in sorted({group.target for group in results.groups if group.target}, key=removal):
        groups = [(group.name, group) for group in results.groups if group.target == target]
        choices[target] = _stages([(n, g) for n, g in groups if not g.variant] or groups, stages, "validation")
    return Figure("slimming", "Mean and standard deviation over seeds, standard settings.", choices, "Ratio")


STAGE_STYLE = {
    "search": {"color": "#999999", "symbol": "circle-open", "size": 13},
    "slim": {"color": "#E69F00", "symbol": "diamond", "size": 8},
    "retrain": {"color": "#0072B2", "symbol": "square", "size": 8},
}


def _stages(groups: Sequence[tuple[str, Group]], stages: dict[str, str], split: str = "test") -> Json:
    """Accuracy on the horizontal axis, a row per name, a symbol per stage."""
    data = []
    for stage, title in stages.items():
        found = [(name, values(group, lambda run, stage=stage: run.accuracy(stage, split))) for name, group in groups]  # type: ignore[misc]
        rows = [(plain(name), value) for name, value in found if value]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [rounded(value.mean) for _, value in rows],
                "y": [name for name, _ in rows],
                "error_x": {"type": "data", "array": [rounded(v.sd or 0.0) for _, v in rows], "thickness": 1.2},
                "text": [f"{name}, {title}: {spread(value)}" for name, value in rows],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": STAGE_STYLE[stage],
            }
        )
    layout = base_layout(f"{split} accuracy, %", "", 190 + 32 * len(groups))
    layout["yaxis"]["autorange"] = "reversed"
    layout["legend"] |= {"y": 1.0, "yanchor": "bottom"}
    return {"data": data, "layout": layout}


def stopping(results: Results) -> Figure:
    """Validation accuracy over the ratio, at the checks of open-ended and adaptive searches; a run is chosen."""
    choices = {}
    for group in results.groups:
        for run in group.runs:
            if run.data.get("checks"):
                choices[f"{run.label} ({group.name})"] = _checks(run)
    caption = "Validation accuracy of the masked model at each check of the search, against the ratio at that moment."
    return Figure("stopping", caption, choices, "Run")


def _checks(run: Run) -> Json:
    checks = run.data["checks"]
    trace: Json = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "masked",
        "x": [rounded(100 * check["ratio"]) for check in checks],
        "y": [rounded(100 * check["accuracy"]) for check in checks],
        "text": [f"step {check['step']}" for check in checks],
        "hovertemplate": "%{text}: %{y:.2f} % at %{x:.1f} % removed<extra></extra>",
        "line": {"color": color(run.method)},
    }
    dense = run.accuracy("dense", "validation") or 0.0
    ends = [min(trace["x"]), max(trace["x"])]
    lines: list[Json] = [{"type": "scatter", "mode": "lines", "name": "dense", "x": ends, "y": [rounded(dense)] * 2}]
    budget = run.config.get("max_drop")
    if budget is not None:
        low = [rounded(dense - 100 * budget)] * 2
        lines.append({"type": "scatter", "mode": "lines", "name": "dense minus max_drop", "x": ends, "y": low})
    for line, dash in zip(lines, ("dot", "dash"), strict=False):
        line["line"] = {"color": color("dense"), "dash": dash}
    return {"data": [trace, *lines], "layout": base_layout("removed, %", "validation accuracy, %", 360)}
