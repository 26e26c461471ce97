"""What is said of accuracies that guessing would reach."""

import copy
from types import SimpleNamespace

import pytest
import torch

from upop import measure
from upop.latency import LatencyTable
from upop.measure import chance_warnings
from upop.profiling import Times
from upop.targets import Target

LABELS = torch.tensor([0, 1, 2] * 2)  # guessing: 0.333, and by luck up to 0.911
MANY = torch.tensor([0, 1, 2] * 1000)
CONFIG = {"latency_seconds": 0.01, "max_drop": None, "tolerance": None}


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
        loaded=SimpleNamespace(image_size=size),
        config=SimpleNamespace(**CONFIG),
        latency=table,
        left=0.5,
        target=Target(latency=0.5),
    )
    if what == "latency":
        measure.measure_latency(plan, torch.device("cpu"), dense, copy.deepcopy(dense), [])
    else:
        measure.measure_promise(plan, dense, copy.deepcopy(dense), None)
    assert loaded == "sdpa"
    assert set(timed) == {loaded}
    assert dense.config._attn_implementation == "eager"


@pytest.fixture
def promised(make_model, monkeypatch):
    """What is said of a model of 8 ms by the table, of 10, that takes other times: a function of those and more."""

    def promise(before, after, ratio=None, target=0.2, **config):
        times = {"before": Times((before,) * 2), "after": Times((after,) * 2)}
        monkeypatch.setattr(measure, "time_in_turns", lambda passes, **_: times)
        table = LatencyTable(dense_ms=10.0, points={}, widths={}, image_size=32)
        options = SimpleNamespace(**{**CONFIG, **config})
        plan = SimpleNamespace(config=options, latency=table, left=8.0, target=Target(latency=target))
        return measure.measure_promise(plan, make_model(), make_model(), ratio)

    return promise


@pytest.mark.parametrize("rule", [{"max_drop": 0.01}, {"tolerance": 0.01}], ids=str)
def test_where_accuracy_decides_the_target_in_time_is_a_limit_and_not_missed_above_it(promised, rule):
    found = promised(10.0, 9.5, {"latency": 0.05}, **rule)
    assert (found["wanted"], found["warnings"]) == (0.95, [])
    assert "0.980 of the dense model's time, not 0.800" in promised(10.0, 9.8)["warnings"][0]


def test_milliseconds_that_were_asked_for_are_judged_as_such(promised):
    assert promised(30.0, 24.0, target=0.2)["warnings"] == []
    [warning] = promised(30.0, 24.0, target="8ms")["warnings"]
    assert warning.startswith("latency: 24 ms, not the 8 ms asked for: the dense model takes 30 ms, and took 10 ms")
    assert promised(10.0, 8.2, target="8ms")["warnings"] == []
    assert promised(10.0, 7.0, {"latency": 0.3}, target="8ms", max_drop=0.01)["warnings"] == [], "a limit"


def test_a_batch_that_memory_is_short_for_is_left_out(make_model, monkeypatch):
    compare = measure.compare_latency

    def short(pair, *, batch, **options):
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compare(pair, batch=batch, **options)

    monkeypatch.setattr(measure, "compare_latency", short)
    plan = SimpleNamespace(loaded=SimpleNamespace(image_size=32), config=SimpleNamespace(**CONFIG))
    warnings = []
    found = measure.measure_latency(plan, torch.device("cpu"), make_model(), make_model(), warnings)
    assert list(found) == ["1"]
    assert warnings == ["latency, batch 64: out of memory; not measured, all else is there"]


def test_the_gap_is_looked_at_in_parts_that_fit_into_memory(monkeypatch):
    class Model:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, pixel_values):
            if len(pixel_values) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return SimpleNamespace(logits=self.factor * pixel_values)

    score = measure.Score(0.5, 1.0, 7)
    monkeypatch.setattr(measure, "evaluate", lambda models, *_, **__: {"search": score})
    monkeypatch.setattr(measure, "plain_batches", lambda *_: [(torch.arange(7.0), None)])
    plan = SimpleNamespace(data=SimpleNamespace(validation=None))
    assert measure.measure_masked(plan, None, Model(1.0), Model(1.5))["gap"] == 3.0
