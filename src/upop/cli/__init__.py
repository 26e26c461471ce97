"""The command line: parse, call, print. The only place that prints, and the only one that exits.

Must not compute: everything it shows comes from the library's return values.
"""

import atexit
import gc
import inspect
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from upop import __version__
from upop.allocator import keep_freed_memory
from upop.cli import bench, export, push, studies, view
from upop.cli.checks import check_split
from upop.cli.show import Watcher, err, out, print_plan, print_promises, print_result, quiet_libraries
from upop.config import ConfigError, PruneConfig, make_config
from upop.configtext import load_config
from upop.errors import STOPPED, StopError, UpopError

DEMO_FOLDER = Path("runs/demo")

app = typer.Typer(
    help="Make a Vision Transformer physically smaller and really faster, by UPop.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """Entry point: runs the command line; bad input ends in one line on stderr and exit code 2."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C is answered below
    keep_freed_memory()
    # The system takes all memory back at once; Python would look through torch's objects first, for seconds.
    atexit.register(gc.freeze)
    _take_debug()
    _find_home()
    try:
        code = app(standalone_mode=False, prog_name="upop")
    except StopError as error:
        _fail(str(error), error)
        code = STOPPED
    except UpopError as error:
        code = _fail(str(error), error)
    except typer.TyperException as error:
        # The parser knows which options come near a wrong one, but says so only in its own layout.
        near = getattr(error, "possibilities", None) or ()
        context = getattr(error, "ctx", None)
        hint = f"; did you mean {near[0]}?" if near else f"; see {context.command_path} --help" if context else ""
        code = _fail(f"{error}".rstrip(".") + hint, error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror or error}", error)
    except MemoryError as error:
        code = _fail(f"out of memory{f' ({error})' if str(error) else ''}; close other programs or take less", error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # A mistake of ours, not of the user's: said as that, in one line too.
        _fail(f"failed unexpectedly ({type(error).__name__}: {error}); add --debug to see where, and report it", error)
        code = 1
    if code == 130:
        err.print("upop: interrupted; what was written so far stays")
    sys.exit(code if isinstance(code, int) else 0)


def _take_debug() -> None:
    """Understand --debug before, among and after the options of any command; it is no part of what a run is."""
    if "--debug" in sys.argv[1:]:
        sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]
        os.environ["UPOP_DEBUG"] = "1"  # for processes that this one starts as well


def _find_home() -> None:
    """Expand a ~ that begins a path, which shells leave alone in --out=~/runs."""
    for place, argument in enumerate(sys.argv[1:], 1):
        option, _, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if value.startswith("~"):
            sys.argv[place] = f"{option}{'=' if option else ''}{os.path.expanduser(value)}"


def _fail(message: str, error: Exception) -> int:
    if os.environ.get("UPOP_DEBUG"):
        raise error
    line = " ".join(message.split())
    if not _said_by_another(line):
        err.print("upop: " + line)
    return 2


def _said_by_another(line: str) -> bool:
    """Whether another process of the same run says this line, so that it need not be read twice."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from upop.processes import said_by_first

    return said_by_first(line)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also after any command.")] = False,
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
    go_on: Annotated[
        bool,
        typer.Option(
            "--go-on", help="start; or take up this very run where it was stopped in OUT, leave it if complete"
        ),
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="take up the run stopped in that folder; nothing else")] = None,
    **options: Any,
) -> None:
    """Prune a Vision Transformer: fine-tune, search, slim, retrain, evaluate.

    Example: upop prune --model facebook/deit-base-patch16-224 --data cifar10 --target params=0.5 --out runs/half
    """
    given = {key: value for key, value in options.items() if value is not None}
    if resume is not None:
        if given or config or overwrite or dry_run or go_on:
            raise UpopError("--resume: the run in the folder has its own configuration; leave out all other options")
        _resume(resume)
        return
    in_file = load_config(config) if config else {}
    try:
        chosen = make_config(in_file | given)
    except ConfigError:
        if config:  # what is wrong with the file is not to be blamed on the options
            make_config({"model": "?", "data": "?"} | in_file, where=str(config))
        raise
    quiet_libraries()
    from upop.plan import cpu_threads, make_plan
    from upop.run import prune

    if dry_run:
        with out.status("loading model and data"), cpu_threads(chosen.threads):
            plan = make_plan(chosen)
        print_plan(plan)
        return
    with Watcher() as watcher:
        result = prune(chosen, overwrite=overwrite, go_on=go_on, observer=watcher)
    print_result(result, Path(chosen.out))


def _resume(folder: Path) -> None:
    quiet_libraries()
    from upop.run import resume

    with Watcher() as watcher:
        result = resume(folder, observer=watcher)
    print_result(result, folder)


def _register_prune() -> None:
    own = [p for p in inspect.signature(_prune).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    _prune.__signature__ = inspect.Signature(own + _config_options())  # type: ignore[attr-defined]
    app.command("prune", short_help="Fine-tune, search, slim, retrain, evaluate: all the way")(_prune)


_register_prune()


@app.command(short_help="What can be removed from a model, and what that saves")
def analyze(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, or built-in shape")],
    structures: Annotated[str, typer.Option(help="as for prune")] = "attn,mlp",
    ignored_layers: Annotated[str, typer.Option(help="as for prune")] = "",
    align: Annotated[str, typer.Option(help="none, or multiples such as attn=8,mlp=64")] = "none",
    latency: Annotated[bool, typer.Option("--latency", help="also measure what widths cost in time")] = False,
    latency_batch: Annotated[int, typer.Option(help="as for prune")] = 1,
    latency_runtime: Annotated[str, typer.Option(help="as for prune")] = "eager",
    latency_dtype: Annotated[str, typer.Option(help="as for prune")] = "float32",
    seconds: Annotated[float, typer.Option(help="time for the passes that are timed")] = 20.0,
    device: Annotated[str, typer.Option(help="where they are timed: auto, cpu or cuda")] = "auto",
) -> None:
    """Show what can be removed from a model, and what each step of it saves.

    Example: upop analyze facebook/deit-base-patch16-224 --structures attn,mlp,block --latency --latency-batch 8
    """
    quiet_libraries()
    from upop.analysis import analyze as analyze_model
    from upop.methods import parse_align, parse_kinds, parse_layers
    from upop.models import load_model
    from upop.plan import device_type
    from upop.timing import measure_latency_table

    kinds, multiples, ignored = parse_kinds(structures), parse_align(align), parse_layers(ignored_layers)
    where = device_type(device) if latency else "cpu"
    with out.status("loading the model") as status:
        loaded = load_model(model)
        table = (
            measure_latency_table(
                loaded.model.to(where),
                batch=latency_batch,
                image_size=loaded.image_size,
                runtime=latency_runtime,
                dtype=latency_dtype,
                structures=kinds,
                align=multiples,
                seconds=seconds,
                progress=status.update,
            )
            if latency
            else None
        )
    out.print(
        str(analyze_model(loaded.model, kinds, ignored_layers=ignored, align=multiples, latency=table)),
        markup=False,
    )
    out.print(f"MACs are those of an image of {loaded.image_size} x {loaded.image_size} pixels", markup=False)
    if table is not None:
        out.print(f"latency is that of a forward pass: {table}", markup=False)


@app.command("eval", short_help="Accuracy of a model on a data set, in float32")
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
    check_split(split)
    quiet_libraries()
    from upop.measure import evaluate_model
    from upop.targets import amount

    with out.status("loading model and data"):
        score, params, macs, notes = evaluate_model(config, split)
    for note in notes:
        out.print(note, style="yellow", markup=False)
    out.print(
        f"{split} accuracy {100 * score.accuracy:.2f} % (loss {score.loss:.4f}, {score.images:,} images); "
        f"{params:,} parameters, {amount(macs, 'macs')}"
    )


@app.command(short_help="Two minutes, no network: prune a small DeiT to half")
def demo(
    folder: Annotated[Path, typer.Option("--out", help="folder for everything that comes out")] = DEMO_FOLDER,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that OUT already holds")] = False,
) -> None:
    """Two minutes, no network: train a small DeiT on real handwritten digits and prune it to half."""
    quiet_libraries()
    from upop.demo import demo_config, is_demo
    from upop.run import prune

    with Watcher() as watcher:
        result = prune(demo_config(folder), overwrite=overwrite or is_demo(folder), observer=watcher)
    print_result(result, folder)
    print_promises(result)
    out.print(f"look at it: upop view {shlex.quote(str(folder))} --data digits", markup=False)


app.command("view", short_help="Drop a picture on a page, see what each model says of it")(view.view)
app.command("export", short_help="One file for ONNX Runtime or torch.export, checked")(export.export)
app.command("bench", short_help="Dense and pruned models timed side by side, in turns")(bench.bench)
app.command("push", short_help="A model with its card to the Hugging Face Hub")(push.push)
app.command("study", short_help="All runs of a study that are not done yet, and its report")(studies.study)
app.command("report", short_help="One HTML page and its Markdown twin from results on disk")(studies.report)
app.command("animate", short_help="A search's masks as a moving picture")(studies.animate)
