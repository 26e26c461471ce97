"""Promises of the methods: each ranks by what it says, on one code path, and none leaves its budget."""

import copy

import pytest
import torch

from upop import Search, Target
from upop.criteria import random_scores, weight_norms
from upop.errors import UpopError
from upop.families import find_structures
from upop.growth import Growth
from upop.methods import METHODS, NORMALISE
from upop.ranking import NORMALISERS, below, normalise, select, select_uniform, uniform_limit
from upop.structures import prunable_cost, removed_cost

HALF = Target(prunable=0.5)
PRUNING = [name for name, method in METHODS.items() if method.score != "none"]


def train(model, images, *, steps=6, mask_lr=0.05, observe=lambda search: 0.9, **options):
    """A plain loop over random images; returns the search at its end."""
    search = Search(model, target=options.pop("target", HALF), steps=steps, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if search.trained_masks():
        optimizer.add_param_group({"params": search.trained_masks(), "lr": mask_lr, "weight_decay": 0.0})
    for t in range(steps):
        while search.needs_accuracy:
            search.observe(observe(search))
        loss = torch.nn.functional.cross_entropy(model(images(8, seed=t)).logits, torch.arange(8))
        (loss + search.penalty()).backward()
        optimizer.step()
        search.step()
        optimizer.zero_grad()
    while search.needs_accuracy:
        search.observe(observe(search))
    return search


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def removed(search, kinds=("attn", "mlp")):
    """Fraction of the prunable cost of these kinds that goes."""
    own = [s for s in search.structures if s.kind in kinds]
    return removed_cost(own, search.keep()) / prunable_cost(own)


@pytest.mark.parametrize("method", PRUNING)
def test_every_method_meets_the_same_budget(make_model, images, method):
    search = train(make_model(), images, method=method)
    assert search.done
    assert removed(search) == pytest.approx(0.5, abs=0.01)
    small = search.slim()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in search.model.parameters())


@pytest.mark.parametrize("method", [m for m in PRUNING if not METHODS[m].unified])
def test_methods_that_are_not_unified_take_the_same_share_of_every_kind(make_model, images, method):
    search = train(make_model(), images, method=method)
    assert [removed(search, (kind,)) for kind in ("attn", "mlp")] == [pytest.approx(0.5, abs=0.02)] * 2


def test_unified_methods_may_take_all_from_one_kind(make_model):
    keeps = {}
    for method in ("upop", "progressive"):
        search = Search(make_model(), target=Target(prunable=0.3), steps=1, method=method, normalise="none")
        high = {s.name: 10.0 * (s.kind == "mlp") for s in search.structures}
        sum((v * (high[n] + torch.rand(v.shape))).sum() for n, v in search.masks.values.items()).backward()
        search.step()
        keeps[method] = search
    assert removed(keeps["upop"], ("attn",)) == 0
    assert removed(keeps["progressive"], ("attn",)) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("method", [m for m in PRUNING if METHODS[m].shrink == "progressive"])
