"""A pruned model's shape with random weights: what it takes over from a run, and what it does not."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import upop
from upop.errors import ModelError
from upop.families import find_structures
from upop.models import load_model
from upop.structures import widths

ROOT = Path(__file__).parents[2]
NAME = "deit-digits-2layers"


@pytest.fixture
def same_shape():
    return runpy.run_path(str(ROOT / "benchmarks/same_shape.py"))["same_shape"]


@pytest.fixture
def result(tmp_path):
    """Widths, parameters and classes as a run says them."""
    model = load_model(NAME).model
    model.classifier = torch.nn.Linear(96, 3)
    keep = {s.name: torch.arange(s.units) >= s.units // (2 + s.layer) for s in upop.analyze(model).structures}
    small = upop.slim(model, keep)
    found = {
        "widths": {"after": widths(find_structures(small))},
        "params": {"after": sum(p.numel() for p in small.parameters())},
        "data": {"classes": ["a", "b", "c"]},
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(found))
    return path, found


def test_widths_head_and_processor_are_the_runs_and_weights_are_the_seeds(same_shape, result, tmp_path):
    path, found = result
    models = []
    for name, seed in (("one", 0), ("again", 0), ("two", 1)):
        same_shape(path, NAME, tmp_path / name, seed=seed)
        loaded = load_model(str(tmp_path / name))
        assert (loaded.image_size, loaded.mean) == (16, (0.5, 0.5, 0.5))
        models.append(loaded.model)
    assert widths(find_structures(models[0])) == found["widths"]["after"]
    assert list(models[0].config.id2label.values()) == ["a", "b", "c"]
    one, again, two = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(one, again)
    # As a model of that size is drawn: every matrix has the spread of the dense one's.
    assert not torch.equal(one, two)
    dense = dict(load_model(NAME).model.named_parameters())
    for path, parameter in models[0].named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.detach().std() / dense[path].detach().std()) == pytest.approx(1, abs=0.15), path


def test_another_shape_than_the_runs_is_refused(same_shape, result, tmp_path):
    path, found = result
    with pytest.raises(ModelError, match="expected the shape whose layers the result has"):
        same_shape(path, "deit-digits", tmp_path / "out")
    with pytest.raises(
        ModelError, match=rf"expected {found['params']['after']:,} parameters as in .*result\.json, got"
    ):
        same_shape(path, "deit-digits-2layers-width144", tmp_path / "out")
    assert not (tmp_path / "out").exists()
