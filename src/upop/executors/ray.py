"""Jobs as tasks of a Ray cluster, or of a Ray that is started here for them.

A task asks a guard, as the other executors do; Ray finds the place and takes a killed worker's task up again.
"""

import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from upop.errors import UpopError, one_line
from upop.executors.jobs import (
    Job,
    Outcome,
    Starts,
    ask_guard,
    guard_command,
    guard_request,
    read_answer,
    wait_for_locks,
)

CONNECT_S = 5.0
LOOK_S = 0.5  # between two looks at what has started
MAX_RETRIES = 3  # by Ray, of a task whose worker or node died
UNLIMITED = 10_000
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's coming default, which it otherwise announces: a task without a GPU sees what its worker sees.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class RayExecutor:
    """Tasks at `address`: None or `local` starts a Ray of `workers` tasks here, `auto` and `ray://...` join one."""

    workers: int
    address: str | None = None
    gpus: int | None = None  # per run; None: one where the cluster has any
    name: str = "ray"

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Outcome]:
        queue, running = list(jobs), dict[Any, Job]()
        starts = Starts(started)
        cores = self.workers * max((job.threads or 1 for job in jobs), default=1)
        with connection(self.address, cores=cores) as ray:
            gpus = self.gpus if self.gpus is not None else int(ray.cluster_resources().get("GPU", 0) > 0)
            try:
                while queue or running:
                    while queue and len(running) < self.workers:
                        job = queue.pop(0)
                        starts.expect(job)
                        running[_submit(ray, job, gpus)] = job
                    done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
                    starts.look(running.values())
                    for reference in done:
                        job = running.pop(reference)
                        starts.begun(job)
                        yield _outcome(ray, job, reference)
            finally:
                for reference in running:
                    # Forced, since a task waits inside a system call; its guard sees it go and ends the command.
                    ray.cancel(reference, force=True)
                wait_for_locks(running.values())


@contextmanager
def connection(address: str | None, *, cores: int) -> Iterator[Any]:
    """Ray, connected; left as it was found: one that is connected already is used as it is."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    here = address in (None, "local")
    # Into an existing cluster goes nothing but the wish to talk to it.
    size = {"num_cpus": cores, "include_dashboard": False} if here else {}
    try:
        ray.init(address="local" if here else address, log_to_driver=False, logging_level=logging.CRITICAL, **size)
    # Of all kinds, plain Exception among them.
    except Exception as error:
        raise UpopError(f"ray at {address or 'local'}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str | None) -> None:
    """Refuse now an address where no Ray is, before anything is prepared for it."""
    if importlib.util.find_spec("ray") is None:
        raise UpopError('executor ray: Ray is not installed; pip install "upop[ray]"')
    if address in (None, "local"):
        return
    assert address is not None
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    if named is not None:
        _check_port(named)
    with connection(address, cores=1):
        pass


def _check_port(named: str) -> None:
    """Refuse at once what Ray would try for half a minute."""
    host, _, port = named.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UpopError(f"ray address: expected local, auto, HOST:PORT or ray://HOST:PORT, got {named!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UpopError(f"ray address {named}: no Ray answers there ({error}); start it, or give another") from error


def _submit(ray: Any, job: Job, gpus: int) -> Any:
    # A run that says no is an answer, not an exception: Ray retries only what died.
    task = ray.remote(max_retries=MAX_RETRIES, num_cpus=job.threads or 1, num_gpus=gpus)(ask_guard())
    return task.options(name=job.label).remote(guard_command(), guard_request(job))


def _outcome(ray: Any, job: Job, reference: Any) -> Outcome:
    try:
        outcome = read_answer(job, ray.get(reference))
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        return Outcome(job.label, f"{type(error).__name__}: {first}", lost=True)
    if outcome is None:
        return Outcome(job.label, f"the process that guards the run was killed; see {job.log}", lost=True)
    return outcome
