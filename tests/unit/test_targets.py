"""Promises of upop.targets: the user's units, as fractions or absolute, met or refused with what can be had."""

import pytest
import torch

import upop
from upop.costs import macs_cost, params_cost
from upop.errors import TargetError
from upop.families import find_structures
from upop.profiling import count_macs, count_params
from upop.ranking import select
from upop.targets import Target, amount


def slimmed(model, target, align=None):
    structures = find_structures(model)
    cost = macs_cost(model, structures) if target.currency == "macs" else params_cost(model, structures)
    scores = {s.name: torch.randn(s.units, generator=torch.Generator().manual_seed(1)) for s in structures}
    keep = select(structures, scores, target.budget(cost, align or {}), cost=cost, align=align or {})
    return upop.slim(model, keep)


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model(width=192, heads=3, layers=4, image=32, patch=4)


@pytest.mark.parametrize("removed", [0.1, 0.5, 0.85])
@pytest.mark.parametrize("align", [{}, {"attn": 8, "mlp": 32}])
def test_macs_and_params_are_met_within_one_percent_aligned_or_not(tiny, removed, align):
    for unit, count in (("macs", count_macs), ("params", count_params)):
        left = count(slimmed(tiny, Target(**{unit: removed}), align)) / count(tiny)
        assert left == pytest.approx(1 - removed, abs=0.01)


@pytest.mark.parametrize(
    ("text", "count", "left"), [("params=900K", count_params, 9e5), ("macs=0.05G", count_macs, 5e7)]
)
def test_absolute_targets_say_what_is_left(tiny, text, count, left):
    assert count(slimmed(tiny, Target.parse(text))) == pytest.approx(left, abs=0.01 * count(tiny))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("params=11M", 11e6),
        ("params= 0.5 b", 5e8),
        ("macs=2.3G", 2.3e9),
        ("latency=4ms", 4.0),
        ("latency=250us", 0.25),
        ("latency=0.5s", 500.0),
    ],
)
def test_what_is_left_is_read_with_its_suffix(text, left):
    assert Target.parse(text).left == pytest.approx(left)


@pytest.mark.parametrize("text", ["params=4ms", "latency=4G", "prunable=3M", "macs=G", "latency=-4ms", "params=1e"])
def test_suffixes_of_other_units_are_refused_with_an_example(text):
    with pytest.raises(TargetError, match=r"expected .* left .* such as"):
        Target.parse(text)


def test_more_than_there_is_cannot_be_left(tiny):
    with pytest.raises(TargetError, match=r"params=11M: cannot be met: the model has 1,[0-9,]+ parameters as it is"):
        slimmed(tiny, Target(params="11M"))


def test_a_target_beyond_the_floors_says_what_is_reachable_and_it_is(tiny):
    with pytest.raises(TargetError, match=r"reachable here is macs=0 to macs=(0\.\d+) \(.*MACs left") as error:
        slimmed(tiny, Target(macs=0.9999))
    most = float(str(error.value).split("to macs=")[1].split()[0])
    assert 1 - count_macs(slimmed(tiny, Target(macs=most))) / count_macs(tiny) >= most


def test_alignment_raises_the_floors_and_the_message_says_so(tiny):
    with pytest.raises(TargetError, match=r"keeps at least one aligned width"):
        slimmed(tiny, Target(params=0.95), {"attn": 32, "mlp": 256})


def test_steps_too_coarse_for_one_percent_are_refused(tiny):
    with pytest.raises(
        TargetError, match=r"cannot be met within 1%: a step of \d+ units of \w+ alone is .*; align less"
    ):
        slimmed(tiny, Target(params=0.5), {"attn": 32, "mlp": 256})


def test_amounts_are_for_people():
    assert amount(5_717_416, "params") == "5,717,416 parameters"
    assert amount(1_258_000_000, "macs") == "1.258 GMACs"
    assert amount(12.345, "latency") == "12.3 ms"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mask", "align": {"attn": 32}},
        {"method": "progressive", "structures": ["head", "mlp"]},
        {"structures": ["mlp", "block"]},
        {"structures": ["head", "mlp", "block"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("removed", [0.1, 0.5, 0.6, 0.85, 0.9])
def test_what_is_not_refused_is_met_within_one_percent(make_model, options, removed):
    model = make_model(width=192, heads=3, layers=6, seed=1)
    try:
        search = upop.Search(model, target=Target(params=removed), steps=1, **options)
    except TargetError:
        return
    generator = torch.Generator().manual_seed(1)
    for mask in search.masks.values.values():
        mask.grad = torch.randn(mask.shape, generator=generator)
        if search.trains_masks:
            mask.data = torch.rand(mask.shape, generator=generator)
    search.step()
    assert removed - 1e-6 <= search.cost.removed(search.keep()) / search.cost.dense <= removed + 0.01


def test_steps_of_all_kinds_add_up_where_each_gives_its_share(make_model):
    model = make_model(width=192, heads=3, layers=6)
    with pytest.raises(TargetError, match=r"within 1%: the same ratio in every kind, .* use a unified"):
        upop.Search(model, target=Target(params=0.5), steps=1, structures=["head", "mlp"], method="progressive")
    upop.Search(model, target=Target(params=0.5), steps=1, structures=["head", "mlp"])
