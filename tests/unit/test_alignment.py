"""Widths that hardware likes, chosen by upop itself: never at the price of what was asked for."""

import pytest
import torch

import upop
from upop.config import make_config
from upop.errors import UpopError
from upop.plan import make_plan

# On a GPU; where the options allow it, the multiples are 8 head dims and 64 neurons.
TINY = {"model": "deit-tiny-cifar", "data": "digits", "subset": 128, "stages": "search"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("upop.plan.device_type", lambda _: "cuda")


@pytest.mark.parametrize(
    ("options", "align"),
    [
        ({"target": "params=0.5"}, {"attn": 8, "mlp": 64}),
        ({"target": "params=0.9"}, {"attn": 4, "mlp": 32}),
        ({"target": "macs=0.97"}, {"attn": 2, "mlp": 16}),
        ({"target": "params=0.5", "align": "none"}, {}),
        ({"target": "open", "binarise": "threshold", "threshold": 0.0}, {}),
        ({"target": "open", "max_drop": 0.01, "epochs_search": 1}, {"attn": 8, "mlp": 64}),
    ],
)
def test_widths_are_aligned_as_far_as_the_target_can_still_be_met(gpu, options, align):
    assert make_plan(make_config(TINY | options)).align == align


def test_kinds_that_a_slimmed_model_no_longer_has_are_refused_by_name(make_model, tmp_path):
    dense = make_model("vit", labels=10)
    structures = upop.analyze(dense, ["qk", "v"]).structures
    keep = {s.name: torch.arange(s.units) % s.width < s.width // (2 if s.kind == "v" else 1) for s in structures}
    upop.save_pretrained(upop.slim(dense, keep), tmp_path)
    config = make_config(TINY | {"model": str(tmp_path), "target": "params=0.1", "align": "attn=2"})
    with pytest.raises(UpopError, match="align: expected kinds among structures = qk,v,mlp, got 'attn'"):
        make_plan(config)
