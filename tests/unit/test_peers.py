"""The comparison with Torch-Pruning: its models run, are as small as asked and compute as upop's do; the report."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import upop
from upop.families import find_structures
from upop.profiling import count_params

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"


def load(name):
    """A module of the benchmark, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# In the order of their imports of each other.
pruners, report, runs, peers = (load(name) for name in ("peer_pruners", "peer_report", "peer_runs", "peers"))
needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning, of the extra `peers`, is not installed"
)


@pytest.fixture
def dense(make_model, images):
    """A tiny ViT with gradients, for Taylor importance."""
    model = make_model(width=64, heads=2, layers=2)
    model(pixel_values=images(8)).logits.square().sum().backward()
    return model


@needs_torch_pruning
@pytest.mark.parametrize("name", pruners.SETTINGS)
def test_every_setting_meets_the_target_and_leaves_a_model_that_runs(name, dense, images, logits_of):
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    found = pruners.prune_to(dense, pruners.SETTINGS[name], target=0.6)
    assert abs(1 - count_params(found.model) / count_params(dense) - 0.6) <= 0.01
    assert found.meets(0.6)
    assert logits_of(found.model, images()).isfinite().all()
    widths, embeds = pruners.widths(found.model), pruners.SETTINGS[name].embedding
    assert (widths["embedding"] == [64]) != embeds
    # The softmax scale is the dense model's: 32 dims a head.
    assert {block.attention.scaling for block in found.model.vit.layers} == {32**-0.5}
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@needs_torch_pruning
def test_torch_pruning_removes_the_units_that_upop_would_and_computes_the_same(dense, images, logits_of):
    pruned = pruners.prune_to(dense, pruners.SETTINGS["taylor-isomorphic"], target=0.5).model
    keep = {}
    for s in find_structures(dense):
        path = f"vit.layers.{s.layer}." + ("attention.q_proj" if s.kind == "attn" else "mlp.fc1")
        rows = pruned.get_submodule(path).weight
        stays = (dense.get_submodule(path).weight[:, None] == rows[None]).all(-1).any(1)
        keep[s.name] = stays[: s.units]
    torch.testing.assert_close(logits_of(pruned, images()), logits_of(upop.slim(dense, keep), images()))


@needs_torch_pruning
def test_rounded_widths_are_multiples_at_high_ratios_too(dense):
    found = pruners.prune_to(dense, pruners.SETTINGS["taylor-round8"], target=0.75)
    assert found.skipped == 0
    assert {width % 8 for width in (*pruners.widths(found.model)["attn"], *pruners.widths(found.model)["mlp"])} == {0}


@needs_torch_pruning
def test_layers_that_torch_pruning_skips_are_counted_and_no_target_counts_as_met_by_them(dense):
    one_step = pruners.Setting("magnitude", "global")
    model, skipped = pruners.prune_once(dense, one_step, 0.999)
    assert skipped > 0
    removed = 1 - count_params(model) / count_params(dense)
    assert not pruners.Pruned(model, removed, 0.999, skipped, 1, 0.0).meets(removed)


def result(setting, seed, test, *, ratio=0.8, pruned=0.3, status="complete"):
    """What a run leaves, as far as the report reads it."""
    latency = {name: {"median_ms": ms} for name, ms in (("dense", 4.0), ("pruned", 2.0))}
    return {
        "spec": {"setting": setting, "ratio": ratio, "seed": seed, "data": "cifar10", "subset": None, "epochs": 1.0}
        | {"optimizer": "adamw", "batch_size": 128, "threads": 1},
        "status": status,
        "code": "c0de",
        "commit": "abc",
        "versions": {"torch": "2"},
        "hardware": {"device": "a CPU"},
        "removed": 0.8,
        "accuracy": {"pruned": {"validation": pruned}, "retrained": {"validation": test, "test": test}},
        "params": {"before": 1000, "after": 200},
        "macs": {"before": 10_000_000, "after": 2_000_000},
        "latency": {"1": latency, "64": latency},
        "memory": {"before_mib": 100.0, "peak_mib": 150.0},
        "cpu_seconds": {"pruning": 2.0, "training": 30.0},
    }


def write(folder, *results):
    for found in results:
        spec = found["spec"]
        (folder / f"{spec['setting']}_{spec['ratio']}_{spec['seed']}.json").write_text(json.dumps(found))


