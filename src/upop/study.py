"""A study carried out: which of its runs are done, which are to do, by which executor, with a record on disk.

One run is one folder that the same `upop prune` line makes whoever types it. Must not print, and must not judge.
"""

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from filelock import FileLock, Timeout

from upop.config import given_values, is_given
from upop.configtext import command_line
from upop.disk import write_whole
from upop.errors import UpopError
from upop.executors import Executor, Job, Outcome
from upop.folder import weights_hash
from upop.reading import read_json
from upop.run import Observer, Result, made_with_another, prune
from upop.studyfile import DENSE, Study, StudyRun
from upop.version import code_version

log = logging.getLogger(__name__)

State = Literal["done", "failed", "missing"]
MANIFEST = "study.json"
MANIFEST_SCHEMA = 1


class StudyObserver(Protocol):
    """Who watches a study."""

    def planned(self, todo: int, done: int, failed: int) -> None:
        """What there is to do, what is done already, what failed before and is left alone."""

    def started(self, label: str) -> None:
        """A run begins."""

    def finished(self, label: str, error: str | None, result: Result | None, seconds: float) -> None:
        """A run has ended: with a result, or with one line of error."""


@dataclass(frozen=True)
class Summary:
    """How a study stands: labels by state, and which of them this call has run."""

    done: tuple[str, ...]
    failed: Mapping[str, str]
    ran: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Planned:
    """A run as a call would find it: `why` its result does not count, or what it failed with."""

    label: str
    state: State
    why: str | None = None


