"""A run that is stopped goes on to the result it would have had, bit for bit."""

import contextlib
import json
import locale
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from upop import checkpoint, losses, plan, run, session, stages, train
from upop.config import make_config
from upop.errors import StopError, UpopError
from upop.families import find_structures
from upop.folder import weights_hash
from upop.latency import LatencyTable
from upop.run import prune, resume
from upop.session import Session

OPTIONS = {
    "model": "deit-digits-2layers",
    "data": "digits",
    "epochs_dense": 1,
    "epochs_search": 1.5,
    "epochs_retrain": 1,
    "batch_size": 16,
    "subset": 64,
    "flip": False,
    "threads": 1,
    "latency_seconds": 0.02,
    "ema": 0.9,
    "randaugment": 1,
    "checkpoint_minutes": 1e-9,  # before every step
}
pytestmark = pytest.mark.usefixtures("only_results")
NUMBERS = ("weights", "accuracy", "loss", "widths", "gap", "ratio", "trajectory", "checks", "params", "macs")


def numbers(folder):
    """What must not depend on an interruption: results, metrics and the trace."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s")
    return {key: result[key] for key in NUMBERS}, lines, (folder / "trace.npz").read_bytes()


class Breaks:
    """Watches a run and breaks it off after so many steps, as a kill would: without a word."""

    def __init__(self, stage, step):
        self.where, self.now = (stage, step), ""

    def stage(self, name, about):
        self.now = name
        if self.where == (name, 0):
            raise MemoryError("gone")

    def progress(self, progress):
        if (self.now, progress.step) == self.where:
            raise MemoryError("gone")

    def epoch(self, number, accuracy): ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory, only_results):
    out = tmp_path_factory.mktemp("whole") / "run"
    prune(make_config({**OPTIONS, "out": str(out)}))
    return out


@pytest.fixture(scope="module")
def whole(folder):
    return numbers(folder)


# The stages have 4 steps an epoch: 4, 6 (half an epoch at the end), 4.
@pytest.mark.parametrize(("stage", "step"), [("dense", 2), ("search", 0), ("search", 4), ("retrain", 3)])
def test_a_broken_run_goes_on_to_the_same_bits(whole, tmp_path, stage, step):
    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        prune(make_config({**OPTIONS, "out": str(out)}), observer=Breaks(stage, step))
    resume(out)
    assert numbers(out) == whole
    assert not (out / "checkpoints").exists(), "a complete run needs none"


def test_it_may_be_broken_again_and_again(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        prune(make_config({**OPTIONS, "out": str(out)}), observer=Breaks("dense", 3))
    for where in [("search", 1), ("search", 5), ("retrain", 0), ("retrain", 2), ("evaluate", 0)]:
        with pytest.raises(MemoryError):
            resume(out, observer=Breaks(*where))
    resume(out)
    assert numbers(out) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unified"},
        {"method": "taylor", "shrink": "progressive"},
        {"target": "open", "max_drop": 0.3, "checks": 4},
        {"optimizer": "adamw", "distill": 0.5, "mixup": 0.2, "stages": "search,retrain"},
    ],
    ids=["trained masks", "taylor", "open-ended", "distilled"],
)
def test_every_kind_of_search_goes_on_to_the_same_bits(folder, tmp_path, options):
    outs = [tmp_path / "whole", tmp_path / "broken"]
    options = {**OPTIONS, "model": str(folder / "dense"), "stages": "search", **options}
    configs = [make_config({**options, "out": str(out)}) for out in outs]
    prune(configs[0])
    with pytest.raises(MemoryError):
        prune(configs[1], observer=Breaks("search", 5))
    resume(outs[1])
    assert numbers(outs[0]) == numbers(outs[1])


LEFT_OPEN = {name: value for name, value in OPTIONS.items() if name not in ("epochs_search", "epochs_retrain")}
LEFT_OPEN |= {"batch_size": 32}


@pytest.fixture(scope="module")
def ranked_once(tmp_path_factory, only_results):
    return prune(make_config({**LEFT_OPEN, "out": str(tmp_path_factory.mktemp("ranked") / "run")}))


@pytest.mark.parametrize(("stage", "step"), [("search", 0), ("retrain", 3)])
def test_a_run_that_ranks_once_because_nothing_else_was_said_goes_on_as_that(ranked_once, tmp_path, stage, step):
    whole, out = ranked_once, tmp_path / "run"
    with pytest.raises(MemoryError):
        prune(make_config({**LEFT_OPEN, "out": str(out)}), observer=Breaks(stage, step))
    resumed = resume(out)
    assert {key: resumed[key] for key in NUMBERS} == {key: whole[key] for key in NUMBERS}
    assert (resumed["config"]["epochs_search"], resumed["config"]["epochs_retrain"]) == (0, 6)


def test_a_damaged_checkpoint_is_passed_by(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        prune(make_config({**OPTIONS, "out": str(out)}), observer=Breaks("search", 5))
    newest = sorted((out / "checkpoints").iterdir())[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resume(out)
    assert numbers(out) == whole


def test_a_damaged_checkpoint_that_was_passed_by_is_not_among_the_last_two(tmp_path):
    out = tmp_path / "run"
    options = {"stages": "dense", "out": str(out)}
    with pytest.raises(MemoryError):
        prune(make_config({**OPTIONS, **options}), observer=Breaks("dense", 3))
    (max((out / "checkpoints").iterdir()) / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(MemoryError):
        resume(out, observer=Breaks("dense", 2))
    assert [checkpoint.read(path)["fit"]["tally"]["step"] for path in sorted((out / "checkpoints").iterdir())] == [
        1,
        1,
    ]


class Signals:
    """Asks the run to stop when it begins to measure."""

    def stage(self, name, about):
        if name == "evaluate":
            os.kill(os.getpid(), signal.SIGTERM)

    def progress(self, progress): ...

    def epoch(self, number, accuracy): ...


def test_a_signal_while_measuring_stops_the_run_too(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StopError, match=rf"evaluate: stopped by SIGTERM; go on with --resume {out}"):
        prune(make_config({**OPTIONS, "out": str(out)}), observer=Signals())
    resume(out)
    assert numbers(out) == whole


def test_a_signal_at_the_very_end_is_heard_once_the_run_is_complete(tmp_path, monkeypatch):
    out = tmp_path / "run"
    measured = stages.measure_promise
    monkeypatch.setattr(stages, "measure_promise", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or measured(*a))
    with pytest.raises(StopError, match=rf"stopped by SIGTERM; the run is complete, in {out}"):
        prune(make_config({**OPTIONS, "stages": "dense", "epochs_dense": 0.1, "out": str(out)}))
    assert json.loads((out / "result.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("stages", ["dense", "dense,search"])
def test_a_run_broken_off_while_its_model_is_written_still_leaves_one(tmp_path, monkeypatch, stages):
    out = tmp_path / "run"
    save = Session.save

    def breaks(self, model, name):
        if name == "model":
            raise MemoryError("gone")
        save(self, model, name)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", breaks)
        with pytest.raises(MemoryError):
            prune(make_config({**OPTIONS, "stages": stages, "out": str(out)}))
    resumed = resume(out)
    assert resumed["weights"] == weights_hash(out / "model") is not None


def test_seconds_are_those_of_all_processes_that_a_run_took(tmp_path, monkeypatch):
    clock = [0.0]

    def now():
        clock[0] += 1e-6
        return clock[0]

    class Ticks(Breaks):
        def progress(self, progress):
            clock[0] += 1.0
            super().progress(progress)

    monkeypatch.setattr(session.time, "monotonic", now)

    out = tmp_path / "run"
    config = make_config({**OPTIONS, "stages": "dense", "out": str(out)})
    with pytest.raises(MemoryError):
        prune(config, observer=Ticks("dense", 3))
    clock[0] = 1e6
    seconds = resume(out, observer=Ticks("", 0))["seconds"]
    # The step that was broken off is done, and counted, once.
    assert (round(seconds["dense"], 1), round(seconds["all"], 1)) == (4.0, 4.0)


def test_go_on_with_a_complete_run_gives_its_result_and_touches_nothing(tmp_path):
    out = tmp_path / "run"
    config = make_config({**OPTIONS, "stages": "dense", "epochs_dense": 0.1, "out": str(out)})
    first = prune(config, go_on=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prune(config, go_on=True) == json.loads((out / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(UpopError, match="holds a complete run with another configuration; choose another"):
        prune(other, go_on=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert prune(other, go_on=True, overwrite=True)["accuracy"] != first["accuracy"]


@pytest.mark.parametrize("lost", ["checkpoints", "none kept", "damaged"])
def test_go_on_where_there_is_nothing_to_go_on_from_deletes_no_model(tmp_path, lost):
    out = tmp_path / "run"
    config = make_config({**OPTIONS, "stages": "dense,search", "epochs_dense": 0.2, "out": str(out)})
    if lost == "none kept":
        config = config.model_copy(update={"checkpoint_minutes": 0})
    with pytest.raises(MemoryError):
        prune(config, observer=Breaks("search", 1))
    if lost == "checkpoints":
        shutil.rmtree(out / "checkpoints")
    for path in out.glob("checkpoints/*/tensors.safetensors"):
        path.write_bytes(b"cut")
    before = sorted(out.rglob("*"))
    for other in (config, config.model_copy(update={"seed": 7})):
        with pytest.raises(UpopError, match=r"holds a run that cannot be taken up, its .*dense.* would be lost"):
            prune(other, go_on=True)
    assert sorted(out.rglob("*")) == before
    assert prune(config, go_on=True, overwrite=True)["status"] == "complete"


def test_go_on_starts_over_what_was_stopped_before_it_had_anything(tmp_path):
    out = tmp_path / "run"
    config = make_config({**OPTIONS, "stages": "dense", "epochs_dense": 0.2, "out": str(out)})
    with pytest.raises(MemoryError):
        prune(config, observer=Breaks("dense", 0))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    with pytest.raises(UpopError, match="holds a run with another configuration, stopped before its first checkpoint"):
        prune(config.model_copy(update={"seed": 7}), go_on=True)
    assert prune(config, go_on=True)["status"] == "complete"


@pytest.fixture
def tables(monkeypatch):
    """The latency tables that were measured, on a machine that measures in no time."""
    made = []

    def measure(model, *, batch, image_size, structures, dtype, **_):
        found = find_structures(model, structures)
        points = {s.kind: ((0.5, 8.0),) for s in found}
        made.append(
            LatencyTable(
                10.0, points, {s.name: s.width for s in found}, batch=batch, image_size=image_size, dtype=dtype
            )
        )
        return made[-1]

    monkeypatch.setattr(plan, "measure_latency_table", measure)
    return made


IN_TIME = {**OPTIONS, "stages": "search", "epochs_search": 0, "rank_rounds": 1, "target": "latency=0.2"}


@pytest.mark.parametrize("changed", [{"latency_batch": 2}, {"structures": "attn,mlp,block"}], ids=str)
def test_a_run_that_starts_over_with_another_target_in_time_measures_its_own_table(tmp_path, tables, changed):
    config = {**IN_TIME, "out": str(tmp_path / "run")}
    with pytest.raises(MemoryError):
        prune(make_config(config), observer=Breaks("evaluate", 0))
    with pytest.raises(UpopError, match="holds a run with another configuration that was stopped"):
        prune(make_config({**config, **changed}), go_on=True)
    result = prune(make_config({**config, **changed}), go_on=True, overwrite=True)
    assert result["latency_target"]["table"] == tables[-1].to_dict()
    assert len(tables) == 3


@pytest.mark.parametrize("options", [{}, {"go_on": True}], ids=str)
def test_a_run_that_another_has_overtaken_while_it_planned_deletes_nothing_of_it(tmp_path, monkeypatch, options):
    out = tmp_path / "run"
    config = make_config({**OPTIONS, "stages": "dense", "epochs_dense": 0.1, "out": str(out)})
    planned = run.make_plan

    def slowly(config, **more):
        monkeypatch.setattr(run, "make_plan", planned)
        prune(config.model_copy(update={"seed": 1}))
        return planned(config, **more)

    monkeypatch.setattr(run, "make_plan", slowly)
    with pytest.raises(UpopError, match=r"another run has worked in it meanwhile|holds a run that cannot be taken up"):
        prune(config, **options)
    assert json.loads((out / "result.json").read_text())["config"]["seed"] == 1
    assert (out / "model").exists()


def test_go_on_with_a_complete_run_measures_no_second_table(tmp_path, tables):
    config = make_config({**IN_TIME, "out": str(tmp_path / "run")})
    prune(config)
    assert prune(config, go_on=True)["status"] == "complete"
    assert len(tables) == 1


def test_what_cannot_go_on_is_refused_in_one_line(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UpopError, match="expected the folder of a run, got none; check the path"):
        resume(out)
    out.mkdir()
    with pytest.raises(UpopError, match="holds no whole checkpoint; start the run again"):
        resume(out)
    out.rmdir()
    config = make_config({**OPTIONS, "stages": "dense", "out": str(out)})
    with pytest.raises(MemoryError):
        prune(config, observer=Breaks("dense", 3))
    with pytest.raises(UpopError, match=rf"holds a run that was stopped; go on with --resume {out}, or start over"):
        prune(config)
    for path in (out / "checkpoints").iterdir():
        state = checkpoint.read(path)
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
        checkpoint.write(out / "checkpoints", {**state, "code": "another"})
    with pytest.raises(UpopError, match="was begun with another code; start the run again with --overwrite"):
        resume(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(UpopError, match="holds a run with another code that was stopped; choose another folder"):
        prune(config, go_on=True)
    assert sorted(out.rglob("*")) == before
    prune(config, go_on=True, overwrite=True)
    with pytest.raises(UpopError, match="this run is complete"):
        resume(out)


@pytest.mark.slow
def test_a_process_that_ctrl_c_stopped_goes_on_to_the_same_bits(whole, tmp_path):
    """Kills that nobody hears are the next test's."""
    out = tmp_path / "run"
    flags = [
        part for key, value in OPTIONS.items() if key != "flip" for part in ("--" + key.replace("_", "-"), str(value))
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "upop.cli", "prune", *flags, "--no-flip", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("0000000[2-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.splitlines()[-1].endswith(f"stopped by SIGINT; go on with --resume {out}")
    resume(out)
    assert numbers(out) == whole


# Two steps a stage.
SOAKED = {"model": "deit-digits-2layers", "batch_size": 32, "subset": 64, "epochs_search": 1}


@pytest.mark.slow
def test_a_dozen_kills_at_random_moments_change_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import soak

    found = soak.soak(tmp_path, minutes=60, kills=12, seed=5, **SOAKED)
    assert found["violations"] == []
    assert found["kills"] >= 12


# ---------------------------------------------------------------- numbers that cannot lie


def test_clock_locale_and_time_zone_change_no_number(whole, tmp_path, monkeypatch):
    for name in ("tr_TR.UTF-8", "de_DE.UTF-8", "C.UTF-8"):
        with contextlib.suppress(locale.Error):
            monkeypatch.setenv("LC_ALL", locale.setlocale(locale.LC_ALL, name))
            break
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 7e8)
    try:
        prune(make_config({**OPTIONS, "out": str(tmp_path / "run")}))
    finally:
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        monkeypatch.undo()
        time.tzset()
    assert numbers(tmp_path / "run") == whole


def spoiled(monkeypatch, calls):
    """Make the loss of some forward passes in training, counted from 1, no number."""
    count, loss = iter(range(1, 10_000)), losses.classification_loss
    spoil = lambda *args: loss(*args) * (math.nan if next(count) in calls else 1.0)  # noqa: E731
    monkeypatch.setattr(losses, "classification_loss", spoil)


@pytest.mark.parametrize("method", ["upop", "unified"])
def test_steps_that_are_not_finite_are_said_in_the_result(tmp_path, monkeypatch, method):
    # 12 steps of the dense stage, 12 of the search, which may lose one in ten, and 4 of retraining.
    spoiled(monkeypatch, {4, 16})
    options = {"subset": 128, "epochs_dense": 1.5, "epochs_retrain": 0.5, "method": method}
    result = prune(make_config({**OPTIONS, **options, "out": str(tmp_path / "run")}))
    assert {stage: each["skipped_steps"] for stage, each in result["training"].items()} == {
        "dense": 1,
        "search": 1,
        "retrain": 0,
    }
    assert [line for line in result["warnings"] if "left out" in line] == [
        f"{stage}: 1 steps were left out: loss or gradients were not finite" for stage in ("dense", "search")
    ]
    assert result["params"]["after"] / result["params"]["before"] == pytest.approx(0.5, abs=0.01)


def test_a_run_whose_loss_breaks_names_what_it_has_kept(tmp_path, monkeypatch):
    out = tmp_path / "run"
    spoiled(monkeypatch, range(6, 100))
    with pytest.raises(UpopError) as error:
        prune(make_config({**OPTIONS, "out": str(out)}))
    assert re.match(
        rf"search: loss or gradients are no longer finite at step \d+ of 6 .*; the last good weights are in "
        rf"{out}/last-good; the last checkpoint is in {out}/checkpoints$",
        str(error.value),
    )
    assert not (out / "result.json").exists()
    assert all(value.isfinite().all() for value in checkpoint.latest(out / "checkpoints")["model"].values())


class Poisons(Breaks):
    """Breaks the weights themselves, after a step, when a checkpoint is about to be written."""

    def __init__(self, models):
        super().__init__("search", 3)
        self.models = models

    def progress(self, progress):
        if (self.now, progress.step) == self.where:
            with torch.no_grad():
                self.models[-1].classifier.weight.fill_(math.nan)


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path, monkeypatch):
    models, fit, out = [], stages.fit, tmp_path / "run"
    monkeypatch.setattr(stages, "fit", lambda model, *args, **more: models.append(model) or fit(model, *args, **more))
    with pytest.raises(UpopError, match=r"search: weights are no longer finite; .* the last checkpoint is in"):
        prune(make_config({**OPTIONS, "out": str(out)}), observer=Poisons(models))
    state = checkpoint.latest(out / "checkpoints")
    assert state["fit"]["tally"]["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_run_short_of_memory_says_what_it_did(tmp_path, monkeypatch, caplog):
    whole_batch = train._Passes._whole

    def short(self, images, labels, in_all, micro):
        if micro > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole_batch(self, images, labels, in_all, micro)

    monkeypatch.setattr(train._Passes, "_whole", short)
    options = {**OPTIONS, "batch_size": 32, "epochs_search": 1}
    result = prune(make_config({**options, "out": str(tmp_path / "run")}))
    assert {each["micro_batch"] for each in result["training"].values()} == {8}
    assert "dense: memory ran out; micro-batches of 8 images, the same steps" in result["warnings"]
    assert "step 1: out of memory with 32 images at a time; going on with 16, same batch" in caplog.text
    assert "memory" in (tmp_path / "run/log").read_text()


def test_a_run_that_goes_on_in_another_number_format_says_so(tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = {**OPTIONS, "stages": "dense", "epochs_dense": 0.5, "out": str(out)}
    monkeypatch.setattr("upop.devices.has_bf16", lambda device: True)
    with pytest.raises(MemoryError):
        prune(make_config(options), observer=Breaks("dense", 1))
    monkeypatch.setattr("upop.devices.has_bf16", lambda device: False)
    (note,) = (line for line in resume(out)["warnings"] if "went on in" in line)
    assert note == "dense: begun in bf16 on cpu, went on in fp32 on cpu: rounded in another way"


def test_a_run_that_was_killed_after_its_last_word_is_tidied_by_resume(tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoints/00000001", "last-good"):
        (folder / name).mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "complete"}')
    with pytest.raises(UpopError, match="this run is complete"):
        resume(folder)
    assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_what_is_left_of_a_result_makes_no_run_complete(tmp_path):
    (tmp_path / "checkpoints/00000001").mkdir(parents=True)
    (tmp_path / "result.json").write_text("")
    with pytest.raises(UpopError, match="holds no whole checkpoint"):
        resume(tmp_path)
    assert (tmp_path / "checkpoints/00000001").exists()


# ---------------------------------------------------------------- the format


def test_a_checkpoint_returns_what_it_was_given(tmp_path):
    state = {
        "optimizers": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}}, "groups": [1, 2]}],
        "text": "a", "none": None, "number": 0.1 + 0.2, "flag": True, "bits": torch.tensor([True, False]),
        "empty": {}, "half": torch.randn(3).bfloat16(),
    }  # fmt: skip
    found = checkpoint.read(checkpoint.write(tmp_path, state))
    assert found.keys() == state.keys()
    assert list(found["optimizers"][0]["state"]) == [0]
    assert torch.equal(found["optimizers"][0]["state"][0]["exp_avg"], state["optimizers"][0]["state"][0]["exp_avg"])
    assert torch.equal(found["half"], state["half"])
    assert torch.equal(found["bits"], state["bits"])
    assert {k: found[k] for k in ("text", "none", "number", "flag", "empty")} == {
        k: state[k] for k in ("text", "none", "number", "flag", "empty")
    }


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "seal.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_told_apart_and_the_one_before_taken(tmp_path, name, damage):
    for number in (1, 2):
        path = checkpoint.write(tmp_path, {"number": number, "tensor": torch.arange(5)})
    file = path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "gone": file.unlink,
        "cut": lambda: os.truncate(file, len(data) // 2),
        "flipped": lambda: file.write_bytes(data),
        "empty": lambda: file.write_bytes(b""),
    }[damage]()
    with pytest.raises(UpopError, match=str(path)) as refused:
        checkpoint.read(path)
    assert "\n" not in str(refused.value)
    assert checkpoint.latest(tmp_path)["number"] == 1


