"""The command line: parse, call, print. The only place that prints, and the only one that exits.

Must not compute: everything it shows comes from the library's return values.
"""

import inspect
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from upop import __version__
from upop.config import PruneConfig, load_config, make_config
from upop.errors import UpopError
from upop.folder import is_main_process

DEMO_FOLDER = Path("runs/demo")

app = typer.Typer(
    help="Make a Vision Transformer physically smaller and really faster, by UPop.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
out = Console(highlight=False, soft_wrap=True, quiet=not is_main_process())
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: runs the command line; bad input ends in one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UpopError as error:
        code = _fail(str(error), error)
    except typer.TyperException as error:
        # The parser knows which options come near a wrong one, but says so only in its own layout.
        near = getattr(error, "possibilities", None) or ()
        code = _fail(f"{error}" + (f"; did you mean {near[0]}?" if near else ""), error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror or error}", error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        err.print("upop: interrupted; what was written so far stays")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, error: Exception) -> int:
    if os.environ.get("UPOP_DEBUG"):
        raise error
    err.print("upop: " + " ".join(message.split()))
    return 2


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"upop {__version__}")
    elif context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)


def _config_options() -> list[inspect.Parameter]:
    """One option per field of PruneConfig, absent unless given, so that a config file can say the rest.

    Values stay text, for PruneConfig to judge: options and config files are refused in the same words.
    """
    options = []
    for name, info in PruneConfig.model_fields.items():
        default = "" if info.is_required() or info.default is None else f" [{info.default}]"
        flag = info.annotation is bool
        metavar = None if flag else _metavar(info.annotation)
        option = typer.Option(help=f"{info.description}{default}", show_default=False, metavar=metavar)
        annotation = Annotated[bool | None, option] if flag else Annotated[str | None, option]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return options


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return _metavar(inner[0]) if inner else {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")


def _prune(
    *,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the options below; options win")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that OUT already holds")] = False,
    **options: Any,
) -> None:
    """Prune a Vision Transformer: fine-tune, search, slim, retrain, evaluate.

    Example: upop prune --model facebook/deit-base-patch16-224 --data cifar10 --target params=0.5 --out runs/half
    """
    given = {key: value for key, value in options.items() if value is not None}
    if config:
        # On its own first, so that what is wrong with the file is not blamed on the options, nor the reverse.
        make_config({"model": "?", "data": "?"} | load_config(config), where=str(config))
    chosen = make_config((load_config(config) if config else {}) | given)
    _quiet_libraries()
    from upop.plan import make_plan
    from upop.run import prune

    if dry_run:
        with out.status("loading model and data"):
            plan = make_plan(chosen)
        _print_plan(plan)
        return
    with _Watcher() as watcher:
        result = prune(chosen, overwrite=overwrite, observer=watcher)
    _print_result(result, Path(chosen.out))


