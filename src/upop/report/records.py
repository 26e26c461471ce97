"""Results of runs read from a folder: checked, and sorted into groups that differ in the seed only.

Must not judge or format anything, and must not need torch: a report is made wherever the files are.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from upop.errors import UpopError
from upop.reading import read_json
from upop.report.form import first_fault, first_study_fault

SCHEMA = 2
DENSE, CONTINUED, OPEN = "dense", "dense-continued", "open"
ONE_SHOT = "one-shot"  # method upop without a search: it ranks by other scores, once, and nothing shrinks
METHODS = ("upop", ONE_SHOT, "progressive", "unified", "mask", "magnitude", "taylor", "random", CONTINUED)
# What a setting is where nothing else is said; a run that departs from it is a variant of its method.
DEFAULTS: dict[str, Any] = {
    "schedule": "sine",
    "normalise": "zscore",
    "gradient_order": "paper",
    "binarise": "topk",
    "threshold": None,
    "max_drop": None,
    "tolerance": None,
    "sparsity_attn": 4.8e-3,
    "sparsity_mlp": 2e-4,
    "ignored_layers": "",
}
# Says where or as what a run ran, not what it computed; `method`, `target` and `seed` have places of their own.
APART = (
    *("method", "target", "seed", "out", "stages", "model"),
    *("device", "workers", "threads", "tracker", "compile", "attention", "latency_seconds", "checks"),
)
# Says what was pruned, not how: runs that differ in it are shown side by side, and never compared.
PLACES = ("model", "data")
# Decide which images there are at a path.
OF_DATA = ("data", "validation", "subset", "skip_bad")
# Part of what a method is compared for, so to be named where methods differ in it, also by upop's choice.
LENGTHS = ("epochs_search", "epochs_retrain")
# Says nothing where nothing is pruned.
OF_PRUNING = (
    *("structures", "ignored_layers", "align", "shrink", "schedule", "interval", "normalise", "gradient_order"),
    *("compensate", "binarise", "threshold", "max_drop", "tolerance", "lr_mask", "sparsity_attn", "sparsity_mlp"),
    *("rank_batches", "rank_rounds", "latency_batch", "latency_runtime", "latency_dtype"),
)
NOT_APPLICABLE = (CONTINUED, DENSE)

Variant = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One complete result. `variant`: the settings in which it departs from the standard of its method."""

    label: str
    data: Mapping[str, Any]
    variant: Variant = ()

    @cached_property
    def method(self) -> str:
        """As configured; but `dense` where nothing followed, and `one-shot` where upop ranks without a search."""
        if set(self.data["accuracy"]) == {DENSE}:
            return DENSE
        method = str(self.config["method"])
        return ONE_SHOT if method == "upop" and self.config.get("epochs_search") == 0 else method

    @property
    def config(self) -> Mapping[str, Any]:
        values: Mapping[str, Any] = self.data["config"]
        return values

    @property
    def given(self) -> Mapping[str, Any]:
        """The settings as they were asked for: None or `auto` where upop chose; of older results, what it chose."""
        values: Mapping[str, Any] = self.data.get("given") or self.config
        return values

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @cached_property
    def target(self) -> str:
        """What was to be removed, such as `prunable=0.8`; empty for models that are not pruned."""
        return "" if self.method in NOT_APPLICABLE else str(self.config["target"])

    def accuracy(self, stage: str, split: str = "test") -> float | None:
        """In per cent. Stage `last`: retrained, or what came last before it."""
        stages: Mapping[str, Mapping[str, float]] = self.data["accuracy"]
        if stage == "last":
            stage = next(name for name in ("retrain", "slim", "search", DENSE) if name in stages)
        found = stages.get(stage, {}).get(split)
        return None if found is None else 100 * found

    def removed(self, kind: str) -> float:
        """Share that is gone of all parameters (`params`) or MACs (`macs`), else of the prunable parameters."""
        if kind == "macs":
            return 1 - float(self.data["macs"]["after"]) / float(self.data["macs"]["before"])
        return float(self.data["ratio"]["params" if kind == "params" else "prunable"])

    def kept(self, kind: str) -> tuple[float, ...]:
        """Surviving share of the units of a kind, per layer, in [0, 1]."""
        widths = self.data["widths"]
        pairs = zip(widths["after"][kind], widths["before"][kind], strict=True)
        return tuple(after / before for after, before in pairs)


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only, sorted by it. `place`: their model and data, where a folder has several."""

    method: str
    target: str
    variant: Variant
    runs: tuple[Run, ...]
    place: Variant = ()

    @property
    def settings(self) -> Variant:
        """The variant without the model and data."""
        return tuple((key, value) for key, value in self.variant if key not in PLACES)

    @property
    def name(self) -> str:
        return self.method + in_words((*self.settings, *self.place))


@dataclass(frozen=True)
class Results:
    """What a folder holds. `study` is empty without a study.json; `absent` maps labels to what became of them."""

    study: Mapping[str, Any]
    runs: tuple[Run, ...]
    dense: tuple[Run, ...]
    absent: Mapping[str, str]
    notes: tuple[str, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, by method, variant and ratio."""
        found: dict[tuple[str, str, Variant], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: (run.seed, run.label)):
            found.setdefault((run.method, run.target, run.variant), []).append(run)
        several = [key for key in PLACES if any(key in dict(run.variant) for run in self.runs)]
        groups = [Group(*key, tuple(runs), _place(runs[0], several)) for key, runs in found.items()]
        return tuple(sorted(groups, key=_group_order))

    @property
    def classes(self) -> int | None:
        names = [len(run.data["data"]["classes"]) for run in (*self.runs, *self.dense) if "data" in run.data]
        return names[0] if names and len(set(names)) == 1 else None