def test_the_last_two_are_kept(tmp_path):
    keeper = checkpoint.Keeper(tmp_path, minutes=0)
    for number in range(4):
        keeper.save({"number": number})
    assert [checkpoint.read(path)["number"] for path in sorted(tmp_path.iterdir())] == [2, 3]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    keeper = checkpoint.Keeper(tmp_path, minutes=0)

    def killed(path, **options):
        if path.exists():
            (path / "seal.json").unlink()
            raise KeyboardInterrupt

    for number in range(2):
        keeper.save({"number": number})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            keeper.save({"number": 2})
    assert [checkpoint.read(path)["number"] for path in sorted(tmp_path.glob("[0-9]*"))] == [1, 2]
    keeper.save({"number": 3})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000002", "00000003"]


def test_where_none_are_wanted_none_is_due_but_the_end_that_was_asked_for(tmp_path):
    keeper = checkpoint.Keeper(tmp_path, minutes=0)
    assert not keeper.due
    with keeper.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert keeper.due


def test_a_signal_asks_for_a_checkpoint_and_leaves_the_handlers_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    keeper = checkpoint.Keeper(tmp_path, minutes=60)
    with keeper.listening():
        assert not keeper.due
        os.kill(os.getpid(), signal.SIGTERM)
        assert keeper.due
        assert keeper.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(StopError, UpopError)