@dataclass
class Standing:
    """What is on disk of a study's runs."""

    study: Study
    out: Path
    data: str | None
    any_code: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # complete results that are not of this study

    def result(self, run: StudyRun) -> Result | None:
        """The run's result where it counts: complete, of this configuration, code, data and start."""
        for known in (self.reasons, self.others):
            known.pop(run.label, None)
        try:
            result: Result = read_json(self.folder(run) / "result.json", finite=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            self.reasons[run.label] = "its result.json is broken"
            return None
        start, code = weights_hash(Path(run.config.model)), None if self.any_code else code_version()
        if (other := made_with_another(result, run.config, start=start, code=code, data=self.data)) is not None:
            self.reasons[run.label] = self.others[run.label] = f"made with another {other}"
            return None
        return result

    def failure(self, run: StudyRun) -> str | None:
        """What the run said when it failed last time, with this configuration."""
        try:
            found = read_json(self.failure_file(run))
        except (OSError, ValueError):
            return None
        return str(found.get("error")) if is_given(found.get("given"), run.config) else None

    def look(self, run: StudyRun) -> Planned:
        if self.result(run) is not None:
            return Planned(run.label, "done")
        if (error := self.failure(run)) is not None:
            return Planned(run.label, "failed", error)
        return Planned(run.label, "missing", self.reasons.get(run.label))

    def folder(self, run: StudyRun) -> Path:
        return self.out / run.label

    def failure_file(self, run: StudyRun) -> Path:
        """Beside the run's folder: failed runs are kept apart from results."""
        return self.out / "failed" / f"{run.label}.json"


def look(study: Study, out: Path, *, any_code: bool = False) -> tuple[Planned, ...]:
    """How every run of `study` stands in the folder `out`, the dense model's first; changes nothing.

    Reads the data where there are results, since those count only for the same images.
    """
    everything = ((study.dense,) if study.dense else ()) + study.runs
    if not any((out / run.label).is_dir() for run in everything) and not (out / "failed").is_dir():
        return tuple(Planned(run.label, "missing") for run in everything)
    standing = Standing(study, out, _data_fingerprint(study), any_code)
    return tuple(standing.look(run) for run in everything)


def run_study(
    study: Study,
    out: Path,
    *,
    executor: Executor,
    observer: StudyObserver,
    run_observer: Observer | None = None,
    retry_failed: bool = False,
    any_code: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Do what is not done yet of `study` in the folder `out`; the dense model first, then all runs.

    Runs whose results count are left alone, failed ones too unless `retry_failed`. Results made by another version of
    the code count only with `any_code`. Raises UpopError where another process works on the folder, where there are
    complete results that do not count, which only `overwrite` replaces, or where the dense model, which all runs
    need, cannot be trained.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        standing = Standing(study, out, _data_fingerprint(study), any_code)
        ran: list[str] = []

        def carry_out(runs: tuple[StudyRun, ...]) -> None:
            todo = _todo(standing, runs, retry_failed)
            _refuse_to_replace(standing, todo, overwrite)
            by_label = {run.label: run for run in todo}
            started: dict[str, float] = {}

            def start(label: str) -> None:
                started[label] = time.monotonic()
                observer.started(label)

            for outcome in executor.run([_job(run, standing, run_observer) for run in todo], start):
                ran.append(outcome.label)
                run = by_label[outcome.label]
                result = _take(standing, run, outcome)
                error = None if result is not None else standing.failure(run)
                seconds = time.monotonic() - started.get(outcome.label, began)
                write_manifest(standing)
                observer.finished(outcome.label, error, result, seconds)

        everything = ((study.dense,) if study.dense else ()) + study.runs
        waiting = _todo(standing, everything, retry_failed)
        _refuse_to_replace(standing, waiting, overwrite)
        failed = _failed(standing, [run for run in everything if run not in waiting])
        observer.planned(len(waiting), len(everything) - len(waiting) - len(failed), len(failed))
        if study.dense is not None:
            carry_out((study.dense,))
            if (result := standing.result(study.dense)) is None:
                raise UpopError(
                    f"{study.path}: the dense model could not be trained ({standing.failure(study.dense)}); "
                    f"see {out / 'logs'}, mend it and use --retry-failed"
                )
            log.info("dense: %s", result["accuracy"])
        carry_out(study.runs)
        write_manifest(standing)
        failed = _failed(standing, everything)
        done = tuple(r.label for r in everything if standing.result(r) is not None)
    return Summary(done, failed, tuple(ran), time.monotonic() - began)


def write_manifest(standing: Standing) -> None:
    """`study.json`: what the study is and how each run stands, for the report."""
    study = standing.study
    runs = {}
    for run in study.runs:
        found = standing.look(run)
        error = found.why if found.state == "failed" else None
        runs[run.label] = {"differences": dict(run.differences), "state": found.state, "error": error}
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": study.name,
        **study.texts,
        "seeds": list(study.seeds),
        "base": dict(study.base),
        "dense": DENSE if study.dense else None,
        "runs": runs,
    }
    write_whole(standing.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _failed(standing: Standing, runs: Sequence[StudyRun]) -> dict[str, str]:
    """What each run that has failed, and was not done since, said."""
    return {run.label: str(found.why) for run in runs if (found := standing.look(run)).state == "failed"}


def _todo(standing: Standing, runs: tuple[StudyRun, ...], retry_failed: bool) -> list[StudyRun]:
    waiting = [run for run in runs if standing.result(run) is None]
    return [run for run in waiting if retry_failed or standing.failure(run) is None]


def _refuse_to_replace(standing: Standing, waiting: Sequence[StudyRun], overwrite: bool) -> None:
    """Raise UpopError where what is to be done would replace complete results, unless that was asked for."""
    lost = {run.label: standing.others[run.label] for run in waiting if run.label in standing.others}
    if lost and not overwrite:
        label, why = next(iter(lost.items()))
        raise UpopError(
            f"{standing.out}: holds {len(lost)} complete results that are not of this study now ({label}: {why}); "
            "choose another --out, add --any-code where only the code has changed, or --overwrite to replace them"
        )


def _job(run: StudyRun, standing: Standing, observer: Observer | None) -> Job:
    command = command_line(run.config)
    arguments = shlex.split(command)[1:]

    def call() -> None:
        prune(run.config, go_on=True, overwrite=True, observer=observer, command=command)

    return Job(
        label=run.label,
        command=(sys.executable, "-m", "upop.cli", *arguments, "--overwrite", "--go-on"),
        folder=standing.folder(run),
        threads=run.config.threads,
        call=call,
    )


def _take(standing: Standing, run: StudyRun, outcome: Outcome) -> Result | None:
    """The result of a run that has ended; where there is none, a record of the failure."""
    result = standing.result(run) if outcome.error is None else None
    file = standing.failure_file(run)
    if result is not None:
        file.unlink(missing_ok=True)
        return result
    why = outcome.error or f"its result does not count: {standing.reasons.get(run.label, 'there is none')}"
    file.parent.mkdir(exist_ok=True)
    record = {"label": run.label, "error": why, "command": command_line(run.config), "given": given_values(run.config)}
    write_whole(file, json.dumps(record, indent=1) + "\n")
    return None


def _data_fingerprint(study: Study) -> str | None:
    """Of the data that all runs share, as results name it; None where the data depend on the run's own options."""
    from upop.models import load_model
    from upop.plan import read_data

    config = (study.dense or study.runs[0]).config
    if any(given_values(r.config)[key] != given_values(config)[key] for r in study.runs for key in _DATA_KEYS):
        return None
    return read_data(config, load_model(config.model)).fingerprint


_DATA_KEYS = ("data", "validation", "subset", "skip_bad")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raise UpopError where another process works on the same study folder."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UpopError(f"{out}: another process works on this study; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()