def test_progressive_methods_end_masked_as_slimmed(make_model, images, logits_of, method):
    search = train(make_model(), images, method=method)
    x = images(seed=99)
    torch.testing.assert_close(logits_of(search.slim(), x), logits_of(search.model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
def test_methods_that_cut_once_leave_the_masks_alone_until_then(make_model, images, logits_of, method):
    search = train(make_model(), images, method=method)
    assert all(bool((v == 1).all()) for v in search.masks.values.values())
    assert search.keep()["mlp.0"].dtype == torch.bool
    assert not torch.allclose(logits_of(search.slim(), images()), logits_of(search.model, images()), atol=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
def test_any_ranking_may_shrink_progressively(make_model, images, logits_of, method):
    search = train(make_model(), images, method=method, shrink="progressive")
    x = images(seed=99)
    torch.testing.assert_close(logits_of(search.slim(), x), logits_of(search.model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["mask", "unified"])
def test_the_optimizer_trains_the_masks_and_the_smallest_go(make_model, images, method):
    search = train(make_model(), images, method=method)
    values = {name: v.detach().abs() for name, v in search.masks.values.items()}
    assert all(bool((v != 1).any()) for v in values.values())
    for kind in ("attn", "mlp"):
        own = [s.name for s in search.structures if s.kind == kind]
        stay = torch.cat([values[n][search.keep()[n]] for n in own])
        go = torch.cat([values[n][~search.keep()[n]] for n in own])
        assert go.max() <= stay.min()


def test_the_sparsity_loss_matters_where_masks_are_trained(make_model, images):
    keeps = [train(make_model(), images, method="mask", sparsity={"attn": w, "mlp": w}).keep() for w in (0.0, 0.05)]
    assert not equal(*keeps)


def test_masks_belong_into_the_optimizer_only_where_they_are_trained(make_model):
    for name, method in METHODS.items():
        search = Search(make_model(), target=HALF, steps=2, method=name)
        assert bool(search.trained_masks()) == (method.score == "mask")


def test_magnitude_takes_the_units_with_the_smallest_norms(make_model, images):
    model = make_model()
    with torch.no_grad():
        model.get_submodule("vit.layers.0.mlp.fc1").weight[:100] *= 1e-3
        model.get_submodule("vit.layers.0.mlp.fc1").bias[:100] *= 1e-3
        model.get_submodule("vit.layers.0.mlp.fc2").weight[:, :100] *= 1e-3
    search = train(model, images, steps=1, method="magnitude", target=Target(prunable=0.15))
    assert not search.keep()["mlp.0"][:100].any()


def test_weight_norms_are_those_of_all_that_slimming_removes(make_model):
    model = make_model(layers=1)
    found = weight_norms(model, find_structures(model))
    layer = model.vit.layers[0]
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    by_hand = fc1.weight[5].square().sum() + fc1.bias[5].square() + fc2.weight[:, 5].square().sum()
    assert found["mlp.0"][5].item() == pytest.approx(by_hand.sqrt().item(), rel=1e-6)
    dims = model.config.hidden_size // model.config.num_attention_heads
    attention = layer.attention
    squares = 0.0
    for head in range(model.config.num_attention_heads):
        row = head * dims + 3
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            squares += float((linear.weight[row].square().sum() + linear.bias[row].square()).detach())
        squares += float(attention.o_proj.weight[:, row].detach().square().sum())
    assert found["attn.0"][3].item() == pytest.approx(squares**0.5, rel=1e-6)


def test_taylor_sums_absolute_mask_times_gradient(make_model):
    search = Search(make_model(), target=HALF, steps=2, method="taylor", normalise="none")
    for sign in (1.0, -3.0):
        sum((v * sign * torch.arange(v.numel())).sum() for v in search.masks.values.values()).backward()
        search.step()
    assert search.state_dict()["scores"]["mlp.0"].tolist() == [4.0 * n for n in range(256)]


def test_random_is_the_same_for_the_same_seed_only(make_model):
    structures = find_structures(make_model())
    assert equal(random_scores(structures, 3), random_scores(structures, 3))
    assert not equal(random_scores(structures, 3), random_scores(structures, 4))


def test_dense_continued_removes_nothing_and_masks_nothing(make_model, images, logits_of):
    search = train(make_model(), images, method="dense-continued", target=None)
    assert search.done
    assert all(bool(k.all()) for k in search.keep().values())
    assert torch.equal(logits_of(search.slim(), images()), logits_of(search.model, images()))


# ---------------------------------------------------------------- normalisation and thresholds


def test_the_names_in_the_configuration_are_the_normalisers():
    assert tuple(NORMALISERS) == NORMALISE


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("minmax", [0.0, 0.5, 0.5, 1.0]),
        ("rank", [0.0, 0.5, 0.5, 1.0]),
        ("none", [-1.0, 1.0, 1.0, 3.0]),
        ("zscore", [-(2**0.5), 0.0, 0.0, 2**0.5]),
    ],
)
def test_normalisers_against_numbers_by_hand(how, expected):
    found = NORMALISERS[how](torch.tensor([-1.0, 1.0, 1.0, 3.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["zscore", "minmax", "rank"])
@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 5.0), (1e3, -2.0)])
def test_normalised_scores_do_not_notice_scale_and_shift(make_model, how, scale, shift):
    structures = find_structures(make_model())
    scores = random_scores(structures, 0)
    moved = normalise(structures, {name: v * scale + shift for name, v in scores.items()}, how)
    for name, value in normalise(structures, scores, how).items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-7)


def test_uniform_selection_equals_a_selection_per_kind(make_model):
    structures = find_structures(make_model())
    scores = random_scores(structures, 0)
    keep = select_uniform(structures, scores, 0.7)
    for kind in ("attn", "mlp"):
        own = [s for s in structures if s.kind == kind]
        alone = select(own, scores, 0.7 * prunable_cost(own))
        assert all(torch.equal(keep[s.name], alone[s.name]) for s in own)
    assert uniform_limit(structures) == pytest.approx(1 - 1 / 32)


