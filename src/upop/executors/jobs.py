"""What a study asks for and what it hears back, and how a job is put to the guard that runs its command.

Knows no cluster, no configuration and no result.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from upop.errors import STOPPED
from upop.executors import guard

MORE_TIMES = 2  # that a lost worker's job is taken up again


@dataclass(frozen=True)
class Job:
    """A run to carry out: `command` as a process anywhere, or `call` in this one; both write into `folder`."""

    label: str
    command: tuple[str, ...]
    folder: Path  # on a file system that all workers share
    threads: int | None = None  # CPU threads of the run; None: as the machine has it
    call: Callable[[], None] | None = None

    @property
    def log(self) -> Path:
        """Where the command's output goes: beside the run folder, which a run wants empty."""
        return self.folder.absolute().parent / "logs" / f"{self.label.replace(os.sep, '-')}.log"

    @property
    def lock(self) -> Path:
        """Held by whoever writes the folder, so that a worker given up for dead and its successor never both do."""
        return self.folder.absolute().with_name(self.folder.name + ".lock")


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `error` is one line, None when it is done; `lost` when its workers died, not the run."""

    label: str
    error: str | None = None
    lost: bool = False


class Executor(Protocol):
    """Carries jobs out, at most `workers` at a time; closing the iterator ends what still runs."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int: ...

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Outcome]:
        """Outcomes as they come; `started` hears a job's label, once, before its outcome."""
        ...


def guard_command() -> tuple[str, ...]:
    # -P: the script's own folder must not stand in front of the libraries it imports.
    return (sys.executable, "-P", str(Path(guard.__file__).resolve()))


def guard_request(job: Job, *, device: str | None = None) -> str:
    """The line that a guard wants on stdin; `device` is what the run may see of CUDA."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    request = {
        "command": job.command,
        "cwd": os.getcwd(),
        "environment": environment,
        "lock": str(job.lock),
        "log": str(job.log),
    }
    return json.dumps(request) + "\n"


def read_answer(job: Job, answer: str) -> Outcome | None:
    """The outcome in a guard's answer; None when it was killed before it could answer, or its run asked to stop."""
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return None
    code, line = found["code"], found["line"]
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Outcome(job.label, f"killed by {name}, {found['attempts']} times; see {job.log}", lost=True)
    if code == STOPPED:
        return None
    if code > 0:
        return Outcome(job.label, line or f"exit code {code}; see {job.log}")
    return Outcome(job.label)


def ask_guard() -> Callable[[tuple[str, ...], str], str]:
    """A function that asks a guard and waits, for other machines: made here, so that it is sent by value.

    A function of a module would be sent by name, and a worker would load all of upop and torch to look it up.
    """

    def ask(command: tuple[str, ...], request: str) -> str:
        import subprocess

        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                return process.stdout.read()
            finally:
                process.stdin.close()

    return ask


@dataclass
class Starts:
    """Says which jobs have begun, by their logs: a cluster queues, and only a guard knows when it has begun."""

    started: Callable[[str], None]
    _sizes: dict[str, int] = field(default_factory=dict)

    def expect(self, job: Job) -> None:
        self._sizes[job.label] = self._size(job)

    def look(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job.label in self._sizes and self._size(job) > self._sizes[job.label]:
                self.begun(job)

    def begun(self, job: Job) -> None:
        if self._sizes.pop(job.label, None) is not None:
            self.started(job.label)

    @staticmethod
    def _size(job: Job) -> int:
        return job.log.stat().st_size if job.log.exists() else -1


def wait_for_locks(jobs: Iterable[Job], seconds: float = 10.0) -> None:
    """Wait until no guard holds on to a job that was called off."""
    deadline = time.monotonic() + seconds
    for job in jobs:
        with (
            contextlib.suppress(Timeout, OSError),
            FileLock(job.lock, timeout=max(0.0, deadline - time.monotonic())),
        ):
            pass
