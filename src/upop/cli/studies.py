"""`upop study`, `upop report`, `upop animate`: many runs, what they say, and a search as a moving picture."""

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from upop.cli.show import clock, out, quiet_libraries, table
from upop.disk import write_whole
from upop.errors import StopError, UpopError

if TYPE_CHECKING:
    from upop.studyfile import Study

STATES = {"missing": "to do", "done": "done", "failed": "failed"}


def study(
    name: Annotated[str, typer.Argument(help="smoke, claims, ... or a path to a .toml file")],
    folder: Annotated[Path | None, typer.Option("--out", help="folder for all runs [runs/NAME]")] = None,
    data: Annotated[str | None, typer.Option(help="in place of the study's own data")] = None,
    threads: Annotated[str | None, typer.Option(help="CPU threads per run, in place of the study's own")] = None,
    executor: Annotated[str, typer.Option(help="local, processes, ray or slurm")] = "local",
    workers: Annotated[int | None, typer.Option(help="runs at a time")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per run, 0 or 1 [1 where there are any]")] = None,
    address: Annotated[str | None, typer.Option(help="of Ray: local, auto, HOST:PORT; of slurm: local, debug")] = None,
    partition: Annotated[str | None, typer.Option(help="of Slurm")] = None,
    minutes: Annotated[int, typer.Option(help="limit per run, for Slurm")] = 1440,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="also run again what failed before")] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="results made by another version of the code count too")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace complete results that do not count")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs, which are done, and stop")] = False,
) -> None:
    """Do all runs of a study that are not done yet, then write its report.

    Example: upop study smoke
    """
    from upop.studyfile import find_study, load_study

    path = find_study(name)
    folder = folder or Path("runs") / path.stem
    overrides = {key: value for key, value in (("data", data), ("threads", threads)) if value is not None}
    loaded = load_study(path, folder, overrides)
    if dry_run:
        _list_runs(path, loaded, folder, any_code)
        return
    from upop.executors import make_executor

    chosen = make_executor(executor, workers=workers, gpus=gpus, address=address, partition=partition, minutes=minutes)
    quiet_libraries()
    from upop.study import run_study

    # As Ctrl-C: what runs beside this process is asked to end, and waited for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with StudyWatcher(path.stem, chosen.workers) as watcher:
        try:
            summary = run_study(
                loaded,
                folder,
                executor=chosen,
                observer=watcher,
                run_observer=watcher if executor == "local" else None,
                retry_failed=retry_failed,
                any_code=any_code,
                overwrite=overwrite,
            )
        except StopError as stop:
            raise StopError(f"{str(stop).partition(';')[0]}; the same command goes on from there") from stop
    for label, error in summary.failed.items():
        out.print(f"failed: {label}: {error}", style="yellow", markup=False)
    if not summary.ran:
        out.print("nothing to do: every run is done" + (" or failed before" if summary.failed else ""))
    out.print(
        f"{len(summary.done)} done, {len(summary.failed)} failed, {len(summary.ran)} of them run now, "
        f"{clock(summary.seconds)}"
    )
    if summary.done:
        _write_report(folder, folder)
    if summary.failed:
        raise UpopError(f"{len(summary.failed)} runs failed; see {folder / 'failed'}, then use --retry-failed")


def _list_runs(path: Path, loaded: "Study", folder: Path, any_code: bool) -> None:
    from upop.study import look

    quiet_libraries()
    runs = look(loaded, folder, any_code=any_code)
    counts = ((len([run for run in runs if run.state == state]), word) for state, word in STATES.items())
    said = ", ".join(f"{count} {word}" for count, word in counts if count)
    out.print(f"{path}: {len(runs)} runs{', a dense model first' if loaded.dense else ''}: {said}", markup=False)
    for run in runs:
        why = f" ({run.why})" if run.why else ""
        out.print(f"  {STATES[run.state]:<6}  {run.label}{why}", markup=False)


def report(
    results: Annotated[Path, typer.Argument(help="folder of a study, or of result files")],
    folder: Annotated[Path | None, typer.Option("--out", help="where to write [RESULTS]")] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="also copy the results there, a small file each, to be checked in")
    ] = False,
) -> None:
    """Make one HTML page and its Markdown twin from results on disk. Needs no torch.

    Example: upop report runs/claims --out results/claims --collect
    """
    target = folder or results
    if collect:
        if target.resolve() == results.resolve():
            raise UpopError("--collect: expected another folder in --out than the one that holds the results")
        from upop.collect import collect as copy

        out.print(f"{copy(results, target)} results in {target}", markup=False)
    _write_report(target if collect else results, target)


