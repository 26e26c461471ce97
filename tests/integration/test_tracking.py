"""Trackers are told all of a run, are refused before any training, and never end one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import tracking as accelerates
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from upop import stages
from upop.config import make_config
from upop.errors import StopError, UpopError
from upop.run import prune, resume
from upop.tracking import parse_trackers

QUICK = {
    "model": "deit-digits-2layers",
    "data": "digits",
    "epochs_dense": 1,
    "epochs_search": 1,
    "epochs_retrain": 1,
    "batch_size": 16,
    "subset": 48,
    "latency_seconds": 0.02,
    "flip": False,
}


class StandIn(GeneralTracker):
    """A tracker that remembers, and fails where it is told to."""

    name = "stand-in"
    requires_logging_directory = False
    fails: tuple[str, ...] = ()
    made: "list[StandIn]"

    def __init__(self, project, **options):
        self.project, self.options = project, options
        self.numbers, self.pictures, self.config, self.ended = {}, {}, None, 0
        self.tracker = SimpleNamespace(id="run-7")
        super().__init__()
        self.made.append(self)

    def start(self):
        self._may_fail("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self._may_fail("log")
        for key, value in values.items():
            self.numbers.setdefault(key, []).append((step, value))

    def log_images(self, values, step=None):
        self.pictures |= values

    def finish(self):
        self.ended += 1

    def _may_fail(self, what):
        if what in self.fails:
            raise ConnectionError(f"no route\nto host ({what})")


@pytest.fixture
def stand_in(monkeypatch):
    """Registers a stand-in of some name; `made` are those that runs have made of it."""

    def register(name="stand-in", **members):
        kind = type("Registered", (StandIn,), {"name": name, "made": [], **members})
        monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, name, kind)
        return kind

    return register


def test_trackers_are_told_numbers_settings_and_pictures_of_all_stages(stand_in, tmp_path):
    kind = stand_in()
    folder = tmp_path / "run"
    result = prune(make_config({**QUICK, "tracker": "tensorboard,stand-in", "out": str(folder)}))

    events = EventAccumulator(str(folder / "upop"), size_guidance={"scalars": 0, "images": 0}).Reload()
    board = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    [other] = kind.made
    assert other.numbers.keys() == board.keys()
    for tag, told in board.items():
        assert [step for step, _ in other.numbers[tag]] == [step for step, _ in told]
        assert [value for _, value in told] == pytest.approx([value for _, value in other.numbers[tag]])

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = {line["stage"]: line for line in lines}
    for number, stage in enumerate(("dense", "search", "retrain"), 1):
        for name, key in (
            ("loss", "loss"),
            ("accuracy", "accuracy"),
            ("validation_accuracy", "validation_accuracy"),
            ("learning_rate", "lr"),
            ("images_per_second", "images_per_s"),
            ("parameters", "params"),
        ):
            assert board[f"{stage}/{name}"][-1] == (3 * number, pytest.approx(ends[stage][key], abs=1e-6, rel=1e-6))
    assert board["search/ratio"][-1][1] == pytest.approx(result["ratio"]["prunable"], abs=0.01)
    assert board["search/parameters"][-1][1] == board["retrain/parameters"][-1][1] == result["params"]["after"]
    assert board["result/accuracy/retrain/test"] == [(9, pytest.approx(result["accuracy"]["retrain"]["test"]))]
    assert board["result/parameters/before"] == [(9, result["params"]["before"])]
    after_ms = result["latency"]["64"]["after"]["median_ms"]
    assert board["result/latency_ms/batch_64/after"] == [(9, pytest.approx(after_ms))]

    assert other.config["target"] == "params=0.5"
    assert "target: params=0.5" in next((folder / "upop").rglob("hparams.yml")).read_text()
    for name in ("widths", "stages"):
        with Image.open(folder / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert np.array_equal(other.pictures[f"pictures/{name}"], pixels[None])
        [shown] = events.Images(f"pictures/{name}")
        assert (shown.height, shown.width) == pixels.shape[:2]
    assert other.ended == 1


def test_a_tracker_that_cannot_start_costs_no_training_and_no_older_run(stand_in, tmp_path):
    kind = stand_in(fails=("start",))
    folder = tmp_path / "run"
    config = {**QUICK, "stages": "dense", "out": str(folder)}
    message = r"^tracker tensorboard, stand-in: cannot start \(ConnectionError: no route to host \(start\)\); log in"
    with pytest.raises(UpopError, match=message):
        prune(make_config({**config, "tracker": "tensorboard,stand-in"}))
    assert list(tmp_path.iterdir()) == []
    assert kind.made[0].ended == 1
    folder.mkdir()
    (folder / ".upop-run").write_text("")
    (folder / "result.json").write_text("years of work")
    with pytest.raises(UpopError, match=message):
        prune(make_config({**config, "tracker": "tensorboard,stand-in"}), overwrite=True)
    assert {path.name for path in folder.iterdir()} == {".upop-run", "result.json"}


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(stand_in, tmp_path):
    broken, whole = stand_in("broken", fails=("log",)), stand_in()
    config = {**QUICK, "stages": "dense", "tracker": "broken,stand-in", "out": str(tmp_path / "run")}
    result = prune(make_config(config))
    line = "tracker broken: failed (ConnectionError: no route to host (log)) and was told nothing more"
    assert line in result["warnings"]
    assert line in json.loads((tmp_path / "run/result.json").read_text())["warnings"]
    assert broken.made[0].numbers == {}
    assert "result/accuracy/dense/test" in whole.made[0].numbers


def test_a_picture_that_could_not_be_drawn_is_no_fault_of_a_tracker(stand_in, tmp_path, monkeypatch):
    kind = stand_in()
    monkeypatch.setitem(stages.PICTURES, "widths.png", lambda result, file: 1 / 0)
    config = {**QUICK, "stages": "dense", "tracker": "stand-in", "out": str(tmp_path / "run")}
    result = prune(make_config(config))
    assert not [line for line in result["warnings"] if "tracker" in line]
    assert list(kind.made[0].pictures) == ["pictures/stages"]


class Stops:
    """Gives up when the search begins, once."""

    def stage(self, name, about):
        if name == "search":
            raise StopError("enough")

    def progress(self, progress): ...
    def epoch(self, number, accuracy): ...


def test_a_run_that_is_taken_up_again_goes_on_with_its_trackers_runs(stand_in, tmp_path, monkeypatch):
    kind = stand_in("wandb")
    monkeypatch.setattr("upop.tracking.get_available_trackers", lambda: [accelerates.LoggerType.WANDB])
    monkeypatch.setattr(accelerates, "_available_trackers", [accelerates.LoggerType.WANDB])
    folder = tmp_path / "half"
    with pytest.raises(StopError):
        prune(make_config({**QUICK, "tracker": "wandb", "out": str(folder)}), observer=Stops())
    assert kind.made[0].options == {"name": "half"}
    assert kind.made[0].ended == 1, "or the next run in this process would go on with it"
    logs = folder / "upop"
    logs.mkdir()
    kind.fails = ("start",)
    with pytest.raises(UpopError, match="tracker wandb: cannot start"):
        resume(folder)
    assert logs.is_dir(), "what an earlier process has logged stays"
    kind.fails = ()
    kind.made.pop()
    resume(folder)
    assert kind.made[1].options == {"id": "run-7", "resume": "allow"}
    assert "dense/loss" in kind.made[0].numbers
    assert "dense/loss" not in kind.made[1].numbers
    assert "retrain/loss" in kind.made[1].numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorbord", r"^tracker 'tensorbord': expected some of .*, got 'tensorbord'; did you mean 'tensorboard'\?$"),
        ("tensorboard,wandbb", "did you mean 'wandb'"),
        ("", "got none"),
    ],
)
def test_an_unknown_tracker_is_named(text, message):
    with pytest.raises(UpopError, match=message):
        parse_trackers(text)


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("upop.tracking.get_available_trackers", list)
    with pytest.raises(
        UpopError, match=r"^tracker 'comet_ml': is not installed; pip install comet-ml, or leave it out$"
    ):
        parse_trackers("comet_ml")
    monkeypatch.undo()
    assert parse_trackers("tensorboard, tensorboard") == ("tensorboard",)
    assert parse_trackers(None) == ()