def _register_prune() -> None:
    own = [p for p in inspect.signature(_prune).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    _prune.__signature__ = inspect.Signature(own + _config_options())  # type: ignore[attr-defined]
    app.command("prune")(_prune)


_register_prune()


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or built-in shape")],
) -> None:
    """Show what can be removed from a model."""
    _quiet_libraries()
    from upop.analysis import analyze as analyze_model
    from upop.models import load_model
    from upop.profiling import count_macs

    loaded = load_model(model)
    out.print(str(analyze_model(loaded.model)), markup=False)
    out.print(f"{count_macs(loaded.model) / 1e9:.3f} GMACs an image of {loaded.image_size} x {loaded.image_size}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="model folder or Hub name")],
    data: Annotated[str, typer.Option(help="as for prune")],
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    validation: Annotated[str | None, typer.Option(help="as for prune")] = None,
    subset: Annotated[str | None, typer.Option(help="as for prune")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="as for prune")] = False,
    batch_size: Annotated[str, typer.Option(help="images at a time")] = "128",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Accuracy of a model on a data set, in float32."""
    values = {"model": model, "data": data, "batch_size": batch_size, "device": device, "skip_bad": skip_bad}
    optional = {"validation": validation, "subset": subset}
    config = make_config(values | {key: value for key, value in optional.items() if value is not None})
    if split not in ("validation", "test"):
        raise UpopError(f"--split: expected validation or test, got {split!r}")
    _quiet_libraries()
    from upop.run import evaluate_model

    with out.status("loading model and data"):
        score, params, macs = evaluate_model(config, split)
    out.print(
        f"{split} accuracy {100 * score.accuracy:.2f} % (loss {score.loss:.4f}, {score.images:,} images); "
        f"{params:,} parameters, {macs / 1e9:.3f} GMACs"
    )


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="folder for everything that comes out")] = DEMO_FOLDER,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that OUT already holds")] = False,
) -> None:
    """Two minutes, no network: train a small DeiT on real handwritten digits and prune it to half."""
    _quiet_libraries()
    from upop.demo import demo_config
    from upop.run import prune

    with _Watcher() as watcher:
        result = prune(demo_config(folder), overwrite=overwrite or folder == DEMO_FOLDER, observer=watcher)
    _print_result(result, folder)
    _print_promises(result)


class _Watcher:
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

    def __enter__(self) -> "_Watcher":
        self._bar.start()
        return self

    def __exit__(self, *args: object) -> None:
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
            f"{_clock(progress.seconds_left)} left"
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
            f"{100 * accuracy:.2f} %, {latest.images_per_s:,.0f} images/s, {_clock(time.monotonic() - self._began)}"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_plan(plan: Any) -> None:
    c = plan.config
    splits = {"train": plan.data.train, "validation": plan.data.validation, "test": plan.data.test}
    images = ", ".join(f"{name} {len(split):,}" for name, split in splits.items() if split is not None)
    stages = ", ".join(f"{stage} {steps:,} steps" for stage, steps in plan.steps.items())
    before, after = plan.analysis.params, plan.params_after
    out.print(str(plan.analysis), markup=False)
    out.print(f"images: {plan.data.name}: {images}", markup=False)
    out.print(f"stages: {stages} of {c.batch_size} images")
    out.print(
        f"parameters: {before:,} -> {after:,} ({100 * (1 - after / before):.1f} % removed); about "
        f"{plan.macs_before / 1e9:.3f} -> {plan.macs_after / 1e9:.3f} GMACs an image, if all layers shrank alike"
    )
    out.print("resolved configuration:\n" + c.to_toml(), markup=False, end="")


def _print_result(result: Mapping[str, Any], folder: Path) -> None:
    splits = list(next(iter(result["accuracy"].values())))
    labels = {"dense": "dense", "search": "after search, masked", "slim": "slimmed", "retrain": "retrained"}
    accuracy = _table("", *(f"{split} accuracy" for split in splits))
    for stage, found in result["accuracy"].items():
        accuracy.add_row(labels[stage], *(f"{100 * found[split]:.2f} %" for split in splits))
    sizes = _table("", "before", "after", "ratio")
    for label, key in (("parameters", "params"), ("MACs an image", "macs")):
        before, after = result[key]["before"], result[key]["after"]
        sizes.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    for batch, found in result["latency"].items():
        before, after = found["before"]["median_ms"], found["after"]["median_ms"]
        sizes.add_row(f"milliseconds, batch {batch}", f"{before:.2f}", f"{after:.2f}", f"{after / before:.3f}")
    out.print()
    out.print(accuracy)
    out.print()
    out.print(sizes)
    out.print()
    skipped = len(result["data"]["skipped"])
    notes = [*result["warnings"], *([f"{skipped} unreadable images were skipped, see result.json"] if skipped else [])]
    for note in notes:
        out.print(f"warning: {note}", style="yellow", markup=False)
    where = f"in {folder}: model/ result.json widths.png stages.png"
    out.print(f"{_clock(result['seconds']['all'])} in all; {where}", markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _print_promises(result: Mapping[str, Any]) -> None:
    params = result["params"]
    speed = ", ".join(
        f"{found['before']['median_ms'] / found['after']['median_ms']:.2f} times at batch {batch}"
        for batch, found in result["latency"].items()
    )
    same = "the same" if result["accuracy"]["search"] == result["accuracy"]["slim"] else "NOT the same"
    out.print(f"same outputs: masked and slimmed logits differ by at most {result['gap']:.1e}; accuracy is {same}")
    out.print(f"smaller: {100 * (1 - params['after'] / params['before']):.1f} % of the parameters are gone")
    out.print(f"faster: {speed}, measured side by side")


def _quiet_libraries() -> None:
    """Keep other libraries' bars and notices off the terminal; warnings of ours stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()


if __name__ == "__main__":
    main()