def animate(
    run: Annotated[Path, typer.Argument(help="folder of a run that has searched")],
    file: Annotated[Path | None, typer.Option("--out", help="a .html, .gif or .mp4 file [RUN/search.html]")] = None,
) -> None:
    """Turn a run's recorded masks into a moving picture of its search.

    Example: upop animate runs/demo --out search.gif
    """
    from upop.animate import animate as draw

    out.print(f"{draw(run, file or run / 'search.html')}", markup=False)


def _write_report(results: Path, target: Path) -> None:
    from upop.report.page import build

    for name, ours in (("report.html", "<title>upop: "), ("report.md", "# upop: ")):
        if (target / name).exists() and ours not in (target / name).read_text(encoding="utf-8", errors="replace"):
            raise UpopError(f"{target / name}: is no report of upop; choose another folder with --out")
    made = build(results)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", made.html), ("report.md", made.markdown)):
        write_whole(target / name, text)
    out.print(f"report: {target / 'report.html'} and report.md", markup=False)


class StudyWatcher:
    """A live table on a terminal, a line per run elsewhere."""

    def __init__(self, name: str, workers: int) -> None:
        self._name, self._workers = name, workers
        self._counts = {"to do": 0, "done": 0, "failed": 0}
        self._running: dict[str, float] = {}
        self._best: dict[str, tuple[float, str]] = {}
        self._times: list[float] = []
        self._facts = ""
        self._live = Live(console=out, refresh_per_second=2, transient=True, get_renderable=self._draw)

    def __enter__(self) -> "StudyWatcher":
        if out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if out.is_terminal:
            self._live.stop()

    def planned(self, todo: int, done: int, failed: int) -> None:
        self._counts = {"to do": todo, "done": done, "failed": failed}
        out.print(f"{self._name}: {todo} runs to do, {done} done before, {failed} failed before")

    def started(self, label: str) -> None:
        self._running[label] = time.monotonic()
        self._facts = ""

    def finished(self, label: str, error: str | None, result: Any, seconds: float) -> None:
        self._running.pop(label, None)
        self._times.append(seconds)
        self._counts["to do"] -= 1
        self._counts["done" if error is None else "failed"] += 1
        if result is None:
            out.print(f"failed: {label}: {error}", style="yellow", markup=False)
            return
        stage, accuracy = list(result["accuracy"].items())[-1]
        if stage == "retrain":
            target = result["config"]["target"]
            self._best[target] = max(self._best.get(target, (0.0, "")), (accuracy["validation"], label))
        counts = self._counts
        out.print(
            f"done: {label}: {stage} validation {100 * accuracy['validation']:.2f} %, {clock(seconds)}; "
            f"{counts['to do']} to do, {self._left()} left",
            markup=False,
        )

    # As the observer of a run in this process.
    def stage(self, name: str, about: str) -> None:
        self._facts = name

    def progress(self, progress: Any) -> None:
        self._facts = f"{self._facts.split(' ')[0]} {progress.step}/{progress.steps}"

    def epoch(self, number: int, accuracy: float) -> None: ...

    def _left(self) -> str:
        if not self._times:
            return "?"
        # The dense model's run is another kind of run: the middle one tells more than the mean.
        typical = sorted(self._times)[len(self._times) // 2]
        return clock(typical * self._counts["to do"] / self._workers)

    def _draw(self) -> Group:
        counts = table("", "to do", "running", "done", "failed", "time left")
        numbers = [str(self._counts["to do"]), str(len(self._running)), str(self._counts["done"])]
        counts.add_row(self._name, *numbers, str(self._counts["failed"]), self._left())
        lines = [
            Text(f"  {label}  {clock(time.monotonic() - began)}  {self._facts}")
            for label, began in sorted(self._running.items())[:8]
        ]
        best = [
            Text(f"  best {target}: {100 * a:.2f} % validation, {label}") for target, (a, label) in self._best.items()
        ]
        return Group(counts, *lines, *best)
