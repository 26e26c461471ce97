"""The whole command, end to end, on a model small enough for a minute, and everything that it promises to leave."""

import json

import pytest
import torch
from PIL import Image

import upop
from upop.config import make_config
from upop.folder import weights_hash
from upop.plan import make_plan
from upop.run import prune

QUICK = {
    "model": "deit-digits-2layers",
    "data": "digits",
    "epochs_dense": 4,
    "epochs_search": 1,
    "epochs_retrain": 1,
    "batch_size": 32,
    "subset": 160,
    "flip": False,
    "latency_seconds": 0.02,
}


# A module's fixture that comes first: only the run that all look at draws its pictures.
@pytest.fixture(scope="module", autouse=True)
def _others_are_quick(run, only_results): ...


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
    assert {kind: len(widths) for kind, widths in result["widths"]["after"].items()} == {"attn": 2, "mlp": 2}
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

    config = {"model": str(folder / "model"), "data": "digits", "subset": QUICK["subset"]}
    score, params, macs, _ = evaluate_model(make_config(config), "test")
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
    assert [line["stage"] for line in ends] == ["dense"] * 4 + ["search"] + ["retrain"]
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


def test_later_stages_alone_are_what_they_are_in_one_run(run, make_model, tmp_path):
    folder, first = run
    options = ("optimizer", "lr_search", "lr_retrain")
    whole = [first["config"][name] for name in options]
    assert whole == ["muon", 2.5e-3, 5e-3]

    def planned(model, **more):
        values = {**QUICK, "model": str(model), "stages": "search,retrain", "out": str(tmp_path / "out"), **more}
        config = make_plan(make_config(values)).config
        return [getattr(config, name) for name in options]

    for model in ("dense", "slim", "model"):
        assert planned(folder / model) == whole
    assert planned(folder / "dense", optimizer="adamw")[0] == "adamw"
    # Fine-tuning, and weights of elsewhere, are treated gently.
    assert planned(folder / "dense", stages="dense,search,retrain") == ["adamw", 2.5e-5, 5e-5]
    upop.save_pretrained(make_model("vit", image=16, patch=4), tmp_path / "elsewhere")
    assert planned(tmp_path / "elsewhere") == ["adamw", 2.5e-5, 5e-5]


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
    assert plan.steps == {"dense": 20, "search": 5, "retrain": 5}


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


def test_distillation_accumulation_and_every_augmentation_run(tmp_path):
    options = {"distill": 0.5, "accumulate": 3, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.2, "color": 0.3}
    config = {**QUICK, **options, "epochs_dense": 1}
    result = prune(make_config({**config, "out": str(tmp_path / "all")}))
    assert result["accuracy"]["search"] == {"validation": result["accuracy"]["slim"]["validation"]}