def test_below_prunes_what_is_above_the_threshold_but_for_the_floors(make_model):
    structures = find_structures(make_model())
    scores = random_scores(structures, 0)
    keep = below(structures, scores, 0.25)
    assert all(torch.equal(keep[name], score <= 0.25) for name, score in scores.items())
    assert [int(k.sum()) for k in below(structures, scores, -1.0).values()] == [1] * len(structures)


@pytest.mark.parametrize("how", ["zscore", "none"])
def test_a_threshold_needs_no_target_and_ends_exact(make_model, images, logits_of, how):
    search = train(make_model(), images, target=None, threshold=0.0, normalise=how)
    x = images(seed=99)
    torch.testing.assert_close(logits_of(search.slim(), x), logits_of(search.model, x), rtol=0, atol=1e-5)
    assert search.ratio == pytest.approx(removed(search))
    assert 0 < search.ratio < 1


def test_a_higher_threshold_prunes_less(make_model, images):
    ratios = [train(make_model(), images, target=None, threshold=t).ratio for t in (-1.0, 0.0, 1.0)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3


def test_a_threshold_means_the_same_where_the_search_is_ended_early(make_model, images):
    options = {"target": None, "normalise": "none", "gradient_order": "authors", "shrink": "once"}
    whole = train(make_model(), images, steps=2, threshold=1.0, **options)
    sums = whole.state_dict()["scores"]
    name, unit = max(((n, int(total.argmax())) for n, total in sums.items()), key=lambda at: sums[at[0]][at[1]])
    early = Search(make_model(), threshold=float(sums[name][unit]) * 0.4, steps=9, **options)
    optimizer = torch.optim.AdamW(early.model.parameters(), lr=1e-3)
    for t in range(2):
        loss = torch.nn.functional.cross_entropy(early.model(images(8, seed=t)).logits, torch.arange(8))
        (loss + early.penalty()).backward()
        optimizer.step()
        early.step()
        optimizer.zero_grad()
    early.finish()
    assert torch.equal(early.state_dict()["scores"][name], sums[name])
    assert not early.keep()[name][unit]  # its mean over two steps is half of its sum


# ---------------------------------------------------------------- open-ended


def grow(growth, accuracy_at):
    """The ratio that a growth ends at when the model's accuracy is a function of the ratio."""
    for step in range(growth.steps + 1):
        while growth.due(step):
            growth.observe(accuracy_at(growth.ratio(step) if step else 0.0), step)
    return growth.end


@pytest.mark.parametrize(("steps", "checks"), [(40, 20), (39, 20), (59, 20), (119, 20), (20, 20), (7, 3)])
def test_there_are_no_more_checks_than_asked_for_evenly_spread(steps, checks):
    seen, growth = [], Growth(0.9, steps, checks, max_drop=0.5)
    for step in range(steps + 1):
        while growth.due(step):
            growth.observe(0.9, step)
            seen.append(step)
    assert seen == [int(k * steps / checks + 0.5) for k in range(checks + 1)]


@pytest.mark.parametrize("steps", [39, 40])
def test_the_ratio_grows_in_even_steps_up_to_each_check(steps):
    growth, ratios = Growth(0.9, steps, 20, max_drop=0.5), []
    for step in range(steps):
        while growth.due(step):
            assert not ratios or ratios[-1] == pytest.approx(growth.end)
            growth.observe(0.9, step)
        ratios.append(growth.ratio(step))
        assert growth.start <= ratios[-1] <= growth.end + 1e-12
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("steps", [40, 97, 400])
@pytest.mark.parametrize("cliff", [0.1, 0.37, 0.8])
def test_the_accuracy_budget_ends_just_before_the_cliff(steps, cliff):
    end = grow(Growth(0.95, steps, 20, max_drop=0.02), lambda ratio: 0.9 if ratio <= cliff else 0.5)
    assert cliff - 0.1 <= end <= cliff


def test_the_accuracy_budget_goes_to_the_limit_where_nothing_is_lost():
    assert grow(Growth(0.95, 200, 20, max_drop=0.0), lambda ratio: 0.9) == 0.95


def test_the_budget_counts_from_the_dense_model_the_tolerance_from_the_last_check():
    # One point lost per tenth: never more than .01 at a time, but soon more than .02 in all.
    slope = lambda ratio: 0.9 - 0.1 * ratio  # noqa: E731
    assert grow(Growth(0.8, 200, 20, max_drop=0.02), slope) == pytest.approx(0.2, abs=0.05)
    assert grow(Growth(0.8, 200, 20, tolerance=0.01), slope) == pytest.approx(0.8, abs=0.05)


def test_a_model_that_cannot_lose_anything_ends_at_zero():
    assert grow(Growth(0.95, 50, 10, max_drop=0.01), lambda ratio: 0.9 if ratio == 0 else 0.1) == 0.0


def test_growth_slows_down_after_a_fall_and_speeds_up_otherwise():
    growth = Growth(0.9, 100, 10, tolerance=0.01)
    growth.observe(0.9, 0)
    first = growth.rate
    growth.observe(0.9, 10)
    assert growth.rate > first
    faster, reached = growth.rate, growth.accepted[-1][0]
    growth.observe(0.5, 20)
    assert growth.rate < faster
    assert growth.end == reached


def test_an_open_ended_search_stays_within_its_budget_and_ends_exact(make_model, images, logits_of):
    accuracy = lambda search: 0.9 if search.ratio <= 0.3 else 0.7  # noqa: E731
    search = train(make_model(), images, target=None, max_drop=0.05, checks=10, steps=40, observe=accuracy)
    assert search.done
    assert 0.15 <= search.ratio <= 0.3
    assert removed(search) == pytest.approx(search.ratio, abs=0.01)
    x = images(seed=99)
    torch.testing.assert_close(logits_of(search.slim(), x), logits_of(search.model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("interval", [1, 7])
def test_what_is_observed_is_the_ratio_that_is_in_force(make_model, images, interval):
    seen = []

    def accuracy(search):
        seen.append((round(removed(search), 2), round(search.ratio, 2)))
        return 0.9

    train(make_model(), images, target=HALF, tolerance=0.1, checks=5, steps=20, interval=interval, observe=accuracy)
    assert len(seen) == 6
    assert all(done == pytest.approx(said, abs=0.02) for done, said in seen)


def test_an_accuracy_that_is_due_must_be_told_before_the_next_step(make_model):
    search = Search(make_model(), target=HALF, steps=4, tolerance=0.1)
    with pytest.raises(UpopError, match=r"an accuracy is due after 0 steps; call observe\(accuracy\)"):
        search.step()
    with pytest.raises(UpopError, match=r"expected an accuracy from 0 to 1, got 92"):
        search.observe(92)
    search.observe(0.5)
    with pytest.raises(UpopError, match="no accuracy is due after 0 steps"):
        search.observe(0.5)


def test_a_resumed_open_ended_search_equals_an_uninterrupted_one(make_model, images):
    options = {"target": None, "max_drop": 0.05, "checks": 5, "steps": 20}
    accuracy = lambda search: 0.9 if search.ratio <= 0.3 else 0.7  # noqa: E731
    search = Search(make_model(), **options)
    twin = Search(make_model(), **options)
    for t in range(20):
        for each in (search, twin):
            while each.needs_accuracy:
                each.observe(accuracy(each))
            each.model(images(8, seed=t)).logits.square().mean().backward()
            each.step()
        state = copy.deepcopy(twin.state_dict())
        twin.detach()
        twin = Search(make_model(), **options)
        twin.load_state_dict(state)
    assert equal(search.keep(), twin.keep())
    assert search.growth.history == twin.growth.history


def test_an_open_ended_search_that_was_finished_is_loaded_as_finished(make_model, images):
    options = {"target": None, "max_drop": 0.05, "checks": 5, "steps": 20}
    search = Search(make_model(), **options)
    for t in range(6):
        while search.needs_accuracy:
            search.observe(0.9)
        search.model(images(8, seed=t)).logits.square().mean().backward()
        search.step()
    before = copy.deepcopy(search.state_dict())
    search.finish()
    twin = Search(make_model(), **options)
    twin.load_state_dict(copy.deepcopy(search.state_dict()))
    assert twin.done
    assert equal(search.keep(), twin.keep())
    twin.slim()
    # And back to where it was not finished yet.
    twin.load_state_dict(before)
    assert not twin.done
    assert twin.growth.history == before["growth"]["history"]


def test_what_training_alone_costs_is_told_apart_from_pruning():
    growth = Growth(0.9, 40, 4, max_drop=0.02)
    for step, accuracy in [(0, 0.8), (10, 0.7), (20, 0.75), (30, 0.9)]:
        growth.observe(accuracy, step)
    assert growth.history[2]["ratio"] == 0, "refused at step 10, back to nothing"
    assert growth.cost_of_training == pytest.approx(0.05)
