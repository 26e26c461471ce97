"""UPop for vision transformers: prune a ViT by one unified, progressive search, and save a smaller, faster one."""

from upop.errors import UpopError

try:
    from upop.analysis import Analysis, analyze
    from upop.latency import LatencyTable
    from upop.pretrained import from_pretrained, register, save_pretrained
    from upop.search import Search
    from upop.slim import slim
    from upop.targets import Target

    register()
except ModuleNotFoundError as error:
    # Reports and animations are made where torch is not installed.
    if error.name != "torch":
        raise


def __getattr__(name: str) -> object:
    # transformers' Trainer takes seconds to import: only for those who use it.
    if name == "SearchCallback":
        from upop.callback import SearchCallback

        return SearchCallback
    if name == "measure_latency_table":
        from upop.timing import measure_latency_table

        return measure_latency_table
    raise AttributeError(f"module 'upop' has no attribute {name!r}")


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
