"""The whole command, end to end, on a model small enough for a minute, and everything that it promises to leave."""

import json

import pytest
import torch
from PIL import Image

import upop
from upop.config import make_config
from upop.plan import make_plan
from upop.run import prune

QUICK = {
    "model": "deit-digits",
    "data": "digits",
    "epochs_dense": 3,
    "epochs_search": 1,
    "epochs_retrain": 1,
    "batch_size": 64,
    "subset": 640,
    "flip": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "half"
    return folder, prune(make_config({**QUICK, "out": str(folder)}))


def test_the_folder_holds_all_that_was_promised_and_nothing_half_written(run):
    folder, result = run
    wanted = {
        "model",
        "dense",
        "slim",
        ".upop-run",
        "result.json",
        "config.toml",
        "metrics.jsonl",
        "log",
        "widths.png",
        "stages.png",
        "trace.npz",
    }
    assert {path.name for path in folder.iterdir()} == wanted
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    for name in ("widths.png", "stages.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300


def test_the_result_says_what_was_done_and_what_came_out(run):
    _, result = run
    assert list(result["accuracy"]) == ["dense", "search", "slim", "retrain"]
    splits = {stage: set(found) for stage, found in result["accuracy"].items()}
    assert splits.pop("search") == {"validation"}, "the masked model is nobody's to keep: test is not spent on it"
    assert all(found == {"validation", "test"} for found in splits.values())
    assert abs(result["params"]["after"] / result["params"]["before"] - 0.5) < 0.01
    assert result["macs"]["after"] < 0.6 * result["macs"]["before"]
    assert set(result["latency"]) == {"1", "64"}
    assert {kind: len(widths) for kind, widths in result["widths"]["after"].items()} == {"attn": 4, "mlp": 4}
    assert set(result["seconds"]) >= {"dense", "search", "retrain", "evaluate", "all"}
    assert result["config"]["seed"] == 0
    assert result["versions"]["torch"]
    assert result["hardware"]["cores"]


def test_slimming_changes_no_accuracy(run):
    _, result = run
    assert result["accuracy"]["search"] == {"validation": result["accuracy"]["slim"]["validation"]}
    assert result["gap"] < 1e-5


def test_the_model_folder_loads_everywhere_and_scores_what_the_result_says(run):
    from transformers import AutoModelForImageClassification

    folder, result = run
    ours = upop.from_pretrained(folder / "model")
    theirs = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(ours(pixel_values=x).logits, theirs(pixel_values=x).logits)
    from upop.measure import evaluate_model

    score, params, macs = evaluate_model(make_config({"model": str(folder / "model"), "data": "digits"}), "test")
    assert score.accuracy == pytest.approx(result["accuracy"]["retrain"]["test"])
    assert (params, macs) == (result["params"]["after"], result["macs"]["after"])


def test_the_pipeline_treats_images_as_training_did(run):
    from transformers import pipeline

    folder, _ = run
    picture = Image.new("RGB", (16, 16), (200, 10, 30))
    found = pipeline("image-classification", model=str(folder / "model"))(picture, top_k=10)
    pixels = (torch.tensor([200, 10, 30]) / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = upop.from_pretrained(folder / "model")(
            pixel_values=pixels.view(1, 3, 1, 1).expand(1, 3, 16, 16)
        ).logits
    scores = {entry["label"]: entry["score"] for entry in found}
    for label, probability in enumerate(logits.softmax(-1)[0].tolist()):
        assert scores[str(label)] == pytest.approx(probability, abs=1e-4)


def test_metrics_follow_every_stage_and_the_ratio_grows_to_its_target(run):
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "validation_accuracy" in line]
    assert [line["stage"] for line in ends] == ["dense"] * 3 + ["search"] + ["retrain"]
    ratios = [line["ratio"] for line in lines if line["stage"] == "search"]
    assert ratios == sorted(ratios)
    before = upop.analyze(upop.from_pretrained(folder / "dense"))
    assert ratios[-1] == pytest.approx(0.5 * before.params / before.prunable, abs=1e-6)


def test_the_same_seed_gives_the_same_model(run, tmp_path):
    folder, result = run
    again = prune(make_config({**QUICK, "out": str(tmp_path / "again")}))
    assert again["accuracy"] == result["accuracy"]
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (
        folder / "model/model.safetensors"
    ).read_bytes()


def test_every_stage_can_be_entered_alone(run, tmp_path):
    folder, first = run
    search = {**QUICK, "model": str(folder / "dense"), "stages": "search", "out": str(tmp_path / "search")}
    result = prune(make_config(search))
    assert list(result["accuracy"]) == ["dense", "search", "slim"]
    assert result["accuracy"]["dense"] == first["accuracy"]["dense"]
    retrain = {**QUICK, "model": str(tmp_path / "search/slim"), "stages": "retrain", "out": str(tmp_path / "retrain")}
    result = prune(make_config(retrain))
    assert list(result["accuracy"]) == ["dense", "retrain"]
    assert result["widths"]["before"] == result["widths"]["after"]


def test_a_slimmed_model_can_be_pruned_again(run, tmp_path):
    folder, first = run
    config = {**QUICK, "model": str(folder / "model"), "target": "params=0.3", "stages": "search,retrain"}
    result = prune(make_config({**config, "out": str(tmp_path / "again")}))
    assert result["params"]["before"] == first["params"]["after"]
    assert result["params"]["after"] / result["params"]["before"] == pytest.approx(0.7, abs=0.01)


def test_a_plan_writes_nothing_and_knows_the_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(make_config(QUICK))
    assert list(tmp_path.iterdir()) == []
    assert plan.params_after == plan.analysis.params // 2
    assert 0.4 < plan.macs_after / plan.macs_before < 0.6
    assert plan.steps == {"dense": 30, "search": 10, "retrain": 10}


def test_training_that_breaks_leaves_the_last_good_weights(tmp_path):
    folder = tmp_path / "broken"
    config = {**QUICK, "optimizer": "adamw", "lr": 1e-3, "lr_search": 1e30, "out": str(folder), "precision": "fp32"}
    with pytest.raises(upop.UpopError, match=r"search: .* at step \d+.*last good weights are in .*last-good"):
        prune(make_config(config))
    assert not (folder / "result.json").exists()
    for name in ("dense", "last-good"):
        assert all(p.isfinite().all() for p in upop.from_pretrained(folder / name).parameters())


def test_a_model_at_chance_is_a_warning_in_the_result(tmp_path):
    config = {**QUICK, "lr": 1e-9, "stages": "dense", "epochs_dense": 1, "out": str(tmp_path / "chance")}
    result = prune(make_config(config))
    assert any("dense: validation accuracy" in line and "at chance" in line for line in result["warnings"])


def test_a_tracker_gets_the_same_numbers(tmp_path):
    config = {
        **QUICK,
        "stages": "dense",
        "epochs_dense": 1,
        "tracker": "tensorboard",
        "out": str(tmp_path / "tracked"),
    }
    prune(make_config(config))
    assert list((tmp_path / "tracked").rglob("events.out.tfevents*"))


def test_distillation_accumulation_and_every_augmentation_run(tmp_path):
    options = {"distill": 0.5, "accumulate": 3, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.2, "color": 0.3}
    config = {**QUICK, **options, "epochs_dense": 1, "epochs_search": 1, "epochs_retrain": 1}
    result = prune(make_config({**config, "out": str(tmp_path / "all")}))
    assert result["accuracy"]["search"] == {"validation": result["accuracy"]["slim"]["validation"]}
