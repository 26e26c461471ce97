"""What the command line shows: progress, tables, promises kept. Everything shown comes from the library's values."""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from upop.config import STAGES
from upop.configtext import to_toml
from upop.folder import is_main_process


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who reads along may go (`| head`, `| less`): what is going on goes on, and shows nothing more."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


out = _Console(highlight=False, soft_wrap=True, quiet=not is_main_process())
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class _Warnings(logging.Handler):
    """Shows what the library warns of while a run goes on, above the bar; errors end the run and are shown then."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            out.print(f"warning: {record.getMessage()}", style="yellow", markup=False)


class Watcher:
    """Shows a run's progress: a bar on a terminal, a line per epoch elsewhere."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
        )
        self._bar = Bar(*columns, console=out, transient=True)
        self._task: TaskID | None = None
        self._latest: Any = None
        self._name, self._began, self._shown = "", 0.0, 0.0
        self._warnings = _Warnings(logging.WARNING)

    def __enter__(self) -> "Watcher":
        self._bar.start()
        logging.getLogger("upop").addHandler(self._warnings)
        return self

    def __exit__(self, *args: object) -> None:
        logging.getLogger("upop").removeHandler(self._warnings)
        self._bar.stop()

    def stage(self, name: str, about: str) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._name, self._began, self._shown = name, time.monotonic(), 0.0
        self._task = self._bar.add_task(name, total=None, facts="")
        out.print(f"{name}: {about}", markup=False)

    def progress(self, progress: Any) -> None:
        self._latest = progress
        # Reading the numbers waits for the device: twice a second is enough for a person.
        if self._task is None or time.monotonic() - self._shown < 0.5:
            return
        self._shown = time.monotonic()
        ratio = f"  ratio {progress.extra['ratio']:.2f}" if "ratio" in progress.extra else ""
        facts = (
            f"epoch {progress.epoch + 1}/{progress.epochs}  loss {progress.loss:.3f}  "
            f"accuracy {100 * progress.accuracy:.1f} %{ratio}  {progress.images_per_s:,.0f} images/s  "
            f"{clock(progress.seconds_left)} left"
        )
        self._bar.update(self._task, total=progress.steps, completed=progress.step, facts=facts)

    def epoch(self, number: int, accuracy: float) -> None:
        latest = self._latest
        # On a terminal the bar says it; a few lines per stage are enough of a record.
        every = max(1, latest.epochs // 5) if out.is_terminal else 1
        if number % every and number != latest.epochs:
            return
        ratio = f", ratio {latest.extra['ratio']:.3f}" if "ratio" in latest.extra else ""
        out.print(
            f"  {self._name} epoch {number}/{latest.epochs}: loss {latest.loss:.3f}{ratio}, validation "
            f"{100 * accuracy:.2f} %, {latest.images_per_s:,.0f} images/s, {clock(time.monotonic() - self._began)}"
        )


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of some names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def print_plan(plan: Any) -> None:
    from upop.targets import amount

    c = plan.config
    splits = {"train": plan.data.train, "validation": plan.data.validation, "test": plan.data.test}
    images = ", ".join(f"{name} {len(split):,}" for name, split in splits.items() if split is not None)
    stages = {stage: f"{stage} {steps:,} steps" for stage, steps in plan.steps.items()}
    if c.one_shot:
        stages["search"] = f"one-shot ranking in {c.rank_rounds} rounds of {c.rank_batches} batches"
    before, after = plan.analysis.params, plan.params_after
    out.print(str(plan.analysis), markup=False)
    out.print(f"images: {plan.data.name}: {images}", markup=False)
    out.print(f"classes: {len(plan.data.classes)}: {listed(plan.data.classes)}", markup=False)
    said = ", ".join(stages[stage] for stage in STAGES if stage in stages)
    out.print(f"stages: {said}, of {c.batch_size} images each")
    out.print(plan.promise(), markup=False)
    out.print(
        f"parameters: {before:,} -> {after:,} ({100 * (1 - after / before):.1f} % removed); about "
        f"{amount(plan.macs_before, 'macs')} -> {amount(plan.macs_after, 'macs')} an image, if all layers shrank alike"
    )
    out.print("resolved configuration:\n" + to_toml(c), markup=False, end="")


def print_result(result: Mapping[str, Any], folder: Path) -> None:
    splits = list(next(iter(result["accuracy"].values())))
    labels = {"dense": "dense", "search": "after search, masked", "slim": "slimmed", "retrain": "retrained"}
    accuracy = table("", *(f"{split} accuracy" for split in splits))
    for stage, found in result["accuracy"].items():
        accuracy.add_row(labels[stage], *(f"{100 * found[split]:.2f} %" if split in found else "" for split in splits))
    sizes = table("", "before", "after", "ratio")
    for label, key in (("parameters", "params"), ("MACs an image", "macs")):
        before, after = result[key]["before"], result[key]["after"]
        sizes.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    for batch, found in result["latency"].items():
        before, after = found["before"], found["after"]
        share = after["median_ms"] / before["median_ms"]
        sizes.add_row(f"milliseconds, batch {batch}", spread(before), spread(after), f"{share:.3f}")
    out.print()
    out.print(accuracy)
    out.print()
    out.print(sizes)
    out.print()
    skipped = len(result["data"]["skipped"])
    notes = [*result["warnings"], *([f"{skipped} unreadable images were skipped, see result.json"] if skipped else [])]
    for note in notes:
        out.print(f"warning: {note}", style="yellow", markup=False)
    made = " ".join(n for n in ("model/", "result.json", "widths.png", "stages.png") if (folder / n).exists())
    where = f"in {folder}: {made}"
    out.print(f"{clock(result['seconds']['all'])} in all; {where}", markup=False)


def spread(times: Mapping[str, float]) -> str:
    """Median and half the interquartile range: on a busy machine the second is no small part of the first."""
    return f"{times['median_ms']:.2f} ± {times['spread_ms'] / 2:.2f}"


def table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def print_promises(result: Mapping[str, Any]) -> None:
    params = result["params"]
    speed = ", ".join(
        f"{found['before']['median_ms'] / found['after']['median_ms']:.2f} times at batch {batch}"
        for batch, found in result["latency"].items()
    )
    same = (
        "the same"
        if result["accuracy"]["search"]["validation"] == result["accuracy"]["slim"]["validation"]
        else "NOT the same"
    )
    out.print(f"same outputs: masked and slimmed logits differ by at most {result['gap']:.1e}; accuracy is {same}")
    out.print(f"smaller: {100 * (1 - params['after'] / params['before']):.1f} % of the parameters are gone")
    out.print(f"faster: {speed}, measured side by side")


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices off the terminal; warnings of ours stay."""
    # Where torchao is installed, transformers imports it, and it tells of kernels that this machine has no use for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of images that are odd or broken: those that cannot be used are named in a line of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Told before it is imported, which takes a second, and which most commands need not.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