def test_the_report_of_two_runs_has_both_and_judges_nothing(tmp_path):
    write(tmp_path, result("upop", 0, 0.72), result("upop-one-shot", 0, 0.74), result("taylor", 0, 0.70))
    text = report.report(report.read(tmp_path))
    judged = ["+2.00 points (n = 1)", "not judged (n = 1)", "+4.00 points (n = 1)", "not judged (n = 1)"]
    assert f"| taylor | 1 | 80.00 | 30.00 | 70.00 | 70.00 | {' | '.join(judged)} |" in text
    assert "## Where upop-one-shot is not ahead" in text
    assert "| taylor | 0.000 | 2.000 | 2.00 | 2.00 |  | 2.0 | 32 | 50 |" in text


def test_the_report_says_in_words_where_upop_is_behind_and_where_nothing_can_be_told(tmp_path):
    for seed, (ours, behind, equal) in enumerate([(0.70, 0.73, 0.71), (0.71, 0.741, 0.70), (0.72, 0.749, 0.72)]):
        write(tmp_path, result("upop", seed, ours), result("taylor", seed, behind), result("magnitude", seed, equal))
    text = report.report(report.read(tmp_path))
    assert "upop is BEHIND taylor, 80 %: \N{MINUS SIGN}3.00 ± 0.10 points (n = 3, p < .001)" in text
    assert "upop cannot be told apart from magnitude, 80 %: +0.00 ± 1.00 points (n = 3, p = 1.000)" in text
    assert "ahead beyond the spread in 0 of 2 comparisons" in text


def test_targets_not_met_and_broken_files_do_not_count_as_runs(tmp_path):
    write(tmp_path, result("upop", 0, 0.7), result("taylor", 0, 0.7, status="unreachable"))
    (tmp_path / "taylor_half.json").write_text('{"spec": {')
    text = report.report(report.read(tmp_path))
    assert "| taylor | 0 | target not met, nearest 80.0 |" in text


def test_the_searchs_share_of_the_epochs_is_upops_alone():
    some, more = (runs.Options(dense="no-folder", data="cifar10", epochs=6, search_share=x) for x in (0.5, 1 / 6))
    search, peer = runs.Job("upop", 0.8, 0, 1e-3), runs.Job("taylor", 0.8, 0, 1e-3)
    assert runs.spec(search, some) != runs.spec(search, more)
    assert runs.spec(peer, some) == runs.spec(peer, more)
    config = runs._config(search, more, "out")
    assert (config.epochs_search, config.epochs_retrain) == (pytest.approx(1), pytest.approx(5))


def test_a_result_counts_as_done_for_its_own_settings_and_code_alone(tmp_path):
    options = runs.Options(dense="no-folder", data="cifar10")
    job, args = runs.Job("taylor", 0.8, 0, 1e-3), argparse.Namespace(out=tmp_path, any_code=False)
    assert peers._done(job, args, options) is None
    found = {"spec": runs.spec(job, options), "code": peers.code_version()}
    peers._write(tmp_path, job.label, found)
    assert peers._done(job, args, options) == found
    assert peers._done(runs.Job("taylor", 0.8, 0, 2e-3), args, options) is None
    peers._write(tmp_path, job.label, found | {"code": "older"})
    assert peers._done(job, args, options) is None
    assert peers._done(job, argparse.Namespace(out=tmp_path, any_code=True), options) is not None
    (tmp_path / f"{job.label}.json").write_text("{")
    assert peers._done(job, args, options) is None


def test_results_of_other_options_are_refused_not_overwritten(tmp_path):
    six, twenty = (runs.Options(dense="no-folder", data="cifar10", epochs=epochs) for epochs in (6.0, 20.0))
    job = runs.Job("taylor", 0.8, 0, 1e-3)
    peers._write(tmp_path, job.label, {"spec": runs.spec(job, six), "code": "older"})
    wanted = argparse.Namespace(out=tmp_path, settings=["taylor"], ratios=[0.8], seeds=[0])
    assert peers._others(wanted, six) is None, "another code, or rate, is no other comparison"
    message = peers._others(wanted, twenty)
    assert message == f"{tmp_path}/{job.label}.json: epochs 6.0 there, 20.0 wanted; choose another --out"
    once = runs.Job("upop-one-shot", 0.8, 0, 1e-3)
    effects_as_they_are = runs.spec(once, six) | {"how": {"rank_batches": 16, "rank_rounds": 4}}
    peers._write(tmp_path, once.label, {"spec": effects_as_they_are, "code": "older"})
    assert peers._others(wanted, six) is None, "a setting that is not asked for"
    wanted.settings = ["taylor", "upop-one-shot"]
    assert peers._others(wanted, six).startswith(f"{tmp_path}/{once.label}.json: how {{'rank_batches': 16, 'rank_r")
    wanted.settings = ["taylor"]
    wanted.seeds = [1]
    assert peers._others(wanted, twenty) is not None, "one folder is one comparison, whichever runs are asked for"
