"""Jobs on this machine: one after another in this process, or several processes side by side."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import IO

from upop.errors import StopError, UpopError
from upop.executors.jobs import MORE_TIMES, Job, Outcome, guard_command, guard_request, read_answer

END_S = 45.0  # a guard gives its command two times GRACE_S; after this, the guard itself is ended


def visible_gpus() -> tuple[str, ...]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them, fewer where that is set already."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


@dataclass(frozen=True)
class LocalExecutor:
    """One job after another, in this process."""

    name: str = "local"
    workers: int = 1

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Outcome]:
        for job in jobs:
            assert job.call is not None, f"{job.label}: only the other executors can do without `call`"
            started(job.label)
            try:
                job.call()
            except StopError:  # this process is asked to end, and with it whoever started the run
                raise
            except UpopError as error:
                yield Outcome(job.label, _one_line(str(error)))
            # A bug in one run must not cost the others; it is named as what it is.
            except Exception as error:
                yield Outcome(job.label, _one_line(f"{type(error).__name__}: {error}"))
            else:
                yield Outcome(job.label)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass
class _Place:
    """A worker: the job it has, the process that guards it, and how often that process was lost."""

    device: str | None
    job: Job
    process: subprocess.Popen[str]
    losses: int = 0


@dataclass(frozen=True)
class ProcessExecutor:
    """`workers` processes on this machine, each with a GPU of its own as far as there are any."""

    workers: int
    gpus: tuple[str, ...] | None = None  # None: leave CUDA_VISIBLE_DEVICES alone; (): hide all
    name: str = "processes"

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Outcome]:
        queue = list(jobs)
        free = [self._device(worker) for worker in range(self.workers)]
        places: list[_Place] = []
        try:
            while queue or places:
                while queue and free:
                    device, job = free.pop(0), queue.pop(0)
                    places.append(_Place(device, job, _start(job, device)))
                    started(job.label)
                for place in self._answered(places):
                    outcome = _outcome(place)
                    if outcome is None:
                        continue
                    places.remove(place)
                    free.append(place.device)
                    yield outcome
        finally:
            _end([place.process for place in places])

    def _device(self, worker: int) -> str | None:
        if self.gpus is None:
            return None
        return self.gpus[worker % len(self.gpus)] if self.gpus else ""

    @staticmethod
    def _answered(places: list[_Place]) -> list[_Place]:
        # A guard writes its answer and ends at once, so one that can be read is one that can be waited for.
        answers = {_answer(place).fileno(): place for place in places}
        return [answers[ready] for ready in wait(list(answers)) if isinstance(ready, int)]


def _answer(place: _Place) -> IO[str]:
    assert place.process.stdout is not None
    return place.process.stdout


def _start(job: Job, device: str | None) -> "subprocess.Popen[str]":
    # A session of its own: an interrupt from the keyboard reaches this process alone, which then ends the others.
    process = subprocess.Popen(
        guard_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: seen when its answer is read
        process.stdin.write(guard_request(job, device=device))
        process.stdin.flush()
    return process


def _outcome(place: _Place) -> Outcome | None:
    """What the guard answered; None when it was lost and its job is taken up again."""
    answer = _answer(place).read()
    _end([place.process])
    outcome = read_answer(place.job, answer)
    if outcome is not None:
        return outcome
    if place.losses == MORE_TIMES:
        return Outcome(place.job.label, f"the process was lost {MORE_TIMES + 1} times; see {place.job.log}", lost=True)
    place.losses += 1
    place.process = _start(place.job, place.device)
    return None


def _end(processes: list["subprocess.Popen[str]"]) -> None:
    """End guards, which end their commands: closing stdin is how they are told."""
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