def _place(run: Run, keys: Iterable[str]) -> Variant:
    return tuple((key, run.config.get(key)) for key in keys)


def _group_order(group: Group) -> tuple[Any, ...]:
    return method_order(group.method), bool(group.settings), repr(group.variant), removal(group.target)


def load_results(folder: Path) -> Results:
    """Read every result of `folder`: `<label>/result.json` or `<label>.json`, with or without a study.json."""
    if not folder.is_dir():
        raise UpopError(
            f"{folder}: expected a folder with results, got none; run a study first or name another folder"
        )
    study = _study(folder)
    paths = _result_files(folder)
    listed = set(study.get("runs", paths)) | ({study["dense"]} if study.get("dense") else set())
    notes = [f"{label}: not in study.json, left out" for label in sorted(set(paths) - listed)]
    if study.get("dense") and study["dense"] not in paths:
        notes.append(f"{study['dense']}: the dense run of the study has no result here")
    runs = [Run(label, _result(paths[label], folder)) for label in sorted(set(paths) & listed)]
    absent = _absent(study, paths)
    runs = [run for run in runs if run.label not in absent]
    if not runs:
        _refuse(folder, "", "results", "none", "run the study first, or name a folder that holds its results")
    dense = tuple(run for run in runs if run.method == DENSE or run.label == study.get("dense"))
    pruned, more = _with_variants(_by_images([run for run in runs if run not in dense]), study.get("base", {}))
    return Results(study, pruned, dense, absent, tuple([*notes, *more, *_starts(pruned)]))


def removal(target: str) -> tuple[str, float]:
    """`prunable=0.8` -> ("prunable", 0.8); targets without a number sort last."""
    kind, _, value = target.partition("=")
    try:
        return kind, float(value)
    except ValueError:
        return f"~{target}", math.inf


def share(target: str, runs: Iterable[Run]) -> float:
    """What a target removes, in [0, 1]; where it says what is to be left, what `runs` of it removed on average."""
    kind, number = target.partition("=")[0], removal(target)[1]
    return number if number <= 1 else statistics.fmean(run.removed(kind) for run in runs if run.target)


