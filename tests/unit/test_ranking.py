"""Promises of upop.ranking: the same choice as an obvious loop, deterministic, floors kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upop.ranking import normalise, select
from upop.structures import Structure, removable_cost, removed_cost


def structure(kind, layer, units, cost, floor=1):
    return Structure(kind, layer, units, cost, producers=(), consumers=(), floor=floor)


@st.composite
def problems(draw):
    """(structures, scores, budget): integer scores in a small range, hence many ties."""
    structures = []
    for layer in range(draw(st.integers(1, 3))):
        for kind in ("attn", "mlp"):
            units = draw(st.integers(1, 7))
            floor = draw(st.integers(1, units))
            structures.append(structure(kind, layer, units, draw(st.integers(1, 30)), floor))
    spread = draw(st.sampled_from([0, 2, 1000]))
    score = st.integers(-spread, spread)
    scores = {s.name: torch.tensor([float(draw(score)) for _ in range(s.units)]) for s in structures}
    most = removable_cost(structures)
    budget = draw(st.one_of(st.just(0), st.just(most), st.integers(0, 2 * most).map(lambda x: x / 2)))
    return structures, scores, budget


@given(problem=problems())
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_select_equals_a_slow_loop(slow_select, problem):
    structures, scores, budget = problem
    keep = select(structures, scores, budget)
    assert {name: k.tolist() for name, k in keep.items()} == slow_select(structures, scores, budget)


def test_select_equals_a_slow_loop_at_the_size_of_a_model(slow_select):
    structures = [structure(k, i, n, c) for i in range(12) for k, n, c in (("attn", 64, 2313), ("mlp", 96, 385))]
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.randn(s.units, generator=generator) for s in structures}
    for ratio in (0.1, 0.5, 0.9):
        budget = ratio * removable_cost(structures)
        keep = select(structures, scores, budget)
        assert {name: k.tolist() for name, k in keep.items()} == slow_select(structures, scores, budget)


STRUCTURES = [structure("attn", 0, 4, 10), structure("mlp", 0, 6, 3), structure("attn", 1, 4, 10)]


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.units, generator=generator) for s in STRUCTURES}


def test_budget_zero_removes_nothing():
    assert all(bool(k.all()) for k in select(STRUCTURES, random_scores(), 0).values())


def test_the_whole_removable_budget_leaves_exactly_the_floors():
    keep = select(STRUCTURES, random_scores(), removable_cost(STRUCTURES))
    assert [int(keep[s.name].sum()) for s in STRUCTURES] == [s.floor for s in STRUCTURES]


def test_the_floor_is_the_unit_of_lowest_score():
    scores = random_scores()
    keep = select(STRUCTURES, scores, removable_cost(STRUCTURES))
    assert all(int(keep[s.name].long().argmax()) == int(scores[s.name].argmin()) for s in STRUCTURES)


def test_the_budget_is_reached_and_never_by_more_than_the_last_unit():
    for budget in range(1, removable_cost(STRUCTURES) + 1):
        removed = removed_cost(STRUCTURES, select(STRUCTURES, random_scores(budget), budget))
        assert budget <= removed < budget + max(s.cost for s in STRUCTURES)


def test_a_budget_off_by_float_rounding_takes_no_unit_more():
    # 0.1 + 0.2 > 0.3: three units of cost 10 answer a budget of 30.000000000000004.
    keep = select([structure("attn", 0, 9, 10)], {"attn.0": torch.arange(9.0)}, 100 * (0.1 + 0.2))
    assert int((~keep["attn.0"]).sum()) == 3


def test_the_largest_scores_are_pruned():
    keep = select([structure("mlp", 0, 4, 1)], {"mlp.0": torch.tensor([0.1, 9.0, -9.0, 3.0])}, 2)
    assert keep["mlp.0"].tolist() == [True, False, True, False]


def test_ties_fall_in_the_order_of_structures_and_of_units():
    keep = select(STRUCTURES, {s.name: torch.zeros(s.units) for s in STRUCTURES}, 33)
    assert keep["attn.0"].tolist() == [False, False, False, True]
    assert keep["mlp.0"].tolist() == [False, True, True, True, True, True]
    assert keep["attn.1"].all()


def test_nan_scores_are_never_ranked():
    with pytest.raises(AssertionError):
        select([structure("mlp", 0, 2, 1)], {"mlp.0": torch.tensor([0.0, float("nan")])}, 1)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e6])
def test_zscore_pools_all_layers_of_a_kind(scale):
    scores = {name: scale * (value + 3) for name, value in random_scores().items()}
    found = normalise(STRUCTURES, scores)
    for kind in ("attn", "mlp"):
        names = [s.name for s in STRUCTURES if s.kind == kind]
        pooled = np.concatenate([scores[n].double().numpy() for n in names])
        expected = (pooled - pooled.mean()) / pooled.std()
        np.testing.assert_allclose(np.concatenate([found[n].numpy() for n in names]), expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-9, 0.1])
def test_zscores_of_equal_scores_are_zero(value):
    scores = {s.name: torch.full((s.units,), value) for s in STRUCTURES}
    assert all(bool((z == 0).all()) for z in normalise(STRUCTURES, scores).values())


def test_zscores_are_float64_whatever_comes_in():
    scores = {name: value.bfloat16() for name, value in random_scores().items()}
    assert {z.dtype for z in normalise(STRUCTURES, scores).values()} == {torch.float64}


def test_scores_are_left_as_they_were():
    scores = random_scores()
    normalise(STRUCTURES, scores)
    select(STRUCTURES, scores, 20)
    assert all(torch.equal(scores[name], value) for name, value in random_scores().items())