def test_augmentation_and_averaged_weights_reach_the_stages_that_they_are_for(run, tmp_path):
    start = {"model": str(run[0] / "dense"), "stages": "search,retrain"}
    options = {"plain": {}, "mean": {"ema": 0.9}, "changed": {"randaugment": 1}}
    found = {
        n: prune(make_config({**QUICK, **start, **more, "out": str(tmp_path / n)})) for n, more in options.items()
    }
    weights = {n: {part: weights_hash(tmp_path / n / part) for part in ("slim", "model")} for n in options}
    # A search goes by its own weights, and the average of a retraining is not where it ends.
    assert weights["mean"]["slim"] == weights["plain"]["slim"] != weights["changed"]["slim"]
    assert weights["mean"]["model"] != weights["plain"]["model"]
    log = (tmp_path / "mean/metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, log) if "validation_accuracy" in line][-1]
    assert abs(last["validation_accuracy"] - found["mean"]["accuracy"]["retrain"]["validation"]) < 0.02


# ---------------------------------------------------------------- targets, units and one-shot


def outcome(run, tmp_path, **options):
    """A run on the dense model of `run`, and its folder."""
    values = {**QUICK, "model": str(run[0] / "dense"), "stages": "search", **options}
    out = tmp_path / "again"
    return out, prune(make_config({**values, "out": str(out)}), overwrite=True)


def test_one_shot_needs_no_training_and_can_be_grown_from(run, tmp_path):
    out, result = outcome(run, tmp_path, epochs_search=0, target="macs=0.3")
    assert result["macs"]["after"] / result["macs"]["before"] == pytest.approx(0.7, abs=0.01)
    assert list(result["accuracy"]) == ["dense", "slim"]
    assert result["config"]["compensate"] == "least-squares"
    assert not (out / "metrics.jsonl").exists(), "no optimizer step was taken"
    small = tmp_path / "smaller"
    grown = prune(make_config({**QUICK, "model": str(out / "model"), "stages": "search,retrain", "out": str(small)}))
    assert grown["params"]["after"] == pytest.approx(0.5 * result["params"]["after"], rel=0.02)


@pytest.mark.parametrize(("unit", "target", "left"), [("params", "params=150k", 150e3), ("macs", "macs=2M", 2e6)])
def test_a_target_may_be_what_is_left(run, tmp_path, unit, target, left):
    _, result = outcome(run, tmp_path, target=target)
    assert result[unit]["after"] == pytest.approx(left, abs=0.01 * result[unit]["before"])
    assert result["ratio"]["target"] == target.partition("=")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.01, "shrink": "once"}, "needs a progressive search"),
        ({"method": "mask", "shrink": "progressive"}, "a method that trains its masks cuts once"),
        ({"method": "progressive", "target": "params=0.95"}, "cannot be met with the same ratio in every kind"),
    ],
)
def test_goals_that_contradict_each_other_are_refused_before_anything_is_trained(tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(upop.UpopError, match=message):
        prune(make_config({**QUICK, **options, "out": str(out)}))
    assert not out.exists()


def test_the_control_of_a_target_in_latency_needs_no_table(run, tmp_path):
    _, result = outcome(run, tmp_path, method="dense-continued", target="latency=0.3", epochs_search=0.2)
    assert result["params"]["before"] == result["params"]["after"]


def test_compensation_brings_a_one_shot_cut_nearer_to_the_dense_model(run, tmp_path, images):
    x = images(64, size=16)
    distance = {}
    for how in ("none", "mean", "least-squares"):
        options = {"epochs_search": 0, "target": "params=0.5", "compensate": how, "method": "random"}
        folder, _ = outcome(run, tmp_path, **options)
        models = [upop.from_pretrained(path) for path in (run[0] / "dense", folder / "model")]
        with torch.no_grad():
            dense, small = (model(pixel_values=x).logits for model in models)
        distance[how] = float((dense - small).square().mean())
    assert distance["least-squares"] < distance["none"]
    assert distance["mean"] != distance["none"]


def test_units_of_every_kind_and_aligned_widths_come_out_of_a_run(run, tmp_path):
    options = {"structures": "head,qk,v,mlp,block", "align": "mlp=16,v=4", "target": "params=0.6"}
    out, result = outcome(run, tmp_path, **options)
    assert result["params"]["after"] / result["params"]["before"] == pytest.approx(0.4, abs=0.011)
    after = result["widths"]["after"]
    assert set(after) == {"head", "qk", "v", "mlp", "block"}
    assert all(width % 16 == 0 for width in after["mlp"])
    assert all(width % 4 == 0 for width in after["v"])
    assert result["gap"] < 1e-5
    assert upop.from_pretrained(out / "model").config.num_hidden_layers == sum(after["block"])


@pytest.fixture
def machine(monkeypatch):
    """A clock that shows the number of parameters: what a real one shows of so small a model is mostly noise."""
    from upop import timing
    from upop.profiling import Times, count_params

    monkeypatch.setattr(timing, "make_runner", lambda model, images, **options: model)
    monkeypatch.setattr(
        timing,
        "time_in_turns",
        lambda passes, **options: {name: Times((count_params(m) / 1e3,) * 3) for name, m in passes.items()},
    )


def test_a_target_in_latency_says_what_became_of_it(run, tmp_path, machine):
    options = {"target": "latency=0.3", "latency_batch": 4, "latency_dtype": "bfloat16", "epochs_search": 0.5}
    _, result = outcome(run, tmp_path, **options)
    found = result["latency_target"]
    assert found["wanted"] == pytest.approx(0.7)
    assert found["table"]["batch"] == 4
    assert found["table"]["dtype"] == "bfloat16"
    assert found["before_ms"] > 0
    assert found["after_ms"] > 0
    assert result["ratio"]["latency"] == pytest.approx(0.3, abs=0.03), "by the table"
    assert result["params"]["after"] / result["params"]["before"] == pytest.approx(0.7, abs=0.03), "by that clock"
    assert result["align"] == {}, "auto aligns head dims for bfloat16, but not where one multiple is over 0.5 %"


def test_a_latency_table_is_measured_once_and_kept_over_a_stop(run, tmp_path, machine, monkeypatch):
    from upop import plan as planning
    from upop.run import resume

    class Stops:
        def stage(self, name, about):
            if name == "evaluate":
                raise MemoryError("gone")

        def progress(self, progress): ...
        def epoch(self, number, accuracy): ...

    out = tmp_path / "stopped"
    values = {**QUICK, "model": str(run[0] / "dense"), "stages": "search", "out": str(out)}
    with pytest.raises(MemoryError):
        prune(make_config({**values, "target": "latency=0.3"}), observer=Stops())
    monkeypatch.setattr(planning, "measure_latency_table", lambda *a, **k: pytest.fail("measured again"))
    assert resume(out)["latency_target"]["wanted"] == pytest.approx(0.7)
