"""The processes of one run: what they add up, what they agree on, and how the first of them speaks for all.

With one process, the common case, everything here returns what it was given. Must not know models, files or stages.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from upop.errors import UpopError

log = logging.getLogger(__name__)

# How long a process waits for the others: a death is seen at once, this is for machines that vanish or hang.
TIMEOUT = timedelta(minutes=10)
# What torch says when a process at the other end is gone; there is no type for it.
LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "remote process exited")
_SAID = "upop/failed/0"

_control: Any = None  # the group for numbers on the host: accelerators' own would make every look wait for the device


def count() -> int:
    """How many processes work together: 1 where no launcher has started more."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Which of them this one is, from 0, the first, which writes and speaks for all."""
    return dist.get_rank() if count() > 1 else 0


def check_launch() -> None:
    """Raise UpopError where a launcher was asked for several processes and has started one, or left them alone."""
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if asked and not {"RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"} & set(
        os.environ
    ):
        raise UpopError(
            "processes: accelerate launch was asked for several, but starts one where there are not as many GPUs; "
            "type torchrun --nproc-per-node N -m upop prune --device cpu ..."
        )
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "").lower() in ("1", "true"):
            what = name.removeprefix("ACCELERATE_USE_")
            raise UpopError(
                f"processes: expected the whole model in every process, got {what}, which shards it; leave {what} out "
                "of the accelerate configuration, or launch with torchrun"
            )


def join(device: str) -> None:
    """Meet the other processes that a launcher has started, if any; `device` is `cpu` or `cuda`.

    Raises UpopError where the number that came together is not the number that was started.
    """
    global _control
    check_launch()
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted > 1 and count() == 1:
        from accelerate import PartialState

        try:
            PartialState(cpu=device == "cpu", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UpopError(f"processes: {wanted} were started and could not meet ({error})") from error
        _control = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.get_backend() != "gloo" else None
    if count() != wanted and "WORLD_SIZE" in os.environ:
        raise UpopError(
            f"processes: expected {wanted}, as WORLD_SIZE says, got {count()}; start them with torchrun "
            f"--nproc-per-node {wanted} -m upop prune ..."
        )


def add_up_(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """`tensor` averaged over all processes, in place."""
    return add_up_(tensor).div_(count()) if count() > 1 else tensor


def keep_of_first(keep: Tensor) -> Tensor:
    """A bool tensor as it is in the first process: what is decided is decided once."""
    if count() == 1:
        return keep
    sent = keep.to(torch.uint8)  # gloo knows no booleans
    dist.broadcast(sent, 0)
    return sent.bool()


def highest(*numbers: int) -> list[int]:
    """Each number's maximum over all processes; waits for the processes, but not for an accelerator."""
    if count() == 1:
        return list(numbers)
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return [int(number) for number in found]


def wait() -> None:
    """Go on once all processes are here."""
    highest(0)


def gather(tensor: Tensor) -> list[Tensor]:
    """The small host tensors of all processes, which have one shape, in their order."""
    if count() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(found, tensor, group=_control)
    return found


def text_from_first(text: str) -> str:
    """The first process's text."""
    if count() == 1:
        return text
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    size = highest(len(data) if index() == 0 else 0)[0]
    data = data if index() == 0 else torch.empty(size, dtype=torch.uint8)
    if size:
        dist.broadcast(data, 0, group=_control)
    return bytes(data.tolist()).decode()


def by_first(call: Callable[[], object]) -> None:
    """Let the first process alone do something; where it raises an UpopError, all raise it."""
    error: UpopError | None = None
    if index() == 0:
        try:
            call()
        except UpopError as found:
            error = found
    said = json.loads(text_from_first(json.dumps(None if error is None else str(error))))
    if error is not None:
        raise error
    if said is not None:
        raise UpopError(said)


def same_as_first(what: str, value: Sequence[Any]) -> None:
    """Raise UpopError where plain values differ from the first process's; all processes must be here."""
    theirs = json.loads(text_from_first(json.dumps(list(value))))
    if theirs != json.loads(json.dumps(list(value))):
        raise UpopError(
            f"process {index()} of {count()}: {what}: expected {theirs} as in the first process, got {list(value)}; "
            "do all processes see the same folders?"
        )


@contextlib.contextmanager
def naming_the_lost(advice: Callable[[], str]) -> Iterator[None]:
    """Meanwhile a process that is lost ends the others with one clear line, which says `advice()`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if count() == 1 or not (isinstance(error, dist.DistError) or any(sign in text for sign in LOST)):
            raise
        raise UpopError(f"one of the {count()} processes of this run was lost; {advice()}") from error


def said_by_first(message: str) -> bool:
    """Whether the first process fails with the same message, so that this one need not repeat it."""
    if count() == 1:
        # Before the processes have met all read the same options: one voice per machine is enough.
        return int(os.environ.get("LOCAL_RANK", "0")) > 0
    with contextlib.suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        if index() == 0:
            store.set(_SAID, message)
            return False
        store.wait([_SAID], timedelta(seconds=3))
        return bool(store.get(_SAID).decode() == message)
    return False
