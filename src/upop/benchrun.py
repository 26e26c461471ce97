"""Measures models side by side: every runtime, dtype and batch, all models in one process and in turns.

Must not judge what it finds, and must not change the models.
"""

import gc
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from upop.bench import Bench, Cell, Row, Subject, judge, recorded_accuracy
from upop.disk import write_whole
from upop.errors import UpopError
from upop.families import find_structures
from upop.folder import provenance, weights_hash
from upop.meters import MIB, Meter, find_meter, peak_mib
from upop.models import load_model
from upop.plan import cpu_threads, device_type
from upop.profiling import Times, count_macs, count_params, time_in_turns
from upop.runtimes import DTYPES, RUNTIMES, check_choice, first_line, make_runner
from upop.structures import widths

log = logging.getLogger(__name__)

BATCHES = {"cpu": (1, 8, 64), "cuda": (1, 4, 16, 64, 256, 1024)}
MIN_RUNS = 10
ENERGY_SECONDS = 2.0  # of each model alone; the counters move only some ten times a second
FILE = "bench.json"
MEMORY = (
    "peak of torch's tensors in one pass, with weights, without images and without scratch space past torch's "
    "allocator; not measured for onnx, whose allocator does not tell"
)
Runner = Callable[[], object]


@dataclass(frozen=True)
class Grid:
    """What is measured: each of `runtimes` in each of `dtypes` at each of `batches`.

    Attributes:
        batches: images in a pass; empty = BATCHES of the device.
        seconds: of each cell, for all models together; each runs MIN_RUNS times even if that takes longer.
        threads: of the CPU; None = as many as torch has. device: auto, cpu or cuda.

    Raises UpopError for what is none of RUNTIMES or DTYPES, nothing to measure, and numbers that make no sense.
    """

    runtimes: Sequence[str] = RUNTIMES
    dtypes: Sequence[str] = DTYPES
    batches: Sequence[int] = ()
    seconds: float = 5.0
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for what, chosen, known in (("runtimes", self.runtimes, RUNTIMES), ("dtypes", self.dtypes, DTYPES)):
            if not chosen:
                raise UpopError(f"{what}: expected one or more of {', '.join(known)}, got none")
            for value in chosen:
                check_choice(what, value, known)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if bad := [batch for batch in self.batches if batch < 1]:
            raise UpopError(f"batches: expected numbers of images from 1, got {bad[0]}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise UpopError(f"seconds: expected a number from 0, got {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise UpopError(f"threads: expected at least 1, got {self.threads}")

    def cells(self, device: torch.device) -> list[Cell]:
        batches = self.batches or BATCHES[device.type]
        chosen = product(self.runtimes, self.dtypes, batches)
        return list(dict.fromkeys(Cell(runtime, dtype, batch) for runtime, dtype, batch in chosen))


class Watcher(Protocol):
    """Who watches a benchmark."""

    def begins(self, cell: Cell, number: int, cells: int) -> None:
        """Cell `number` of `cells`, from 1, is being measured."""

    def ends(self, rows: Sequence[Row]) -> None:
        """The rows of that cell, not judged yet: warnings need all cells."""


class Nobody:
    """Watches nothing."""

    def begins(self, cell: Cell, number: int, cells: int) -> None: ...
    def ends(self, rows: Sequence[Row]) -> None: ...


def run_bench(sources: Sequence[str], grid: Grid, *, out: Path | None = None, watcher: Watcher | None = None) -> Bench:
    """All models of `sources` (folders, Hub names, built-in shapes) in all cells of `grid`, in turns.

    With `out`, a folder, bench.json is there after every cell. Raises UpopError for fewer than two models, what is no
    model, models of different image sizes and a device that is not there. A cell that cannot run is a row that says
    why.
    """
    watcher = watcher or Nobody()
    device = torch.device(device_type(grid.device))
    models, subjects, size = _load(sources)
    meter = find_meter(device)
    with cpu_threads(grid.threads):
        facts = _facts(grid, device, size, meter)
        for model in models.values():
            model.to(device)
        cells, rows = grid.cells(device), []
        for number, cell in enumerate(cells, 1):
            watcher.begins(cell, number, len(cells))
            found = measure_cell(models, cell, image_size=size, seconds=grid.seconds, device=device, meter=meter)
            rows += found
            status = "complete" if number == len(cells) else "partial"
            bench = Bench(status, facts, subjects, judge(rows, subjects))
            if out is not None:
                write_whole(out / FILE, json.dumps(bench.to_dict(), indent=1) + "\n")
            watcher.ends(found)
    return bench


def _load(sources: Sequence[str]) -> tuple[dict[str, nn.Module], tuple[Subject, ...], int]:
    if len(sources) < 2:
        raise UpopError(f"bench: expected two or more models to compare, got {len(sources)}")
    models: dict[str, nn.Module] = {}
    subjects, sizes = [], []
    for name, source in zip(short_names(sources), sources, strict=True):
        loaded = load_model(source)
        models[name] = loaded.model
        subjects.append(_subject(name, source, loaded.model))
        sizes.append(loaded.image_size)
        if sizes[-1] != sizes[0]:
            raise UpopError(
                f"{source}: expected images of {sizes[0]} pixels like {sources[0]}, got {sizes[-1]}; compare models "
                "that take the same images"
            )
    return models, tuple(subjects), sizes[0]


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each source, no two alike: the run's where it is a run's final model, else the folder's."""
    paths = [Path(source).resolve() if Path(source).exists() else Path(source) for source in sources]
    short = [path.parent.name if path.name == "model" else path.name for path in paths]
    names: list[str] = []
    for path, name, source in zip(paths, short, sources, strict=True):
        alike = {other for other, its_name in zip(paths, short, strict=True) if its_name == name}
        own = name if alike == {path} else source
        # The same model twice is how to see what difference chance makes.
        twice = paths[: len(names)].count(path)
        names.append(f"{own} ({twice + 1})" if twice else own)
    return names


def _subject(name: str, source: str, model: nn.Module) -> Subject:
    try:
        units: Mapping[str, Sequence[int]] = widths(find_structures(model))
    except UpopError:
        units = {}  # of no family that upop prunes; it can be timed all the same
    return Subject(
        name=name,
        folder=source,
        weights=weights_hash(Path(source)),
        params=count_params(model),
        macs=count_macs(model),
        widths=units,
        accuracy=recorded_accuracy(Path(source)),
    )


def measure_cell(
    models: Mapping[str, nn.Module],
    cell: Cell,
    *,
    image_size: int,
    seconds: float,
    device: torch.device,
    meter: Meter,
) -> list[Row]:
    """A row per model, in order. The same random images [B, 3, S, S] for all; what cannot run says so in its row."""
    images = torch.randn(cell.batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    passes: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    for name, model in models.items():
        # Whatever a compiler, an exporter or a full memory throws: the other cells still count.
        try:
            passes[name] = make_runner(model, images, runtime=cell.runtime, dtype=cell.dtype)
            passes[name]()
        except Exception as error:
            passes.pop(name, None)
            refused[name] = _one_line(error)
    try:
        found = _measured(passes, models, cell, seconds=seconds, device=device, meter=meter)
    except Exception as error:
        found = {}
        refused |= dict.fromkeys(passes, _one_line(error))
    del passes
    _free(device)
    return [
        found.get(name) or Row(name, cell.runtime, cell.dtype, cell.batch, refused=refused[name]) for name in models
    ]


def _measured(
    passes: Mapping[str, Runner],
    models: Mapping[str, nn.Module],
    cell: Cell,
    *,
    seconds: float,
    device: torch.device,
    meter: Meter,
) -> dict[str, Row]:
    times = time_in_turns(passes, device=device, min_runs=MIN_RUNS, max_seconds=seconds)
    base = times.get(next(iter(models)))
    rows = {}
    for name, own in times.items():
        low, middle, high = _ratios(base, own)
        rows[name] = Row(
            model=name,
            runtime=cell.runtime,
            dtype=cell.dtype,
            batch=cell.batch,
            median_ms=own.median_ms,
            spread_ms=own.spread_ms,
            runs=own.runs,
            images_per_s=1e3 * cell.batch / own.median_ms,
            speedup=middle,
            speedup_low=low,
            speedup_high=high,
            memory_mib=_memory_mib(passes[name], models[name], cell, device),
            joules_per_image=_joules_per_image(passes[name], own, cell, device, meter),
        )
    return rows


def _ratios(base: Times | None, own: Times) -> tuple[float | None, float | None, float | None]:
    """Quartiles of how many times as fast `own` is, over passes that ran one after the other."""
    if base is None:
        return None, None, None
    ratios = [a / b for a, b in zip(base.runs_ms, own.runs_ms, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def _memory_mib(run: Runner, model: nn.Module, cell: Cell, device: torch.device) -> float | None:
    if cell.runtime == "onnx":
        return None
    itemsize: int = getattr(torch, cell.dtype).itemsize
    return count_params(model) * itemsize / MIB + peak_mib(run, device)


def _joules_per_image(run: Runner, times: Times, cell: Cell, device: torch.device, meter: Meter) -> float | None:
    """Of this model alone: the counters are too slow for single passes that take turns."""
    passes = math.ceil(ENERGY_SECONDS * 1e3 / times.median_ms)

    def work() -> None:
        for _ in range(passes):
            run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    try:
        joules = meter.joules(work)
    except Exception as error:  # a counter that is gone, a driver: the times still count
        log.warning("energy: could not be measured (%s)", _one_line(error))
        return None
    return None if joules is None else joules / (passes * cell.batch)


def _facts(grid: Grid, device: torch.device, image_size: int, meter: Meter) -> dict[str, Any]:
    """What stands in bench.json beside models and rows; to be asked for on the threads that will compute."""
    source = provenance(device)
    onnx = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)}
    return source | {
        "versions": source["versions"] | (onnx or {"onnxruntime": None}),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "image_size": image_size,
        "seconds_per_cell": grid.seconds,
        "min_runs": MIN_RUNS,
        "memory": MEMORY,
        "energy": meter.about,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, UpopError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"
