"""Jobs as Slurm jobs, by submitit; or, to try that without a cluster, as submitit's local ones."""

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from upop.errors import UpopError, nearest, one_line
from upop.executors.jobs import (
    MORE_TIMES,
    Job,
    Outcome,
    Starts,
    ask_guard,
    guard_command,
    guard_request,
    read_answer,
    wait_for_locks,
)

LOOK_S = 0.5
PREEMPTED_S = 300.0  # that Slurm has to put a preempted job into the queue again, before it is submitted anew
CLUSTERS = ("slurm", "local", "debug")


@dataclass(frozen=True)
class SlurmExecutor:
    """At most `workers` Slurm jobs at a time, in the queue or running."""

    workers: int
    cluster: str | None = None  # None: Slurm; `local` and `debug` are submitit's stand-ins on this machine
    gpus: int | None = None
    partition: str | None = None
    minutes: int = 24 * 60
    memory_gb: float | None = None
    name: str = "slurm"

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Outcome]:
        queue, running = list(jobs), list[_Submitted]()
        starts = Starts(started)
        try:
            while queue or running:
                while queue and len(running) < self.workers:
                    job = queue.pop(0)
                    starts.expect(job)
                    running.append(_Submitted(job, self._submit(job)))
                starts.look(submitted.job for submitted in running)
                for submitted in [s for s in running if s.over()]:
                    outcome = submitted.outcome(self.minutes)
                    if outcome is None:
                        submitted.again(self._submit(submitted.job))
                        continue
                    running.remove(submitted)
                    starts.begun(submitted.job)
                    yield outcome
                if running:
                    time.sleep(LOOK_S)
        finally:
            for submitted in running:
                submitted.cancel()
            wait_for_locks(submitted.job for submitted in running)

    def _submit(self, job: Job) -> Any:
        import submitit

        executor = submitit.AutoExecutor(folder=job.log.parent / "slurm", cluster=self.cluster or "slurm")
        executor.update_parameters(
            name=job.label,
            timeout_min=self.minutes,
            cpus_per_task=job.threads,
            gpus_per_node=self.gpus or None,
            mem_gb=self.memory_gb,
            slurm_partition=self.partition,
        )
        try:
            return executor.submit(ask_guard(), guard_command(), guard_request(job))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise UpopError(f"slurm refuses {job.label}: {one_line(error)}") from error


@dataclass
class _Submitted:
    """A job and what Slurm has of it; `losses` counts the times that came to nothing."""

    job: Job
    handle: Any
    losses: int = 0
    _preempted_since: float | None = None

    def over(self) -> bool:
        if self.handle.done():
            return True
        if not str(self.handle.state).startswith("PREEMPTED"):
            self._preempted_since = None
            return False
        self._preempted_since = self._preempted_since or time.monotonic()
        return time.monotonic() - self._preempted_since > PREEMPTED_S

    def outcome(self, minutes: int) -> Outcome | None:
        """None when it was lost and is to be submitted again."""
        import submitit

        reason = "no answer"
        if self._preempted_since is None:
            try:
                outcome = read_answer(self.job, self.handle.result())
            except submitit.core.utils.UncompletedJobError as error:
                outcome, reason = None, str(error)
            if outcome is not None:
                return outcome
        state = str(self.handle.state)
        where = f"Slurm job {self.handle.job_id}, {state}"
        if state.startswith("TIMEOUT") or "timed-out" in reason:
            return Outcome(self.job.label, f"not done in {minutes} minutes ({where}); allow more", lost=True)
        if state.startswith("CANCELLED"):
            return Outcome(self.job.label, f"cancelled ({where})", lost=True)
        if self.losses == MORE_TIMES:
            return Outcome(self.job.label, f"lost {MORE_TIMES + 1} times ({where}); see {self.job.log}", lost=True)
        return None

    def again(self, handle: Any) -> None:
        self.cancel()
        self.handle, self._preempted_since, self.losses = handle, None, self.losses + 1

    def cancel(self) -> None:
        with contextlib.suppress(OSError):
            self.handle.cancel(check=False)


def check_cluster(cluster: str | None) -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UpopError('executor slurm: submitit is not installed; pip install "upop[slurm]"')
    if cluster is not None and cluster not in CLUSTERS:
        raise UpopError(f"slurm address: expected {', '.join(CLUSTERS)}, got {cluster!r}{nearest(cluster, CLUSTERS)}")
    if cluster in (None, "slurm"):
        missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
        if missing:
            raise UpopError(f"executor slurm: {missing[0]} is not on this machine; start the study on a login node")
