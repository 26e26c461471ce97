"""Work on a batch in parts that fit into memory: halved where it runs out, and done again.

Must not know models: what is done with a part comes in as a function.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from upop import processes
from upop.errors import TrainingError

log = logging.getLogger(__name__)

T = TypeVar("T")
# What torch's allocator on the CPU says; there is no type for it.
_SIGNS = ("defaultcpuallocator", "not enough memory", "can't allocate memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of the machine or of the accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def within_memory(
    micro: int, work: Callable[[int], T], *, forget: Callable[[], None], retry: bool, where: str, batch: int
) -> tuple[T, int]:
    """`work(micro)`, and the size of micro-batch that it was done in: `micro` images, or fewer where memory ran out.

    `forget` undoes what broken-off work has left. Without `retry`, and at micro-batches of one image, it raises
    TrainingError; `where` is the beginning of what is said, `batch` the images of the whole.
    """
    while True:
        try:
            return work(micro), micro
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Only out of the handler: the error's frames hold on to what has filled the memory.
        forget()
        _free()
        if micro == 1:
            raise TrainingError(f"{where}: out of memory with a single image at a time; use a smaller model or image")
        half = (micro + 1) // 2
        if not retry:
            raise TrainingError(
                f"process {processes.index()} of {processes.count()}: {where}: out of memory with {micro} images at a "
                f"time; start again with --accumulate {-(-batch // half)} (smaller micro-batches, the same steps)"
            )
        log.warning("%s: out of memory with %d images at a time; going on with %d, same batch", where, micro, half)
        micro = half


def in_parts(count: int, work: Callable[[int], T], *, where: str) -> T:
    """`within_memory` for `count` images at first, of work that leaves nothing behind and that nobody waits for."""
    return within_memory(count, work, forget=lambda: None, retry=True, where=where, batch=count)[0]


@contextmanager
def left_out(what: str, warnings: list[str]) -> Iterator[None]:
    """What a run can do without: where memory runs out, a warning says so, and the rest is there."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    _free()
    warnings.append(f"{what}: out of memory; not measured, all else is there")
    log.warning("%s", warnings[-1])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