def method_order(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def in_words(settings: Variant) -> str:
    """Settings as they follow a name."""
    return "".join(f", {key}={show(value)}" for key, value in settings)


def show(value: Any) -> str:
    """A setting's value as one reads it."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _result_files(folder: Path) -> dict[str, Path]:
    inside = {path.parent.name: path for path in folder.glob("*/result.json")}
    beside = {path.stem: path for path in folder.glob("*.json") if path.name != "study.json"}
    both = sorted(set(inside) & set(beside))
    if both:
        _refuse(folder, both[0], "one result per label", "a folder and a file", "delete one of them")
    return inside | beside


def _study(folder: Path) -> Mapping[str, Any]:
    path = folder / "study.json"
    if not path.exists():
        return {}
    study = _read(path, folder, "run the study again")
    if study.get("schema") != 1:
        got = f"schema {study.get('schema')!r}"
        _refuse(folder, path.name, "a study of schema 1", got, "run the study again with this version, or delete it")
    if (wrong := first_study_fault(study)) is not None:
        key, expected, value = wrong
        _refuse(folder, path.name, f"{key} as {expected}", _short(value), "run the study again")
    return study


def _absent(study: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, str]:
    absent = {}
    for label, entry in sorted(study.get("runs", {}).items()):
        state = entry.get("state", "missing")
        if state != "done":
            absent[label] = f"{state}: {entry['error']}" if entry.get("error") else state
        elif label not in paths:
            absent[label] = "missing: study.json calls it done, but there is no result"
    return absent


def _refuse(folder: Path, name: str, expected: str, got: str, advice: str) -> NoReturn:
    raise UpopError(f"{folder / name}: expected {expected}, got {got}; {advice}")


def _read(path: Path, folder: Path, advice: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except UpopError as error:
        raise UpopError(f"{error}; {advice}, or delete the file") from None
    except OSError as error:
        name = path.relative_to(folder).as_posix()
        _refuse(folder, name, "a file that can be read", str(error.strerror), f"{advice}, or delete the file")


def _result(path: Path, folder: Path) -> Mapping[str, Any]:
    advice = "run it again with this version, or delete the file"
    data, name = _read(path, folder, "run it again"), path.relative_to(folder).as_posix()
    if data.get("schema") != SCHEMA:
        _refuse(folder, name, f"a result of schema {SCHEMA}", f"schema {data.get('schema')!r}", advice)
    if data.get("status") != "complete":
        _refuse(folder, name, "status 'complete'", repr(data.get("status")), advice)
    if (wrong := first_fault(data)) is not None:
        key, expected, value = wrong
        _refuse(folder, name, f"{key} as {expected}", _short(value), advice)
    return data


def _short(value: Any) -> str:
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _by_images(runs: list[Run]) -> list[Run]:
    """The runs with one name for the same images, wherever they lay, and others for others that lay at one path."""
    marks = [(run.data.get("data") or {}).get("fingerprint") for run in runs]
    first: dict[str, tuple[Any, ...]] = {}
    for run, mark in zip(runs, marks, strict=True):
        if mark:
            first.setdefault(mark, tuple(run.config.get(key) for key in OF_DATA))
    alike = Counter(first.values())
    names = {mark: f"{at[0]} ({mark[:8]})" if alike[at] > 1 else at[0] for mark, at in first.items()}
    return [
        Run(run.label, {**run.data, **_settings(run, names[mark])}) if mark else run
        for run, mark in zip(runs, marks, strict=True)
    ]


def _settings(run: Run, data: str) -> dict[str, Any]:
    return {key: {**run.data[key], "data": data} for key in ("config", "given") if run.data.get(key)}


def _with_variants(runs: list[Run], base: Mapping[str, Any]) -> tuple[tuple[Run, ...], list[str]]:
    """The runs with their variants named, repeated ones left out; and what a reader must know about that."""
    keys = [key for key in sorted({k for run in runs for k in run.config} - set(APART)) if _varies(runs, key)]
    # Of one shape, and one for each seed, they are what one model came to with that seed.
    shapes = {(run.data["params"]["before"], run.data["macs"]["before"]) for run in runs}
    models = [(run.seed, run.data.get("start") or run.config.get("model")) for run in runs]
    if len(shapes) > 1 or len(set(models)) > len({run.seed for run in runs}):
        keys.append("model")
    notes: list[str] = []
    found: dict[tuple[Any, ...], Run] = {}
    # Of repeats the one with most stages stands: a run of the search alone may lie beside the whole of it.
    for run in sorted(runs, key=lambda run: -len(run.data["accuracy"])):
        variant = tuple((key, _setting(run.config, key)) for key in keys if _departs(run, key, runs, base))
        named = Run(run.label, run.data, variant)
        first = found.setdefault((named.method, named.target, named.variant, named.seed), named)
        if first is not named:
            notes.append(f"{run.label}: repeats the settings and seed of {first.label}, left out")
    notes.sort()
    # How masks shrink is what makes the methods: no news.
    for key in (key for key in dict.fromkeys((*keys, *LENGTHS)) if key != "shrink"):
        usual = {
            method: _standard(key, method, runs, base)
            for method in sorted({run.method for run in runs}, key=method_order)
        }
        if len({json.dumps(value) for value in usual.values()}) > 1:
            notes.append(f"{key} is not the same for all: " + ", ".join(f"{m} {show(v)}" for m, v in usual.items()))
    return tuple(sorted(found.values(), key=lambda run: run.label)), notes


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """A setting; where a version that did not know it yet has written the result, as it is by default."""
    return settings.get(key, DEFAULTS.get(key))


def _varies(runs: Sequence[Run], key: str) -> bool:
    """Whether runs differ in a setting, and not only in what upop made of the same one."""
    kinds = ([run.config for run in runs], [run.given for run in runs])
    return all(len({json.dumps(_setting(settings, key), sort_keys=True) for settings in kind}) > 1 for kind in kinds)


def _departs(run: Run, key: str, runs: Sequence[Run], base: Mapping[str, Any]) -> bool:
    """Whether a setting makes the run a variant of its method."""
    if run.method == CONTINUED and key in OF_PRUNING:
        return False
    value, standard = _setting(run.config, key), _standard(key, run.method, runs, base)
    # A setting without a meaning for a method is null there: that is no variant.
    if value == standard or (value is None and DEFAULTS.get(key)):
        return False
    # Nor is what upop made of that which was asked for in standard runs too.
    peers = _peers(key, run.method, runs)
    asked = [_setting(other.given, key) for other in peers if _setting(other.config, key) == standard]
    return "given" not in run.data or _setting(run.given, key) not in asked


def _peers(key: str, method: str, runs: Iterable[Run]) -> list[Run]:
    """The runs whose values of a setting say what is usual for `method`."""
    return [run for run in runs if key in DEFAULTS or key in PLACES or run.method == method]


def _standard(key: str, method: str, runs: Iterable[Run], base: Mapping[str, Any]) -> Any:
    """The value of a setting that makes no variant.

    That is the study's, else the default, else the commonest: over all methods for what `DEFAULTS` knows and for model
    and data, else over the runs of `method`, because a method may bring its own (how its masks shrink, how long it
    searches).
    """
    values = Counter(json.dumps(_setting(run.config, key), sort_keys=True) for run in _peers(key, method, runs))
    for known in (base, DEFAULTS):
        if key in known and json.dumps(known[key], sort_keys=True) in values:
            return known[key]
    return json.loads(min(values, key=lambda text: (-values[text], text)))


def _starts(runs: Iterable[Run]) -> list[str]:
    """A warning where runs of one seed and model did not start from one dense model: they cannot be paired fairly."""
    starts: dict[tuple[int, Variant], list[Run]] = {}
    for run in runs:
        where = tuple(pair for pair in run.variant if pair[0] in PLACES)
        starts.setdefault((run.seed, where), []).append(run)
    return [
        f"seed {seed}{in_words(where)}: its runs start from {count} different dense models"
        for (seed, where), found in sorted(starts.items(), key=lambda item: repr(item[0]))
        if (count := _count_starts(found)) > 1
    ]


def _count_starts(runs: Sequence[Run]) -> int:
    """By the dense models' weights where all runs say them, else by their test accuracies."""
    weights = {run.data.get("start") for run in runs}
    return len({run.accuracy(DENSE) for run in runs} if None in weights else weights)
