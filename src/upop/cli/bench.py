"""`upop bench`: dense against pruned models side by side, as a table, a picture and bench.json."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from upop.cli.show import clock, out, quiet_libraries, table
from upop.disk import disk_errors
from upop.errors import UpopError
from upop.folder import MARK

PICTURE = "bench.png"


def bench(
    dense: Annotated[str, typer.Argument(help="model folder that all others are compared with")],
    pruned: Annotated[list[str], typer.Argument(help="one or more model folders")],
    runtimes: Annotated[str, typer.Option(help="of eager, compile, onnx")] = "eager,compile,onnx",
    dtypes: Annotated[str, typer.Option(help="of float32, bfloat16")] = "float32,bfloat16",
    batches: Annotated[
        str | None, typer.Option(help="images in a pass [1,8,64; on a GPU 1,4,16,64,256,1024]", show_default=False)
    ] = None,
    seconds: Annotated[str, typer.Option(help="per cell of runtime, dtype and batch, for all models")] = "5",
    threads: Annotated[str | None, typer.Option(help="CPU threads [torch's own choice]", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    folder: Annotated[Path, typer.Option("--out", help="folder for bench.json and bench.png")] = Path("runs/bench"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the bench that OUT already holds")] = False,
) -> None:
    """Time dense and pruned models side by side, in turns, in every runtime, dtype and batch.

    Example: upop bench runs/half/dense runs/half/model --batches 1,64
    """
    quiet_libraries()
    from upop.benchrun import FILE, Grid, run_bench
    from upop.plots import accuracy_over_time

    grid = Grid(
        runtimes=_words(runtimes),
        dtypes=_words(dtypes),
        batches=[] if batches is None else _numbers("--batches", batches),
        seconds=_seconds(seconds),
        threads=None if threads is None else _whole("--threads", threads),
        device=device,
    )
    _prepare(folder, overwrite=overwrite)
    began = time.monotonic()
    try:
        with BenchWatcher() as watcher:
            found = run_bench([dense, *pruned], grid, out=folder, watcher=watcher)
    except UpopError:
        with contextlib.suppress(OSError):  # not empty: some cells are there
            folder.rmdir()
        raise
    _print_bench(found)
    unknown = [model.name for model in found.models if not model.accuracy]
    if unknown:
        out.print(f"no accuracy is known for {', '.join(unknown)}: no result.json beside it with these weights")
    written = [FILE]
    if len(unknown) < len(found.models) and any(row.median_ms is not None for row in found.rows):
        accuracy_over_time(found.to_dict(), folder / PICTURE)
        written.append(PICTURE)
    out.print(f"{clock(time.monotonic() - began)} in all; in {folder}: {' '.join(written)}", markup=False)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> list[int]:
    if not (words := _words(text)):
        raise UpopError(f"{option}: expected whole numbers such as 1,8,64, got {text!r}")
    return [_whole(option, word) for word in words]


def _whole(option: str, text: str) -> int:
    if not text.isdecimal():
        raise UpopError(f"{option}: expected a whole number, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UpopError(f"--seconds: expected a number such as 5 or 0.5, got {text!r}") from None


def _prepare(folder: Path, *, overwrite: bool) -> None:
    """Before anything is measured: the folder is there, can be written to, and no run's."""
    from upop.benchrun import FILE

    if any((folder / name).exists() for name in (FILE, PICTURE)) and not overwrite:
        raise UpopError(f"out {folder}: already holds a bench; choose another folder, or say --overwrite")
    if (folder / MARK).exists() or (folder / "config.json").exists():
        raise UpopError(f"out {folder}: holds a run or a model; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UpopError(f"out {folder}: expected a folder, found a file; choose another name")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # An older picture must not stay beside new numbers.
        (folder / PICTURE).unlink(missing_ok=True)


class BenchWatcher:
    """Says which cell is being measured: on a line that comes and goes on a terminal, a line per cell elsewhere."""

    def __init__(self) -> None:
        self._status = out.status("loading models")
        self._began = time.monotonic()

    def __enter__(self) -> "BenchWatcher":
        self._status.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._status.stop()

    def begins(self, cell: Any, number: int, cells: int) -> None:
        left = ""
        if number > 1:
            each = (time.monotonic() - self._began) / (number - 1)
            left = f", about {clock(each * (cells - number + 1))} left"
        else:
            self._began = time.monotonic()
        self._line = f"cell {number}/{cells}: {cell}"
        self._status.update(f"{self._line}{left}")

    def ends(self, rows: Sequence[Any]) -> None:
        times = ", ".join(f"{row.median_ms:.2f}" if row.median_ms is not None else "refused" for row in rows)
        ratios = ", ".join(f"{row.speedup:.2f}" for row in rows[1:] if row.speedup is not None)
        faster = f"; times as fast: {ratios}" if ratios else ""
        out.print(f"{self._line}: ms {times}{faster}", markup=False)


def _print_bench(found: Any) -> None:
    sizes = table("", "parameters", "MACs an image", "accuracy")
    for model in found.models:
        accuracy = ", ".join(f"{split} {100 * value:.2f} %" for split, value in model.accuracy.items())
        sizes.add_row(model.name, f"{model.params:,}", f"{model.macs:,}", accuracy or "?")
    out.print()
    out.print(sizes)
    out.print()
    out.print(_times(found))
    out.print()
    for reason, cells in _refused(found).items():
        out.print(f"not measured: {', '.join(cells)}: {reason}", style="yellow", markup=False)
    for row in found.rows:
        if row.warning:
            out.print(f"warning: {row.model}, {row.cell}: {row.warning}", style="yellow", markup=False)
    facts = found.facts
    threads = f", threads: {facts['threads']}" if facts["device"] == "cpu" else ""
    out.print(
        f"{facts['hardware']['device']}{threads}; one process, in turns; ratios of neighbouring passes", markup=False
    )
    out.print(f"energy: {facts['energy']}", markup=False)


def _times(found: Any) -> Any:
    columns = ["", "ms", "spread", "images/s", "ratio", "MiB"]
    energy = any(row.joules_per_image is not None for row in found.rows)
    times = table(*columns, *(["mJ/image"] if energy else []))
    before = None
    for row in found.rows:
        if row.median_ms is None:
            continue
        if row.cell != before:
            times.add_row(str(row.cell))
            before = row.cell
        times.add_row(
            f"  {row.model}",
            f"{row.median_ms:.2f}",
            f"{row.spread_ms:.2f}",
            f"{row.images_per_s:,.0f}",
            _or_blank(row.speedup),
            _or_blank(row.memory_mib),
            *([_or_blank(row.joules_per_image, 1e3)] if energy else []),
        )
    return times


def _or_blank(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{factor * value:.2f}"


def _refused(found: Any) -> dict[str, list[str]]:
    """Reasons, each with all the cells that it holds for: one reason often holds for all batches."""
    groups: dict[str, dict[str, list[str]]] = {}
    for row in found.rows:
        if row.refused:
            batches = groups.setdefault(row.refused, {}).setdefault(f"{row.runtime} {row.dtype}", [])
            batches += [str(row.batch)] if str(row.batch) not in batches else []
    return {
        reason: [f"{name} batch {', '.join(batches)}" for name, batches in found.items()]
        for reason, found in groups.items()
    }
