"""What is said of accuracies that guessing would reach."""

import copy
from types import SimpleNamespace

import pytest
import torch

from upop import measure
from upop.latency import LatencyTable
from upop.measure import chance_warnings

LABELS = torch.tensor([0, 1, 2] * 2)  # guessing: 0.333, and by luck up to 0.911
MANY = torch.tensor([0, 1, 2] * 1000)


def said(labels, **accuracy):
    return chance_warnings({stage: {"validation": value} for stage, value in accuracy.items()}, labels)


def test_nothing_where_models_know_something():
    assert said(MANY, dense=0.9, slim=0.5, retrain=0.8) == []


def test_a_dense_model_that_knows_nothing_is_the_only_news():
    (line,) = said(MANY, dense=0.34, slim=0.33, retrain=0.35)
    assert line == (
        "dense: validation accuracy 0.340 is at chance (0.333); the dense model is not trained, or not for these "
        "classes in this order"
    )


def test_a_model_that_was_better_before_has_collapsed():
    (line,) = said(MANY, dense=0.9, slim=0.35, retrain=0.8)
    assert line.startswith("slim: validation accuracy 0.350 is at chance (0.333); the model has collapsed")


def test_too_few_images_are_no_collapse():
    (line,) = said(LABELS, dense=1.0, retrain=0.667)
    assert (
        line == "retrain: validation accuracy 0.667 cannot be told from guessing (0.333) with 6 images; hold out more"
    )


def test_a_perfect_model_is_never_called_untrained_and_hides_no_collapse():
    most = torch.tensor([0] * 45 + [1] * 5)  # guessing: 0.9, and by luck up to 1.03
    lines = said(most, dense=1.0, slim=0.9)
    assert lines == [
        "dense: validation accuracy 1.000 cannot be told from guessing (0.900) with 50 images; hold out more",
        "slim: validation accuracy 0.900 is at chance (0.900); the model has collapsed: remove less, or retrain for "
        "longer",
    ]


@pytest.mark.parametrize("what", ["latency", "promise"])
def test_times_are_those_of_the_models_as_they_load_whatever_kernel_they_were_trained_with(
    make_model, tmp_path, monkeypatch, what
):
    dense = make_model()
    dense.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path).config._attn_implementation
    dense.set_attn_implementation("eager")
    timed = []

    def spy(models):
        timed.extend(model.config._attn_implementation for model in models)

    monkeypatch.setattr(measure, "compare_latency", lambda pair, **_: spy(pair.values()) or {})
    monkeypatch.setattr(measure, "make_runner", lambda model, *_, **__: spy([model]) or (lambda: None))
    size = dense.config.image_size
    table = LatencyTable(dense_ms=1.0, points={}, widths={}, image_size=size)
    plan = SimpleNamespace(
        loaded=SimpleNamespace(image_size=size), config=SimpleNamespace(latency_seconds=0.01), latency=table, left=0.5
    )
    if what == "latency":
        measure.measure_latency(plan, torch.device("cpu"), dense, copy.deepcopy(dense))
    else:
        measure.measure_promise(plan, dense, copy.deepcopy(dense))
    assert loaded == "sdpa"
    assert set(timed) == {loaded}
    assert dense.config._attn_implementation == "eager"
