"""One configuration -> a run, new or taken up again -> a folder with the model and a Result.

Must not print, and leaves the work to `stages`.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upop import checkpoint, processes
from upop.config import PruneConfig, is_given, make_config
from upop.configtext import to_toml
from upop.errors import UpopError
from upop.folder import RunFolder, Stamp, is_main_process, own_command
from upop.latency import LatencyTable
from upop.lock import refuse_if_held
from upop.observer import Nobody, Observer
from upop.plan import Plan, cpu_threads, device_type, identity, make_accelerator, make_plan
from upop.reading import read_json, taking_over
from upop.session import CHECKPOINTS, Session
from upop.stages import SCHEMA, Result, Stages

log = logging.getLogger(__name__)

__all__ = ["SCHEMA", "Nobody", "Observer", "Result", "prune", "resume"]


def prune(
    config: PruneConfig,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    observer: Observer | None = None,
    command: str | None = None,
) -> Result:
    """Do the whole run and leave everything in `config.out`; returns what result.json holds.

    `command` is what the result says to type for the same run; the process's own command line unless given. With
    `go_on` a run of the same configuration, code and data that was stopped there is taken up where it was, to the
    same result, and of one that is complete the result is returned; another run there, and models that a
    stopped one has left with no checkpoint to go on from, are replaced only with `overwrite` as well.

    Raises UpopError before anything is written where the run cannot be done, and TrainingError where training breaks
    off: the weights of the last good epoch are then in `<out>/last-good`.
    """
    processes.join(device_type(config.device))
    folder = RunFolder(Path(config.out), main=processes.index() == 0)
    with processes.naming_the_lost(lambda: _advice(folder)):
        sources = (config.model, config.data)
        stamp = folder.stamp
        processes.by_first(lambda: folder.check(overwrite=overwrite or go_on, sources=sources))
        with cpu_threads(config.threads):
            return _prune(config, observer or Nobody(), command, stamp, go_on=go_on, overwrite=overwrite)


def resume(folder: Path, *, observer: Observer | None = None) -> Result:
    """Take up the run that was stopped in `folder`, to the result that it would have had.

    Raises UpopError where there is none, or where it cannot go on: other code, other data, another start.
    """
    if not folder.is_dir():
        raise UpopError(f"--resume {folder}: expected the folder of a run, got none; check the path")
    if _result(folder) is not None:
        refuse_if_held(folder)
        RunFolder(folder, main=is_main_process()).tidy()  # it may have been killed right after its last word
        raise UpopError(f"--resume {folder}: this run is complete; there is nothing to go on with")
    refuse_if_held(folder)
    stamp = RunFolder(folder).stamp
    state, damaged = checkpoint.newest(folder / CHECKPOINTS)
    if state is None:
        why = f" ({damaged[0]})" if damaged else ""
        raise UpopError(f"--resume {folder}: holds no whole checkpoint{why}; start the run again with --overwrite")
    for what in damaged:
        log.warning("%s; going back to the one before", what)
    with taking_over(f"--resume {folder}"):
        config = make_config({**state["config"], "out": str(folder)}, f"--resume {folder}")
    _refuse_elsewhere(folder, config, state.get("began_in"))
    processes.join(device_type(config.device))
    with processes.naming_the_lost(lambda: _advice(RunFolder(folder))), cpu_threads(config.threads):
        plan = make_plan(config, latency=_table(state.get("latency")))
        if other := _differs(state, plan):
            raise UpopError(f"--resume {folder}: was begun with another {other}; start the run again with --overwrite")
        return _carry_out(plan, observer or Nobody(), str(state.get("command")), state, stamp)


def _refuse_elsewhere(folder: Path, config: PruneConfig, began_in: object) -> None:
    """Raise UpopError where model or data are there from where the run was begun, and not from here."""
    if isinstance(began_in, str) and Path(began_in) != Path.cwd():
        for path in map(Path, (config.model, config.data)):
            if not path.exists() and Path(began_in, path).exists():
                raise UpopError(
                    f"--resume {folder}: expected {path} here, which this run reads; it was begun in {began_in}: go "
                    "on from there"
                )


def _advice(folder: RunFolder) -> str:
    """What to type after a process was lost."""
    if folder.holds_checkpoints:
        return f"see what the others say; then {folder.way_on}"
    return "see what the others say; then start again"


def _prune(
    config: PruneConfig, observer: Observer, command: str | None, stamp: Stamp, *, go_on: bool, overwrite: bool
) -> Result:
    state = checkpoint.latest(Path(config.out) / CHECKPOINTS) if go_on else None
    result = _result(Path(config.out)) if go_on else None
    plan = make_plan(config, latency=_own_table(config, state, result), observer=observer)
    if result is not None:
        same = {key: value for key, value in plan.identity().items() if key != "configuration"}
        if (other := made_with_another(result, config, **same)) is None:
            observer.stage("complete", f"{config.out} holds this very run, done before")
            # It may have been killed right after its last word.
            RunFolder(Path(config.out), main=is_main_process()).tidy()
            return result
        if not overwrite:
            raise UpopError(
                f"out {config.out}: holds a complete run with another {other}; choose another folder, or add "
                "--overwrite"
            )
    if state is not None and (other := _differs(state, plan)):
        if not overwrite:
            raise UpopError(
                f"out {config.out}: holds a run with another {other} that was stopped; choose another folder, or add "
                "--overwrite"
            )
        log.warning("%s: holds a run with another %s; starting over", config.out, other)
        state = None
    elif go_on and state is None and not overwrite:
        folder = RunFolder(Path(config.out), main=processes.index() == 0)
        kept = config.checkpoint_minutes > 0
        processes.by_first(lambda: folder.check_restart(to_toml(plan.config), kept=kept))
    return _carry_out(plan, observer, command, state, stamp)


def _result(folder: Path) -> Result | None:
    """The result of a complete run in a folder, if there is one."""
    try:
        found: Result = read_json(folder / "result.json", finite=False)
    except (OSError, UpopError):
        return None
    return found if found.get("status") == "complete" else None


def made_with_another(
    result: Result, config: PruneConfig, *, start: str | None, code: str | None, data: str | None
) -> str | None:
    """What makes a result no complete one of `config` from this start, or None; `code` and `data` None: of any."""
    wanted = {"schema": SCHEMA, "status": "complete", "start": start} | ({} if code is None else {"code": code})
    different = [key for key, value in wanted.items() if result.get(key) != value]
    different += [] if is_given(result.get("given"), config) else ["configuration"]
    found = result.get("data")
    if data is not None and not (isinstance(found, dict) and found.get("fingerprint") == data):
        different.append("data")
    return different[0] if different else None


def _own_table(config: PruneConfig, state: Mapping[str, Any] | None, result: Result | None) -> LatencyTable | None:
    """The table of the same run, stopped or complete, in `config.out`; another run there says nothing of this one."""
    own = identity(config)
    if (
        result is not None
        and made_with_another(result, config, start=own["start"], code=own["code"], data=None) is None
    ):
        return _table((result.get("latency_target") or {}).get("table"))
    if state is not None and all(state.get(key) == value for key, value in own.items()):
        return _table(state.get("latency"))
    return None


def _table(found: Mapping[str, Any] | None) -> LatencyTable | None:
    """The latency table that a run was planned with: measured again, it would be another."""
    return None if found is None else LatencyTable.from_dict(found)


def _differs(state: Mapping[str, Any], plan: Plan) -> str | None:
    """What keeps a plan from going on from a checkpoint, or None."""
    return next((key for key, value in plan.identity().items() if state.get(key) != value), None)


def _carry_out(
    plan: Plan, observer: Observer, command: str | None, state: Mapping[str, Any] | None, stamp: Stamp
) -> Result:
    config = plan.given
    accelerator = make_accelerator(plan.config)
    folder = RunFolder(Path(config.out), main=processes.index() == 0)
    session = Session(plan, folder, accelerator, observer, command or own_command())
    stages = Stages(session)
    stages.training_batches(0)  # refuses what cannot be batched before the folder is touched
    with contextlib.ExitStack() as stack:
        processes.by_first(lambda: stack.enter_context(folder.held()))
        # The folder was looked at before, without a lock, and planning takes its time.
        processes.by_first(lambda: folder.refuse_if_changed(stamp))
        stack.enter_context(contextlib.closing(session.tracking))
        # Before anything else is written: a tracker may want a login.
        session.tracking.start(plan.config.model_dump(), None if state is None else state.get("trackers", {}))
        if state is None:
            processes.by_first(lambda: folder.claim(to_toml(plan.config)))
        return _in_folder(stages, state)


def _in_folder(stages: Stages, state: Mapping[str, Any] | None) -> Result:
    session = stages.run
    config = session.plan.given
    with session.folder.log_file(), session.keeper.listening():
        log.info("%s on %s, %s: steps %s", config.model, config.data, config.target, dict(session.plan.steps))
        try:
            if state is not None:
                session.restore(state)
            result = stages.all()
        except BaseException as error:
            log.error("stopped: %s: %s", type(error).__name__, error)
            raise
        log.info("done in %.0f s", result["seconds"]["all"])
    return result
