"""One-shot cuts in rounds: each round ranks what the rounds before have left, and the target is met."""

import copy

import pytest
import torch
from accelerate import Accelerator

from upop import cutting
from upop.config import make_config
from upop.cutting import one_shot
from upop.families import find_structures
from upop.oneshot import rank
from upop.plan import make_plan
from upop.profiling import count_params
from upop.ranking import normalise, select
from upop.slim import slim
from upop.structures import dropped_blocks
from upop.targets import find_cost


def planned(tmp_path, **options):
    values = {"model": "deit-digits-2layers", "data": "digits", "batch_size": 16, "rank_batches": 2}
    values |= {"epochs_search": 0, "stages": "search", "subset": 64, "out": str(tmp_path / "out"), **options}
    return make_plan(make_config(values))


def outputs(model, x):
    with torch.no_grad():
        return model(pixel_values=x).logits


def by_hand(model, images, rounds, left):
    """Cut a really smaller model in every round, and rank that; its outputs tell which units stayed."""
    dense, small = count_params(model), model
    for number in range(1, rounds + 1):
        structures = find_structures(small)
        cost = find_cost(small, structures, "params")
        budget = cost.dense - dense * left ** (number / rounds)
        small = slim(small, select(structures, rank(small, structures, images), budget, cost=cost))
    return small


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_rank_what_the_rounds_before_have_left(tmp_path, make_model, images, monkeypatch, rounds):
    plan = planned(tmp_path, target="params=0.6", rank_rounds=rounds, compensate="none")
    model = plan.loaded.model
    seen = [(images(8, size=16, seed=seed), torch.arange(8) % 10) for seed in range(2)]
    monkeypatch.setattr("upop.cutting._calibration", lambda *_: seen)
    keep, small = one_shot(plan, Accelerator(cpu=True), model)
    wanted = by_hand(model, seen, rounds, plan.left / plan.analysis.params_cost.dense)
    torch.testing.assert_close(outputs(small, seen[0][0]), outputs(wanted, seen[0][0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(slim(model, keep), seen[0][0]), outputs(small, seen[0][0]))


def test_several_rounds_choose_other_units_than_one(tmp_path):
    """Else the tests of rounds could not fail."""
    kept = [one_shot_keep(planned(tmp_path, target="params=0.6", rank_rounds=n)) for n in (1, 3)]
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def one_shot_keep(plan):
    return one_shot(plan, Accelerator(cpu=True), plan.loaded.model)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target": "params=0.7"},
        # Of more layers, since a block is to be few parts of the model.
        {"target": "macs=0.6", "structures": "head,dims,mlp,block", "align": "mlp=8", "model": "deit-digits"},
        {"target": "params=0.5", "structures": "qk,v,mlp", "normalise": "zscore", "compensate": "mean"},
        {"target": "params=0.5", "method": "magnitude"},
        {"target": "params=0.5", "normalise": "rank"},
        {"target": "params=0.5", "normalise": "minmax"},
    ],
)
def test_the_target_is_met_and_the_model_stays_as_it_was(tmp_path, options):
    plan = planned(tmp_path, rank_rounds=3, **options)
    before = copy.deepcopy(plan.loaded.model.state_dict())
    keep, _ = one_shot(plan, Accelerator(cpu=True), plan.loaded.model)
    cost = plan.analysis.costs[plan.target.currency]
    assert cost.dense - cost.removed(keep) == pytest.approx(plan.left, abs=0.01 * cost.dense)
    assert all(torch.equal(value, before[name]) for name, value in plan.loaded.model.state_dict().items())
    for s in find_structures(plan.loaded.model, plan.kinds):
        lanes = keep[s.name].view(s.lanes, -1).sum(1)
        assert lanes.unique().numel() == 1
        assert s.kind != "mlp" or lanes[0] % plan.align.get("mlp", 1) == 0


LARGE = {"model": "deit-tiny-cifar", "method": "random", "compensate": "none", "rank_batches": 1, "batch_size": 16}


def test_what_a_round_cut_never_comes_back(tmp_path, monkeypatch):
    # Whole heads among single neurons: a round may remove more than the next one is to have removed in all.
    plan, kept = planned(tmp_path, **LARGE, target="params=0.03", structures="head,mlp", seed=2), []

    def noting(*args, **options):
        kept.append(select(*args, **options))
        return kept[-1]

    monkeypatch.setattr(cutting, "select", noting)
    keep = one_shot_keep(plan)
    assert len(kept) > 1
    for earlier, later in zip(kept, [*kept[1:], keep], strict=True):
        assert all(bool((later[name] <= earlier[name]).all()) for name in keep)


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_block_that_fits_into_the_target_may_go_though_it_is_larger_than_a_round(tmp_path, monkeypatch, rounds):
    options = {"structures": "attn,mlp,block", "rank_rounds": rounds, "normalise": "none"}
    plan = planned(tmp_path, **LARGE, **options, target="params=0.2")

    def blocks_first(model, structures, batches, **options):
        generator = torch.Generator().manual_seed(0)
        return {s.name: torch.rand(s.units, generator=generator).double() + 100.0 * s.drops for s in structures}

    monkeypatch.setattr(cutting, "rank", blocks_first)
    keep = one_shot_keep(plan)
    cost = plan.analysis.params_cost
    # Each is 8.2 % of the model: two fit into the target, none into the first of four rounds.
    assert len(dropped_blocks(cost.structures, keep)) == 2
    assert cost.removed(keep) / cost.dense == pytest.approx(0.2, abs=0.01)


def test_units_that_went_with_their_block_do_not_count_among_those_that_are_left(make_model):
    structures = find_structures(make_model(layers=3), ("attn", "mlp", "block"))
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.randn(s.units, generator=generator, dtype=torch.float64) for s in structures}
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    gone = next(s for s in structures if s.drops)
    keep[gone.name][:] = False
    found = cutting._first_the_gone(structures, scores, keep, "zscore")
    left = [s for s in structures if s.block != gone.block]
    wanted = normalise(left, {s.name: scores[s.name] for s in left})
    for s in structures:
        if s in left:
            torch.testing.assert_close(found[s.name], wanted[s.name])
        else:
            assert bool(found[s.name].isposinf().all())
