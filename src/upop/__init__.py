"""UPop for vision transformers: prune a ViT by one unified, progressive search, and save a smaller, faster one."""

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from upop.errors import UpopError

if TYPE_CHECKING:
    from upop.analysis import Analysis, analyze
    from upop.latency import LatencyTable
    from upop.pretrained import from_pretrained, save_pretrained
    from upop.search import Search
    from upop.slim import slim
    from upop.targets import Target
    from upop.timing import measure_latency_table

# Public name -> the module it lives in, imported on first use: reports are made where torch is not installed.
_HOMES = {
    "Analysis": "analysis",
    "LatencyTable": "latency",
    "Search": "search",
    "SearchCallback": "callback",
    "Target": "targets",
    "analyze": "analysis",
    "from_pretrained": "pretrained",
    "measure_latency_table": "timing",
    "save_pretrained": "pretrained",
    "slim": "slim",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'upop' has no attribute {name!r}")
    found: object = getattr(import_module(f"upop.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _is_the_command() -> bool:
    """Whether this is the program `upop`, or `python -m upop...`, whose first word of help must not take seconds."""
    if sys.argv[:1] == ["-m"]:  # as long as any module is looked for; its name stands before the arguments
        return sys.orig_argv[-len(sys.argv)].split(".")[0] in ("upop", "-mupop")
    return bool(sys.argv) and Path(sys.argv[0]).stem == "upop"


if _is_the_command():
    # Ctrl-C before `upop.cli.main` can answer it ends the program, without a traceback through its imports.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
else:
    try:
        # From here on transformers' Auto classes know slimmed models, whatever else of upop is used.
        import_module("upop.pretrained")
        # A module as well: once it is imported, the name is the function's for good.
        from upop.slim import slim
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise


__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "LatencyTable",
    "Search",
    "Target",
    "UpopError",
    "analyze",
    "from_pretrained",
    "measure_latency_table",
    "save_pretrained",
    "slim",
]
