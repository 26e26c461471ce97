"""Promises of upop.ranking: the same choice as an obvious loop, deterministic, floors kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upop.costs import unit_cost
from upop.errors import UpopError
from upop.ranking import NORMALISERS, check_alignment, normalise, removable, select
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


@pytest.mark.parametrize("how", NORMALISERS)
def test_normalised_scores_are_float64_whatever_comes_in(how):
    scores = {name: value.bfloat16() for name, value in random_scores().items()}
    assert {z.dtype for z in normalise(STRUCTURES, scores, how).values()} == {torch.float64}


def test_scores_are_left_as_they_were():
    scores = random_scores()
    normalise(STRUCTURES, scores)
    select(STRUCTURES, scores, 20)
    assert all(torch.equal(scores[name], value) for name, value in random_scores().items())


# ---------------------------------------------------------------- groups: alignment, lanes, blocks


def slow_groups(structures, scores, budget, align):
    """The choice of groups as an obvious loop: the group of largest mean score next, until the budget is reached."""
    stays = {s.name: [list(range(s.width)) for _ in range(s.lanes)] for s in structures}
    values = {s.name: scores[s.name].view(s.lanes, s.width).tolist() for s in structures}
    removed = 0.0
    while removed < budget - 1e-9:
        best = None
        for s in structures:
            each, width = align.get(s.kind, 1), len(stays[s.name][0])
            count = width % each or each
            if width - count < s.floor:
                continue
            falls = [
                sorted(lane, key=lambda u: -v[u])[:count]
                for lane, v in zip(stays[s.name], values[s.name], strict=True)
            ]
            chosen = [v[u] for lane, v in zip(falls, values[s.name], strict=True) for u in lane]
            mean = sum(chosen) / len(chosen)
            if best is None or mean > best[0]:
                best = (mean, s, falls)
        _, s, falls = best
        for lane, gone in zip(stays[s.name], falls, strict=True):
            lane[:] = [u for u in lane if u not in gone]
        removed += sum(map(len, falls)) * s.cost
    return {s.name: [u in lane for lane in stays[s.name] for u in range(s.width)] for s in structures}


@pytest.mark.parametrize("seed", range(20))
def test_groups_fall_as_in_a_slow_loop(seed):
    source = np.random.default_rng(seed)
    structures = []
    for layer in range(3):
        lanes, dims, hidden = (int(source.integers(low, high)) for low, high in ((1, 4), (3, 20), (5, 40)))
        cost = int(source.integers(1, 30))
        structures.append(Structure("dims", layer, lanes * dims, 3 * cost, (), (), lanes=lanes))
        structures.append(Structure("mlp", layer, hidden, cost, (), ()))
    align = {"dims": int(source.integers(1, 5)), "mlp": int(source.integers(1, 9))}
    scores = {s.name: torch.from_numpy(source.standard_normal(s.units)) for s in structures}
    most = removable(unit_cost(structures), align)
    for share in (0.1, 0.5, 0.9, 1.0):
        keep = select(structures, scores, share * most, align=align)
        assert {n: k.tolist() for n, k in keep.items()} == slow_groups(structures, scores, share * most, align)


def test_a_block_that_overshoots_is_passed_over_and_others_fall_instead():
    block = Structure("block", 0, 1, 500, (), (), floor=0, block="b.0", drops=True)
    other = Structure("block", 1, 1, 500, (), (), floor=0, block="b.1", drops=True)
    structures = [block, other, structure("mlp", 0, 100, 10)]
    scores = {"block.0": torch.tensor([9.0]), "block.1": torch.tensor([8.0]), "mlp.0": torch.arange(100.0) / 100}
    keep = select(structures, scores, 300, slack=20)
    assert bool(keep["block.0"])
    assert int((~keep["mlp.0"]).sum()) == 30
    keep = select(structures, scores, 600, slack=20)
    assert not bool(keep["block.0"])
    assert int((~keep["mlp.0"]).sum()) == 10


def test_for_a_block_without_which_the_budget_is_not_reached_smaller_units_stay():
    blocks = [Structure("block", n, 1, 500, (), (), floor=0, block=f"b.{n}", drops=True) for n in range(3)]
    structures = [*blocks, structure("mlp", 0, 40, 10)]
    scores = {f"block.{n}": torch.tensor([-1.0 - n]) for n in range(3)} | {"mlp.0": torch.arange(40.0) / 100}
    # All neurons come first, and then two blocks, the second of which goes 260 too far.
    keep = select(structures, scores, 1130, slack=20)
    assert [bool(keep[f"block.{n}"]) for n in range(3)] == [False, False, True]
    assert (~keep["mlp.0"]).tolist() == [False] * 27 + [True] * 13, "the worst of them"


def test_one_block_stays_whatever_its_score():
    structures = [Structure("block", n, 1, 500, (), (), floor=0, block=f"b.{n}", drops=True) for n in range(3)]
    scores = {"block.0": torch.tensor([3.0]), "block.1": torch.tensor([1.0]), "block.2": torch.tensor([2.0])}
    cost = unit_cost(structures)
    assert removable(cost) == 1000
    assert [bool(k) for k in select(structures, scores, 1000, cost=cost).values()] == [False, True, False]


@pytest.mark.parametrize("align", [{"attn": 0}, {"attn": -8}, {"attn": 1.5}])
def test_multiples_that_are_none_are_refused(align):
    with pytest.raises(UpopError, match=r"align: attn: expected a whole number of units, 1 or more"):
        check_alignment(align)
