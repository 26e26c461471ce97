"""Study files: a study as differences against a base, read and expanded into runs.

    about = "What the study asks."
    seeds = [0, 1, 2]
    [dense]                       # trained once, the start of all runs
    model = "deit-tiny-cifar-6layers"
    epochs_dense = 60
    [base]                        # what all runs share
    data = "cifar10"
    [[grid]]                      # lists multiply; every seed is one more run
    method = ["upop", "mask"]
    target = ["prunable=0.5", "prunable=0.8"]

Must not run anything.
"""

import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.config import ConfigError, PruneConfig, make_config
from upop.configtext import load_config
from upop.errors import nearest, shortened

ALWAYS = ("method", "target", "seed")  # named in every label
NOT_A_DIFFERENCE = ("out", "model", "stages", "tracker")
TEXTS = ("about", "command", "hardware", "wall_clock", "expected")
TABLES = ("dense", "base", "grid")
DENSE = "dense"  # the label of the run that trains the model all others start from


@dataclass(frozen=True)
class StudyRun:
    """One run: its label, which is its folder's name too, its differences to the base, and its configuration."""

    label: str
    differences: Mapping[str, Any]
    config: PruneConfig


@dataclass(frozen=True)
class Study:
    """A study as its file says it, expanded: `dense` first, if any, then `runs`, none twice."""

    name: str
    path: Path
    texts: Mapping[str, str]
    seeds: tuple[int, ...]
    base: Mapping[str, Any]
    dense: StudyRun | None
    runs: tuple[StudyRun, ...]


def find_study(name: str) -> Path:
    """The file of the study called `name`, or at that path. Raises ConfigError with the names there are."""
    if name.endswith(".toml"):
        return Path(name)
    folders = [Path("studies"), Path(__file__).parent / "studies", Path(__file__).parents[2] / "studies"]
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")})
    raise ConfigError(
        f"study {name!r}: expected a file ending in .toml or one of {', '.join(known)}{nearest(name, known)}"
    )


def load_study(path: Path, out: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read and expand a study whose runs will lie in `out`; `overrides` replace keys of its base, as `data` for one.

    Raises ConfigError in one line, naming the file and the table, for whatever a study cannot be.
    """
    raw = _read(path)
    overrides = dict(overrides or {})
    seeds = _seeds(raw.get("seeds", [0]), path)
    base = {"stages": "search,retrain"} | raw.get("base", {}) | overrides
    dense = None
    if "dense" in raw:
        shared = {key: value for key, value in base.items() if key in ("data", "validation", "subset", "skip_bad")}
        values = {"latency_seconds": base.get("latency_seconds", 5.0)} | shared | raw["dense"]
        values |= {key: value for key, value in overrides.items() if key in ("data", "subset", "threads")}
        values |= {"stages": "dense", "out": str(out / DENSE)}
        dense = StudyRun(DENSE, {}, make_config(values, f"{path} [dense]"))
        base["model"] = str(out / DENSE / "model")
    if "model" not in base or "data" not in base:
        missing = "model" if "model" not in base else "data"
        raise ConfigError(
            f"{path}: expected {missing} in [base]" + (" or a table [dense]" if missing == "model" else "")
        )
    runs: dict[str, StudyRun] = {}
    for number, table in enumerate(raw.get("grid", []), 1):
        for differences in _expand(table, seeds, f"{path} [[grid]] {number}"):
            run = _make_run(base, differences, out, f"{path} [[grid]] {number}")
            _refuse_namesake(runs.setdefault(run.label, run), run, f"{path} [[grid]] {number}")
    if not runs:
        raise ConfigError(f'{path}: expected a table [[grid]] with at least one run, such as method = ["upop"]')
    texts = {key: str(raw.get(key, "")) for key in TEXTS}
    texts["command"] = texts["command"] or _command(path, overrides)
    shown = {key: value for key, value in base.items() if key not in ("model", "out")}
    return Study(path.stem, path, texts, seeds, shown, dense, tuple(runs.values()))


def _command(path: Path, overrides: Mapping[str, Any]) -> str:
    """The line that runs the study: by its name where it is found by that, else by its file, wherever that lies."""
    try:
        name = path.stem if find_study(path.stem) == path else path.name
    except ConfigError:
        name = path.name
    options = (word for key, value in overrides.items() for word in (f"--{key}", str(value)))
    return shlex.join(["upop", "study", name, *options])


def _read(path: Path) -> dict[str, Any]:
    raw = load_config(path)
    known = (*TEXTS, "seeds", *TABLES)
    for key in raw:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    for key, kind in (("dense", dict), ("base", dict), ("grid", list)):
        if key in raw and not isinstance(raw[key], kind):
            raise ConfigError(f"{path}: expected {key} as {'[[grid]] tables' if kind is list else f'a table [{key}]'}")
    return raw


def _seeds(value: Any, path: Path) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(isinstance(n, int) and n >= 0 for n in value)
    if not good or len(set(value)) != len(value):
        raise ConfigError(f"{path}: seeds: expected different whole numbers such as [0, 1, 2], got {shortened(value)}")
    return tuple(value)


def _expand(table: Mapping[str, Any], seeds: tuple[int, ...], where: str) -> list[dict[str, Any]]:
    """All combinations of the table's lists, with every seed unless it names its own."""
    choices: dict[str, list[Any]] = {}
    for key, value in table.items():
        if key in NOT_A_DIFFERENCE:
            raise ConfigError(f"{where}: {key} is the same for all runs of a study; leave it out of the grid")
        choices[key] = value if isinstance(value, list) else [value]
        if not choices[key]:
            raise ConfigError(f"{where}: {key}: expected at least one value, got an empty list")
        if len({repr(v) for v in choices[key]}) != len(choices[key]):
            raise ConfigError(f"{where}: {key}: expected different values, got {shortened(value)}")
    choices.setdefault("seed", list(seeds))
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _make_run(base: Mapping[str, Any], differences: Mapping[str, Any], out: Path, where: str) -> StudyRun:
    """A run whose label says how it differs from the base: the same run has the same label in every grid."""
    plain = make_config({**base, "out": str(out)}, where.partition(" ")[0] + " [base]")
    config = make_config({**base, **differences, "out": str(out)}, where)
    new, old = config.model_dump(), plain.model_dump()
    real = {key: new[key] for key in new if key in ALWAYS or new[key] != old[key]}
    label = "_".join(_part(key, real[key]) for key in (*ALWAYS[:2], *sorted(set(real) - set(ALWAYS)), "seed"))
    return StudyRun(label, real, config.model_copy(update={"out": str(out / label)}))


def _refuse_namesake(known: StudyRun, run: StudyRun, where: str) -> None:
    """Raise ConfigError where two runs have one label, and so one folder: labels keep no more than plain letters."""
    old, new = known.config.model_dump(), run.config.model_dump()
    for key in new:
        if new[key] != old[key]:
            raise ConfigError(
                f"{where}: {key}: expected values that differ in letters from a to z, digits or one of .+-, got "
                f"{old[key]!r} and {new[key]!r}, whose runs would both be {run.label}; rename one, or give it a study "
                "of its own"
            )


def _part(key: str, value: Any) -> str:
    text = str(value) if key in ("method", "target") else f"s{value}" if key == "seed" else f"{key}-{value}"
    # Between numbers a comma says something: layers 1,2 are not layer 12, and 0,-1 is no range.
    text = re.sub(r",(?=-?\d)", "+", text)
    return re.sub(r"[^A-Za-z0-9.+-]", "", text.replace("_", "-"))
