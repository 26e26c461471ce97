"""Ignored layers keep all of their units, whatever is asked for and however it goes; the others meet the target."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from upop import Search, Target, analyze
from upop.config import ConfigError, make_config
from upop.costs import unit_cost
from upop.cutting import one_shot
from upop.errors import TargetError, UpopError
from upop.families import find_structures
from upop.kinds import refine
from upop.methods import parse_layers
from upop.plan import make_plan
from upop.profiling import count_params
from upop.structures import Structure, leave_whole, whole_layers

LAYERS = 4


def searched(model, images, target, **options):
    """A finished search of two steps."""
    search = Search(model, target=target, steps=2, **options)
    optimizer = torch.optim.SGD([*model.parameters(), *search.trained_masks()], lr=1e-3)
    for _ in range(2):
        (model(images()).logits.square().sum() + search.penalty()).backward()
        optimizer.step()
        search.step()
        optimizer.zero_grad()
    return search


def layers_that_lost(keep):
    return {int(name.split(".")[1]) for name, stays in keep.items() if not stays.all()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structures": "dims,mlp,head"},
        {"structures": "qk,v,mlp", "align": {"mlp": 24, "qk": 6}},  # no multiples of which all units are
        {"method": "progressive"},
        {"method": "mask"},
        {"method": "magnitude", "structures": "attn,mlp,block"},
    ],
    ids=str,
)
def test_a_search_takes_all_that_must_go_from_the_other_layers(make_model, images, logits_of, options):
    model = make_model(layers=LAYERS)
    search = searched(model, images, "params=0.3", ignored_layers=(0, -1), **options)
    assert layers_that_lost(search.keep()) == {1, 2}
    small = search.slim()
    assert count_params(small) == pytest.approx(0.7 * count_params(model), rel=0.02)
    assert all((search.masks.values[s.name] == 1).all() for s in search.structures if s.layer in (0, LAYERS - 1))
    if search.method.shrink == "progressive":
        torch.testing.assert_close(logits_of(small, images()), logits_of(model, images()), rtol=0, atol=1e-4)
    whole = [s for s in find_structures(small) if s.layer in (0, len({s.block for s in find_structures(small)}) - 1)]
    assert {s.width for s in whole if s.kind == "mlp"} == {256}


@pytest.mark.parametrize("order", ["paper", "authors"])
def test_what_others_lose_does_not_depend_on_scores_of_the_ignored_ones(make_model, order):
    found = []
    for scale in (1.0, 1e3):
        options = {"ignored_layers": (0,), "gradient_order": order}
        search = Search(make_model(layers=LAYERS), target="prunable=0.4", steps=2, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            terms = []
            for s in search.structures:
                gradient = torch.randn(s.units, generator=generator) * (scale if s.name == "attn.0" else 1.0)
                terms.append((search.masks.values[s.name] * gradient).sum())
            sum(terms).backward()
            search.step()
        found.append(search.keep())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_whole_blocks_may_all_go_but_for_the_ignored_ones(make_model, images):
    model = make_model(layers=LAYERS)
    options = {"structures": "block,mlp", "ignored_layers": "1"}
    most = analyze(model, ("block", "mlp"), ignored_layers="1").removable
    search = searched(model, images, f"params={most / count_params(model):.6f}", **options)
    assert [bool(search.keep()[f"block.{n}"].item()) for n in range(LAYERS)] == [False, True, False, False]


@pytest.mark.parametrize("options", [{}, {"method": "magnitude"}, {"align": "mlp=24"}], ids=str)
def test_a_one_shot_ranking_and_the_plan_leave_them_alone(tmp_path, options):
    values = {"model": "deit-digits-3layers", "data": "digits", "batch_size": 32, "rank_batches": 1, "rank_rounds": 2}
    values |= {"stages": "search", "subset": 64, "target": "params=0.25", "ignored_layers": "0-1", **options}
    plan = make_plan(make_config(values))
    keep, small = one_shot(plan, Accelerator(cpu=True), plan.loaded.model)
    assert layers_that_lost(keep) == {2}
    assert count_params(small) == pytest.approx(0.75 * plan.analysis.params, rel=0.02)


def test_the_range_that_is_said_is_that_of_the_others(make_model):
    model = make_model(layers=LAYERS)
    found = analyze(model, ignored_layers="0,-1")
    assert found.removable == sum((s.units - 1) * s.cost for s in find_structures(model) if s.layer in (1, 2))
    assert "layers that stay whole: 0, 3" in str(found)
    assert [row.layers for row in found.rows()] == [2, 2]
    with pytest.raises(TargetError, match=r"keeps at least one unit of each kind, and those ignored \(0, 3\) all of"):
        Search(model, target="params=0.9", steps=1, ignored_layers=(0, 3))
    with pytest.raises(TargetError, match=r"those ignored \(0, 3\) all of"):
        Search(model, target="params=0.9", steps=1, ignored_layers=(0, 3), method="progressive")


def test_how_large_units_of_the_ignored_layers_are_does_not_matter():
    def layer(number, units, cost):
        return Structure("mlp", number, units, cost, producers=(), consumers=())

    coarse, fine = layer(0, 2, 1000), layer(1, 100, 10)
    with pytest.raises(TargetError, match="one unit of mlp alone is 1,000 parameters"):
        Target(prunable=0.1).budget(unit_cost((coarse, fine)))
    assert Target(prunable=0.1).budget(unit_cost(leave_whole((coarse, fine), (0,)))) == pytest.approx(300)


def test_a_state_of_a_search_with_others_is_refused(make_model):
    state = Search(make_model(layers=LAYERS), target="params=0.3", steps=2, ignored_layers=(1,)).state_dict()
    other = Search(make_model(layers=LAYERS), target="params=0.3", steps=2)
    with pytest.raises(UpopError, match=r"saved with ignored_layers=\[1\], this search has \[\]"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", ()), ("0", (0,)), ("0,11", (0, 11)), (" 0-2 , -1 ", (0, 1, 2, -1)), ("-1", (-1,)), ("3,3", (3,))],
)
def test_layers_are_read_as_typed(text, layers):
    assert parse_layers(text) == layers
    config = make_config({"model": "m", "data": "d", "ignored_layers": text})
    assert parse_layers(config.ignored_layers) == layers


@pytest.mark.parametrize("text", ["a", "0,", "3-1", "-3--1", "1.5", "0 1", "0-999999999"])
def test_mistyped_layers_are_refused(text):
    with pytest.raises(ConfigError, match="ignored_layers: expected layers such as 0,11 or 0-2,-1, got "):
        make_config({"model": "m", "data": "d", "ignored_layers": text})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4,), "expected layers from 0 to 3, or -1 to -4 from the end, got 4"),
        ((-5,), "expected layers from 0 to 3, or -1 to -4 from the end, got -5"),
        (("0",), r"got \('0',\)"),
        (0, r"expected layers such as \(0, -1\) or '0,-1', got 0"),  # which is no nothing
        ("0-3", "expected a layer that may be pruned, got all of them"),
    ],
)
def test_layers_that_there_are_not_are_refused_before_the_model_is_touched(make_model, layers, message):
    model = make_model(layers=LAYERS)
    with pytest.raises(UpopError, match=message):
        Search(model, target="params=0.1", steps=1, ignored_layers=layers)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "layers", [range(2), np.array([0, 1]), (n for n in (0, 1)), {0, 1}], ids=lambda v: type(v).__name__
)
def test_layers_may_come_in_whatever_holds_whole_numbers(make_model, layers):
    assert whole_layers(find_structures(make_model(layers=LAYERS), None, layers)) == [0, 1]


def test_a_layer_goes_by_its_own_number_where_its_family_leaves_others_out(make_model):
    model = make_model(layers=LAYERS)
    described = [s for s in find_structures(model) if s.layer != 0]
    structures = refine(model, described, "attn,mlp,block")
    assert [s.layer for s in structures if s.kind == "block"] == [1, 2, 3]
    assert whole_layers(leave_whole(structures, (1, -1))) == [1, 3]
    with pytest.raises(UpopError, match="from 1 to 3, or -1 to -3 from the end, got 0; there are 1, 2, 3"):
        leave_whole(structures, (0,))


def test_gradients_of_masks_that_are_not_trained_do_not_pile_up(make_model, images):
    search = searched(make_model(layers=LAYERS), images, "params=0.3", method="unified", ignored_layers=(0,))
    assert set(search.masks.unreached()) == {s.name for s in search.structures}  # as a callback asks after a step
