"""Crossing a search's choice and way of removing with a one-shot ranking's: each run has the one and not the other."""

import runpy
from pathlib import Path

import pytest
import torch

from upop.config import make_config
from upop.run import prune
from upop.trace import load_trace

pytestmark = pytest.mark.usefixtures("only_results")
ROOT = Path(__file__).parents[2]
QUICK = {
    "model": "deit-digits-2layers",
    "data": "digits",
    "target": "params=0.6",
    "batch_size": 32,
    "subset": 256,
    "flip": False,
    "latency_seconds": 0.02,
    "threads": 1,
}


def last_masks(folder):
    return torch.from_numpy(load_trace(folder / "trace.npz").masks[-1] == 255)


@pytest.fixture(scope="module")
def crossed():
    return runpy.run_path(str(ROOT / "benchmarks/crossed.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, only_results):
    """A dense model, and a search and a one-shot ranking that began with it."""
    folder = tmp_path_factory.mktemp("crossed")
    prune(make_config({**QUICK, "stages": "dense", "epochs_dense": 1, "out": str(folder / "dense")}))
    pruned = {**QUICK, "model": str(folder / "dense/model"), "stages": "search,retrain", "epochs_retrain": 1}
    prune(make_config({**pruned, "epochs_search": 1, "out": str(folder / "search")}))
    return folder


def test_at_once_cuts_what_the_search_chose_without_training_and_retrains_as_long_as_both(crossed, folder):
    result = crossed["at_once"](folder / "search", str(folder / "at-once"))
    searched = load_trace(folder / "search/trace.npz")
    kept = {kind: [] for kind in searched.kind_names}
    for kind, span in zip(searched.kinds, searched.spans, strict=True):
        kept[str(kind)].append(int((searched.masks[-1, span] == 255).sum()))
    assert result["widths"]["after"] == kept
    assert result["config"]["epochs_search"] == 0
    assert result["config"]["epochs_retrain"] == 2
    assert not (folder / "at-once/trace.npz").exists(), "nothing was shrunk"


def test_shrinking_ends_at_what_a_one_shot_ranking_chooses(crossed, folder):
    result = crossed["shrinking"](folder / "search", str(folder / "shrinking"))
    options = {"model": str(folder / "dense/model"), "stages": "search", "epochs_search": 0, "normalise": "zscore"}
    ranked = prune(make_config({**QUICK, **options, "out": str(folder / "ranked")}))
    assert result["widths"]["after"] == ranked["widths"]["after"]
    assert not torch.equal(last_masks(folder / "shrinking"), last_masks(folder / "search"))
    masks = load_trace(folder / "shrinking/trace.npz").masks
    assert ((masks > 0) & (masks < 255)).any(axis=1).sum() > len(masks) / 2, "units shrink step by step"
