"""How a study's runs are carried out: in this process, in several, on a Ray cluster, by Slurm.

An executor takes jobs and gives outcomes; it must not know what a run is. Ray and submitit are imported when used.
"""

from collections.abc import Callable
from dataclasses import dataclass

from upop.errors import UpopError, nearest
from upop.executors.jobs import Executor, Job, Outcome
from upop.executors.local import LocalExecutor, ProcessExecutor, visible_gpus
from upop.executors.ray import UNLIMITED, RayExecutor, check_address
from upop.executors.slurm import SlurmExecutor, check_cluster

__all__ = ["NAMES", "Executor", "Job", "Outcome", "make_executor"]


@dataclass(frozen=True)
class _Wishes:
    workers: int | None
    gpus: int | None
    address: str | None
    partition: str | None
    minutes: int
    memory_gb: float | None


def _local(wishes: _Wishes) -> Executor:
    if wishes.workers not in (None, 1):
        raise UpopError(f"workers: the executor local has 1, got {wishes.workers}; choose processes, ray or slurm")
    return LocalExecutor()


def _processes(wishes: _Wishes) -> Executor:
    found = visible_gpus() if wishes.gpus != 0 else ()
    if wishes.gpus and not found:
        raise UpopError("gpus: expected one for a run, but this machine has none; leave it out, or choose 0")
    # On a machine without GPUs, what a run may see of them is left alone.
    return ProcessExecutor(wishes.workers or max(1, len(found)), found if found or wishes.gpus == 0 else None)


def _ray(wishes: _Wishes) -> Executor:
    check_address(wishes.address)
    here = wishes.address in (None, "local")
    return RayExecutor(
        wishes.workers or (max(1, len(visible_gpus())) if here else UNLIMITED), wishes.address, wishes.gpus
    )


def _slurm(wishes: _Wishes) -> Executor:
    check_cluster(wishes.address)
    return SlurmExecutor(
        wishes.workers or (UNLIMITED if wishes.address in (None, "slurm") else 1),
        wishes.address,
        gpus=wishes.gpus,
        partition=wishes.partition,
        minutes=wishes.minutes,
        memory_gb=wishes.memory_gb,
    )


EXECUTORS: dict[str, Callable[[_Wishes], Executor]] = {
    "local": _local,
    "processes": _processes,
    "ray": _ray,
    "slurm": _slurm,
}
NAMES = tuple(EXECUTORS)


def make_executor(
    name: str = "local",
    *,
    workers: int | None = None,
    gpus: int | None = None,
    address: str | None = None,
    partition: str | None = None,
    minutes: int = 24 * 60,
    memory_gb: float | None = None,
) -> Executor:
    """The executor of that name, or UpopError in one line.

    `workers` runs at a time: by default one per GPU here (one without), and on a cluster as many as it takes.
    `gpus` is 0 or 1 per run, None for one where there are any (Slurm: none is asked for). `address` is where Ray is
    (`local`, `auto`, `HOST:PORT`, `ray://HOST:PORT`), or `local` or `debug` for submitit without Slurm. The rest is
    for Slurm, per run.
    """
    if name not in EXECUTORS:
        raise UpopError(f"executor: expected one of {', '.join(NAMES)}, got {name!r}{nearest(name, NAMES)}")
    if workers is not None and workers < 1:
        raise UpopError(f"workers: expected 1 or more, got {workers}")
    if gpus not in (None, 0, 1):
        raise UpopError(f"gpus: expected 0 or 1, since a run uses one at most, got {gpus}")
    if minutes < 1:
        raise UpopError(f"minutes: expected 1 or more, got {minutes}")
    if memory_gb is not None and memory_gb <= 0:
        raise UpopError(f"memory_gb: expected more than 0, got {memory_gb}")
    return EXECUTORS[name](_Wishes(workers, gpus, address, partition, minutes, memory_gb))
