"""A study does what is not done, once, by whichever executor, and loses nothing."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from upop import cli
from upop.errors import UpopError
from upop.executors import make_executor
from upop.study import look, run_study
from upop.studyfile import load_study

TEXT = """
seeds = [0]
[dense]
model = "deit-digits-2layers"
epochs_dense = 1
batch_size = 16
subset = 96
flip = false
threads = 1
[base]
data = "digits"
epochs_search = 0.5
epochs_retrain = 0.5
batch_size = 16
subset = 96
flip = false
lr = 1e-3
threads = 1
latency_seconds = 0.02
[[grid]]
method = ["upop", "mask"]
"""


pytestmark = pytest.mark.usefixtures("only_results")


class Watcher:
    def __init__(self):
        self.plans, self.ended = [], []

    def planned(self, todo, done, failed):
        self.plans.append((todo, done, failed))

    def started(self, label):
        pass

    def finished(self, label, error, result, seconds):
        self.ended.append((label, error))


def go(out, text=TEXT, executor="local", **options):
    path = out.parent / "mine.toml"
    path.write_text(text)
    watcher = Watcher()
    workers = {"local": None, "ray": 1}.get(executor, 2)
    chosen = make_executor(executor, workers=workers, address="local" if executor == "ray" else None)
    return run_study(load_study(path, out), out, executor=chosen, observer=watcher, **options), watcher


def numbers(out):
    """What must not change when a run is repeated: all but time."""
    keys = ("accuracy", "loss", "widths", "gap", "ratio", "trajectory", "params", "weights")
    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))}
    return {label: {key: result[key] for key in keys} for label, result in results.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory, only_results):
    out = tmp_path_factory.mktemp("study") / "out"
    summary, watcher = go(out)
    assert watcher.plans == [(3, 0, 0)]
    assert summary.done == ("dense", "upop_params0.5_s0", "mask_params0.5_s0")
    return out


@pytest.fixture
def out(done, tmp_path):
    shutil.copytree(done, tmp_path / "out")
    return tmp_path / "out"


def test_a_second_call_does_nothing(out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    summary, watcher = go(out)
    assert summary.ran == ()
    assert watcher.plans == [(0, 3, 0)]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}


@pytest.mark.parametrize("damage", ["deleted", "broken", "another data set", "another code", "another start"])
def test_only_what_no_longer_counts_is_done_again_to_the_same_numbers(out, damage):
    before = numbers(out)
    file = out / "mask_params0.5_s0/result.json"
    result = json.loads(file.read_text())
    changes = {
        "another data set": {"data": result["data"] | {"fingerprint": "x"}},
        "another code": {"code": "x"},
        "another start": {"start": "x"},
    }
    if damage == "deleted":
        file.unlink()
    elif damage == "broken":
        file.write_text(file.read_text()[:500])
    else:
        file.write_text(json.dumps(result | changes[damage]))
        why = "another " + damage.removeprefix("another ").removesuffix(" set")
        with pytest.raises(UpopError, match=rf"holds 1 complete results.*mask_params0\.5_s0: made with {why}\)"):
            go(out)
        assert file.read_text() == json.dumps(result | changes[damage])
    summary, _ = go(out, overwrite=True)
    assert summary.ran == ("mask_params0.5_s0",)
    assert numbers(out) == before


def test_a_look_says_what_a_call_would_do_and_why(out):
    text = TEXT.replace('["upop", "mask"]', '["upop", "mask", "magnitude"]') + "[[grid]]\nlr_search = 1e30\n"
    broken = "upop_params0.5_lr-search-1e+30_s0"
    go(out, text)
    shutil.rmtree(out / "magnitude_params0.5_s0")
    file = out / "mask_params0.5_s0/result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "x"}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    study = load_study(out.parent / "mine.toml", out)
    found = {run.label: (run.state, run.why) for run in look(study, out)}
    assert found.pop(broken)[0] == "failed"
    assert found == {
        "dense": ("done", None),
        "upop_params0.5_s0": ("done", None),
        "mask_params0.5_s0": ("missing", "made with another code"),
        "magnitude_params0.5_s0": ("missing", None),
    }
    assert {run.label for run in look(study, out, any_code=True) if run.state == "missing"} == {
        "magnitude_params0.5_s0"
    }
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert set(go(out, text, overwrite=True)[0].ran) == {"mask_params0.5_s0", "magnitude_params0.5_s0"}


def test_a_look_before_anything_ran_needs_no_data(tmp_path):
    (tmp_path / "mine.toml").write_text(TEXT.replace('data = "digits"', 'data = "nowhere"'))
    found = look(load_study(tmp_path / "mine.toml", tmp_path / "out"), tmp_path / "out")
    assert [run.state for run in found] == ["missing"] * 3


def test_results_of_other_code_count_when_asked_to(out):
    file = out / "mask_params0.5_s0/result.json"
    result = json.loads(file.read_text()) | {"code": "x"}
    del result["given"]["ema"]  # an option that the other code did not know
    file.write_text(json.dumps(result))
    assert go(out, any_code=True)[0].ran == ()


def test_a_changed_configuration_is_another_run(out):
    summary, _ = go(out, TEXT.replace("epochs_retrain = 0.5", "epochs_retrain = 0.6"), overwrite=True)
    assert set(summary.ran) == {"upop_params0.5_s0", "mask_params0.5_s0"}


def test_a_failed_run_is_kept_apart_and_retried_on_request(out):
    text = TEXT + '[[grid]]\nmethod = "upop"\nlr_search = 1e30\n'
    label = "upop_params0.5_lr-search-1e+30_s0"
    summary, watcher = go(out, text)
    assert list(summary.failed) == [label]
    assert watcher.ended == [(label, summary.failed[label])]
    assert "finite" in summary.failed[label]
    assert json.loads((out / "study.json").read_text())["runs"][label]["state"] == "failed"
    assert go(out, text)[0].ran == ()
    assert go(out, text, retry_failed=True)[0].ran == (label,)


def test_where_all_runs_fail_that_is_what_the_last_line_says(tmp_path, monkeypatch, capsys):
    base = TEXT.partition("[base]")[2].partition("[[grid]]")[0]
    text = f'[base]\nmodel = "deit-digits-2layers"\n{base}\n[[grid]]\nmethod = "upop"\nlr_search = 1e30\n'
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["upop", "study", "mine.toml", "--out", "out"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "upop: 1 runs failed; see out/failed, then use --retry-failed"


def test_a_run_that_was_done_by_hand_after_it_had_failed_is_done(out):
    done = "upop_params0.5_s0"
    given = json.loads((out / done / "result.json").read_text())["given"]
    (out / "failed").mkdir(exist_ok=True)
    (out / "failed" / f"{done}.json").write_text(json.dumps({"error": "out of memory", "given": given}))
    summary, watcher = go(out)
    assert done in summary.done
    assert not summary.failed
    assert watcher.plans == [(0, len(summary.done), 0)]


def test_a_new_dense_model_makes_all_runs_anew(out):
    text = TEXT.replace("epochs_dense = 1", "epochs_dense = 0.5")
    shutil.rmtree(out / "dense")
    before = numbers(out)
    with pytest.raises(UpopError, match=r"holds 2 complete results .*\(upop_params0\.5_s0: made with another start\)"):
        go(out, text)
    assert numbers(out) == before
    summary, _ = go(out, text, overwrite=True)
    assert summary.ran == ("dense", "upop_params0.5_s0", "mask_params0.5_s0")


def test_the_dense_model_is_not_measured_again_by_every_run(done):
    dense = json.loads((done / "dense/result.json").read_text())["accuracy"]["dense"]
    for path in done.glob("*/result.json"):
        assert json.loads(path.read_text())["accuracy"]["dense"] == dense


def test_two_processes_do_not_work_on_one_study(out):
    with FileLock(out / ".lock"), pytest.raises(UpopError, match="another process works on this study"):
        go(out)


def test_the_manifest_says_how_every_run_stands(done):
    manifest = json.loads((done / "study.json").read_text())
    assert {run["state"] for run in manifest["runs"].values()} == {"done"}
    assert manifest["dense"] == "dense"
    assert manifest["runs"]["mask_params0.5_s0"]["differences"]["method"] == "mask"


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "missing"), [("processes", ["upop", "mask"]), ("ray", ["mask"])])
def test_workers_give_the_results_of_one_process(done, out, executor, missing):
    labels = {f"{method}_params0.5_s0" for method in missing}
    for label in labels:
        shutil.rmtree(out / label)
    summary, _ = go(out, executor=executor)
    assert set(summary.ran) == labels, (out / "logs").is_dir() and os.listdir(out)
    assert numbers(out) == numbers(done)


@pytest.mark.parametrize(("executor", "code"), [("processes", 130), ("local", 75)])
def test_a_study_that_is_asked_to_stop_ends_after_its_runs_which_keep_a_checkpoint(tmp_path, executor, code):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    path.write_text(TEXT.replace("epochs_dense = 1", "epochs_dense = 2000"))
    command = [sys.executable, "-m", "upop", "study", str(path), "--out", str(out), "--executor", executor]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "dense/last-good").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert executor != "local" or said.endswith("stopped by SIGTERM; the same command goes on from there\n")
    finally:
        process.kill()
    assert not (out / "failed").exists()
    # Nobody writes any more, and the run can be taken up.
    assert list((out / "dense/checkpoints").glob("0*"))
    with FileLock(out / "dense.lock", timeout=0):
        pass
