"""Promises of upop.search: Algorithm 1, exact at the end, resumable, independent of how the loop is written."""

import copy
import io
import json
import math
import re

import numpy as np
import pytest
import torch

import upop
from upop import Search, Target
from upop.costs import params_cost
from upop.errors import ModelError, TargetError, TrainingError, UpopError
from upop.families import find_structures
from upop.ranking import removable, select
from upop.structures import prunable_cost, removed_cost
from upop.targets import find_cost

HALF = Target(prunable=0.5)
NO_PENALTY = {"attn": 0.0, "mlp": 0.0}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def values(search):
    """Mask values now, copied."""
    return {name: v.detach().clone() for name, v in search.masks.values.items()}


def feed(search, gradients):
    """One search step with exactly these mask gradients, from a loss that is linear in the masks."""
    sum((search.masks.values[name] * g).sum() for name, g in gradients.items()).backward()
    search.step()


def random_gradients(structures, steps, seed=0):
    """Per step and structure [U]; each step on another scale, so that the gradient orders disagree."""
    generator = torch.Generator().manual_seed(seed)
    return [{s.name: 10.0**t * torch.randn(s.units, generator=generator) for s in structures} for t in range(steps)]


class Loop:
    """A user's training loop on a tiny model; the flags are the ways in which users differ."""

    def __init__(self, model, images, *, steps=6, target=HALF, halves=False, search_first=False, **options):
        self.model, self.halves, self.search_first = model, halves, search_first
        self.images = [images(8, seed=t, dtype=next(model.parameters()).dtype) for t in range(steps)]
        self.labels = torch.arange(8)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.search = Search(model, target=target, steps=steps, **options)

    def run(self, start=0, stop=None):
        for x in self.images[start:stop]:
            parts = [slice(0, 4), slice(4, 8)] if self.halves else [slice(0, 8)]
            for part in parts:
                loss = torch.nn.functional.cross_entropy(self.model(x[part]).logits, self.labels[part])
                ((loss + self.search.penalty()) / len(parts)).backward()
            for step in (self.search.step, self.optimizer.step)[:: 1 if self.search_first else -1]:
                step()
            self.optimizer.zero_grad()
        return self.search


# ---------------------------------------------------------------- targets


@pytest.fixture(scope="module")
def deit_small(make_model):
    with torch.device("meta"):
        return make_model("vit", width=384, heads=6, layers=12, image=224, patch=16, labels=1000)


@pytest.mark.parametrize(("ratio", "millions"), [(0.1, 19.92), (0.2, 17.80), (0.3, 15.67), (0.4, 13.54), (0.5, 11.42)])
def test_deit_small_gets_the_papers_number_of_parameters(deit_small, ratio, millions):
    structures = find_structures(deit_small)
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.randn(s.units, generator=generator) for s in structures}
    budget = Target(prunable=ratio).budget(params_cost(deit_small, structures))
    small = upop.slim(deit_small, select(structures, scores, budget))
    assert parameters(small) == pytest.approx(millions * 1e6, rel=2e-3)


@pytest.mark.parametrize("removed", [0.0, 0.1, 0.25, 0.5, 0.75, 0.85])
def test_params_means_that_fraction_of_all_parameters_within_one_percent(make_model, removed):
    model = make_model()
    search = Search(model, target=Target(params=removed), steps=1)
    feed(search, random_gradients(search.structures, 1)[0])
    assert 1 - parameters(search.slim()) / parameters(model) == pytest.approx(removed, abs=0.01)


@pytest.mark.parametrize("unit", ["params", "prunable"])
def test_an_unreachable_target_is_refused_with_the_range_and_leaves_the_model_alone(make_model, unit):
    model = make_model()
    with pytest.raises(TargetError, match=rf"target {unit}=0\.99: cannot be met; reachable here is {unit}=0 to"):
        Search(model, target=Target(**{unit: 0.99}), steps=3)
    Search(model, target=HALF, steps=3)


@pytest.mark.parametrize("unit", ["params", "prunable"])
@pytest.mark.parametrize("layers", [2, 3, 4, 6])
def test_the_range_in_the_message_is_reachable(make_model, unit, layers):
    with torch.device("meta"):
        model = make_model(width=96, heads=3, layers=layers)
    structures = find_structures(model)
    with pytest.raises(TargetError) as refused:
        Target(**{unit: 0.9999}).budget(params_cost(model, structures))
    most = float(re.search(rf"to {unit}=([0-9.]+) ", str(refused.value))[1])
    assert Target(**{unit: most}).budget(params_cost(model, structures)) > 0


@pytest.mark.parametrize("unit", ["params", "prunable"])
@pytest.mark.parametrize("layers", [2, 3, 4, 6])
def test_the_range_that_analyze_shows_is_reachable(make_model, unit, layers):
    with torch.device("meta"):
        analysis = upop.analyze(make_model(width=96, heads=3, layers=layers))
    most = float(re.search(rf"to {unit}=([0-9.]+)", str(analysis))[1])
    assert Target(**{unit: most}).budget(analysis.params_cost) > 0


def test_a_model_whose_units_are_too_large_for_one_percent_is_refused_by_name(make_model):
    model = make_model(layers=1, heads=8, intermediate_size=8)
    with pytest.raises(TargetError, match=r"cannot be met within 1%: one unit of attn alone is 2,\d+ parameters of"):
        Search(model, target=HALF, steps=3, structures=["attn"])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"params": 0.5, "prunable": 0.5}, {"params": 1.0}, {"params": -0.1}, {"params": 50}, {"params": math.nan}],
)
def test_a_target_is_one_fraction_below_one(arguments):
    with pytest.raises(TargetError, match=r"^target"):
        Target(**arguments)


def test_targets_are_read_as_typed_and_written_back():
    assert Target.parse("params=0.5") == Target(params=0.5)
    assert Target.parse(" prunable = .25") == Target(prunable=0.25)
    assert str(Target.parse("prunable=0.25")) == "prunable=0.25"
    assert Target.parse(str(Target(params=1 / 3))) == Target(params=1 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parms=0.5", r"got unit 'parms'; did you mean 'params'\?"),
        ("0.5", r"expected params=\.\.\., macs=\.\.\., latency=\.\.\., prunable=\.\.\., got unit"),
        (
            "params=half",
            r"expected a fraction removed or what is left after '=', such as 0.5 .*, got 'half'",
        ),
        ("params=", r"expected a fraction removed or what is left"),
        ("params=5", r"0 <= x < 1, or what is left, such as params=11M, got 5"),
    ],
)
def test_a_mistyped_target_is_refused_and_explained(text, message):
    with pytest.raises(TargetError, match=message):
        Target.parse(text)


# ---------------------------------------------------------------- the algorithm


def zscored(structures, scores):
    result = {}
    for kind in ("attn", "mlp"):
        names = [s.name for s in structures if s.kind == kind]
        pooled = np.concatenate([scores[name] for name in names])
        result |= {name: (scores[name] - pooled.mean()) / pooled.std() for name in names}
    return result


def reference(structures, gradients, slow_select, *, order, schedule, budget):
    """Algorithm 1, slowly, in float64: yields (keep, mask values) after each step."""
    steps = len(gradients)
    total = {s.name: np.zeros(s.units) for s in structures}
    for t, now in enumerate(gradients):
        now = {name: g.double().numpy() for name, g in now.items()}
        now = zscored(structures, now) if order == "paper" else now
        total = {name: total[name] + now[name] for name in total}
        fraction = schedule(t / (steps - 1))
        ranked = zscored(structures, total) if order == "authors" else total
        keep = slow_select(structures, ranked, fraction * budget)
        yield keep, {name: [1.0 if stays else 1 - fraction for stays in k] for name, k in keep.items()}


SLOW_SCHEDULES = {"sine": lambda u: math.sqrt((1 - math.cos(math.pi * u)) / 2), "linear": lambda u: u}


@pytest.mark.parametrize("order", ["paper", "authors"])
@pytest.mark.parametrize("schedule", SLOW_SCHEDULES)
def test_keeps_and_masks_are_those_of_algorithm_1(make_model, slow_select, order, schedule):
    search = Search(make_model(), target=HALF, steps=6, gradient_order=order, schedule=schedule)
    gradients = random_gradients(search.structures, 6)
    expected = reference(
        search.structures,
        gradients,
        slow_select,
        order=order,
        schedule=SLOW_SCHEDULES[schedule],
        budget=0.5 * prunable_cost(search.structures),
    )
    for now, (keep, masks) in zip(gradients, expected, strict=True):
        feed(search, now)
        assert {name: k.tolist() for name, k in search.keep().items()} == keep
        for name, value in values(search).items():
            np.testing.assert_allclose(value.numpy(), masks[name], atol=1e-6)


def test_the_two_gradient_orders_decide_differently(make_model):
    keeps = []
    for order in ("paper", "authors"):
        search = Search(make_model(), target=HALF, steps=6, gradient_order=order)
        for now in random_gradients(search.structures, 6):
            feed(search, now)
        keeps.append(search.keep())
    assert not equal(*keeps)


def test_units_with_a_large_positive_gradient_go(make_model):
    search = Search(make_model(), target=Target(prunable=0.3), steps=1)
    sign = {s.name: torch.where(torch.arange(s.units) % 3 == 0, 1.0, -1.0) for s in search.structures}
    feed(search, sign)
    assert all(bool((sign[name][~k] > 0).all()) for name, k in search.keep().items())


@pytest.mark.parametrize("high", ["attn.0", "attn.1", "mlp.0", "mlp.1"])
def test_one_ranking_compares_all_layers_and_kinds(make_model, high):
    search = Search(make_model(), target=Target(prunable=0.1), steps=1)
    feed(search, {s.name: torch.full((s.units,), float(s.name == high)) for s in search.structures})
    touched = [name for name, k in search.keep().items() if not k.all()]
    assert touched == [high], "all that goes must come from the layer that scores high"


def test_every_structure_keeps_a_unit_at_the_largest_target(make_model):
    model = make_model()
    search = Search(model, target=Target(prunable=0.98), steps=3)
    for now in random_gradients(search.structures, 3):
        feed(search, now)
    assert min(int(k.sum()) for k in search.keep().values()) == 1


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_at_the_end_masks_are_exactly_0_or_1_and_equal_the_keeps(make_model, images, steps, interval):
    search = Loop(make_model(), images, steps=steps, interval=interval).run()
    assert search.done
    assert equal(values(search), {name: k.float() for name, k in search.keep().items()})
    assert removed_cost(search.structures, search.keep()) >= 0.5 * prunable_cost(search.structures)
    assert search.ratio == search.target_ratio == 0.5


def test_masks_are_decided_every_interval_and_at_the_last_step(make_model):
    search = Search(make_model(), target=HALF, steps=9, interval=3)
    decided = []
    for t, now in enumerate(random_gradients(search.structures, 9)):
        before = values(search)
        feed(search, now)
        decided += [] if equal(before, values(search)) else [t]
    # Step 0 decides to prune nothing yet: s(0) = 0.
    assert decided == [3, 6, 8]


def test_scores_are_gathered_between_decisions(make_model):
    every, rarely = (Search(make_model(), target=HALF, steps=9, interval=interval) for interval in (1, 4))
    for now in random_gradients(every.structures, 9):
        feed(every, now)
        feed(rarely, now)
    assert equal(every.keep(), rarely.keep())


def test_pruned_units_may_come_back(make_model):
    search = Search(make_model(), target=HALF, steps=5, schedule="linear")
    first = random_gradients(search.structures, 1)[0]
    feed(search, first)
    feed(search, first)
    gone = {name: ~k for name, k in search.keep().items()}
    assert any(bool(g.any()) for g in gone.values())
    for _ in range(3):
        feed(search, {name: -10 * g for name, g in first.items()})
    back = sum(int((gone[name] & k).sum()) for name, k in search.keep().items())
    assert back > 0.9 * sum(int(g.sum()) for g in gone.values())
    assert all(bool((v[gone[name] & search.keep()[name]] == 1).all()) for name, v in values(search).items())


def test_steps_after_the_last_change_nothing(make_model, images):
    loop = Loop(make_model(), images, steps=3)
    search = loop.run()
    before = search.state_dict()
    loop.run()
    after = search.state_dict()
    assert all(equal(before[key], after[key]) for key in ("keep", "scores", "masks"))


@pytest.mark.parametrize("options", [{}, {"gradient_order": "authors"}, {"interval": 2}])
def test_sparsity_weights_change_no_keep(make_model, images, options):
    # While a mask is above 0 its L1 gradient is one constant per kind, which the z-score subtracts.
    keeps = [
        Loop(make_model(), images, steps=8, sparsity={"attn": a, "mlp": m}, **options).run().keep()
        for a, m in [(0, 0), (4.8e-3, 2e-4), (5, 3)]
    ]
    assert equal(keeps[0], keeps[1])
    assert equal(keeps[0], keeps[2])


@pytest.mark.parametrize("options", [{"method": "taylor"}, {"method": "taylor", "shrink": "progressive"}])
def test_a_method_that_ranks_by_effects_on_the_loss_does_not_feel_the_sparsity_loss(make_model, images, options):
    found = [
        Loop(make_model(), images, sparsity=sparsity, **options).run()
        for sparsity in (NO_PENALTY, {"attn": 0.5, "mlp": 0.1})
    ]
    assert equal(found[0].state_dict()["scores"], found[1].state_dict()["scores"])
    assert equal(found[0].keep(), found[1].keep())


@pytest.mark.parametrize("target", [None, HALF])
def test_sparsity_weights_change_no_keep_of_an_open_ended_search(make_model, images, target):
    """Its losers are at 0 from one check to the next, where the slope of |mask| is anybody's."""
    found = []
    for sparsity in (NO_PENALTY, {"attn": 0.5, "mlp": 0.1}):
        loop = Loop(make_model(), images, target=target, sparsity=sparsity, max_drop=0.5, checks=3)
        while not loop.search.done:
            if loop.search.needs_accuracy:
                loop.search.observe(0.9)
            if loop.search.steps_done < loop.search.steps:
                loop.run(loop.search.steps_done, loop.search.steps_done + 1)
        found.append(loop.search)
    assert found[0].ratio > 0.3
    assert equal(found[0].keep(), found[1].keep())
    assert equal(values(found[0]), values(found[1]))


@pytest.mark.parametrize("method", ["upop", "unified"])
def test_the_penalty_is_the_weighted_sum_of_mask_values_and_reaches_the_masks(make_model, method):
    options = {"sparsity": {"attn": 2.0, "mlp": 3.0}, "normalise": "none", "gradient_order": "authors"}
    search = Search(make_model(), target=HALF, steps=2, method=method, **options)
    assert search.penalty().item() == 2 * 2 * 32 + 3 * 2 * 256
    (search.penalty() + sum(0 * v.sum() for v in search.masks.values.values())).backward()
    if search.trains_masks:
        found = {name: v.grad for name, v in search.masks.values.items()}
    else:
        search.step()
        found = search.state_dict()["scores"]
    assert set(found["attn.0"].tolist()) == {2.0}
    assert set(found["mlp.1"].tolist()) == {3.0}


def test_without_normalisation_the_sparsity_weights_do_matter(make_model, images):
    keeps = [
        Loop(make_model(), images, steps=4, normalise="none", sparsity={"attn": a, "mlp": 0.0}).run().keep()
        for a in (0.0, 5.0)
    ]
    assert not equal(*keeps)


# ---------------------------------------------------------------- the user's loop


@pytest.mark.parametrize("order", ["paper", "authors"])
def test_step_may_stand_on_either_side_of_the_optimizers(make_model, images, order):
    before, after = (
        Loop(make_model(), images, search_first=first, gradient_order=order).run() for first in (True, False)
    )
    assert equal(before.keep(), after.keep())
    assert equal(before.state_dict()["scores"], after.state_dict()["scores"])


@pytest.mark.parametrize("order", ["paper", "authors"])
def test_accumulating_two_half_batches_gives_the_scores_of_one_batch(make_model, images, order):
    whole, halves = (
        Loop(make_model(dtype=torch.float64), images, halves=halves, gradient_order=order).run()
        for halves in (False, True)
    )
    for name, score in whole.state_dict()["scores"].items():
        torch.testing.assert_close(halves.state_dict()["scores"][name], score, rtol=1e-4, atol=1e-5)
    assert equal(whole.keep(), halves.keep())


@pytest.mark.parametrize("order", ["paper", "authors"])
def test_scores_of_bfloat16_models_are_accumulated_in_float64(make_model, images, order):
    steps = 40
    loop = Loop(make_model(dtype=torch.bfloat16), images, steps=steps, gradient_order=order, sparsity=NO_PENALTY)
    total = {s.name: np.zeros(s.units) for s in loop.search.structures}
    for x in loop.images:
        loop.model(x).logits.float().square().mean().backward()
        now = {name: v.grad.double().numpy() for name, v in loop.search.masks.values.items()}
        now = zscored(loop.search.structures, now) if order == "paper" else now
        total = {name: total[name] + now[name] for name in total}
        loop.search.step()
    for name, score in loop.search.state_dict()["scores"].items():
        assert score.dtype == torch.float64
        np.testing.assert_allclose(score.numpy(), total[name], atol=1e-5 * np.abs(total[name]).max())


def test_the_model_is_untouched_by_a_search_without_an_optimizer(make_model, images, logits_of):
    model = make_model()
    logits, state = logits_of(model, images()), copy.deepcopy(model.state_dict())
    search = Search(model, target=HALF, steps=3)
    assert torch.equal(logits_of(model, images()), logits), "after Search"
    for now in random_gradients(search.structures, 3):
        feed(search, now)
    masked = logits_of(model, images())
    small = search.slim()
    assert torch.equal(logits_of(model, images()), masked), "after slim"
    torch.testing.assert_close(logits_of(small, images()), masked, rtol=0, atol=1e-5)
    search.detach()
    assert torch.equal(logits_of(model, images()), logits), "after detach"
    assert equal(model.state_dict(), state)
    assert not any("forward" in vars(m) for m in model.modules())


def test_slimming_after_detach_gives_the_same_model(make_model):
    search = Search(make_model(), target=HALF, steps=1)
    feed(search, random_gradients(search.structures, 1)[0])
    attached = search.slim()
    search.detach()
    assert equal(attached.state_dict(), search.slim().state_dict())


def test_finish_ends_the_search_at_the_full_target(make_model, images, logits_of):
    loop = Loop(make_model(), images, steps=6)
    search = loop.run(stop=3)
    assert not search.done
    search.finish()
    assert search.done
    assert equal(values(search), {name: k.float() for name, k in search.keep().items()})
    assert removed_cost(search.structures, search.keep()) >= 0.5 * prunable_cost(search.structures)
    x = images()
    torch.testing.assert_close(logits_of(search.slim(), x), logits_of(loop.model, x), rtol=0, atol=1e-5)


def test_what_keep_returns_is_the_callers_own(make_model):
    search = Search(make_model(), target=HALF, steps=1)
    feed(search, random_gradients(search.structures, 1)[0])
    masks = values(search)
    for value in search.keep().values():
        value.fill_(True)
    assert equal({name: k.float() for name, k in search.keep().items()}, masks)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
@pytest.mark.parametrize("order", ["paper", "authors"])
def test_a_resumed_search_equals_an_uninterrupted_one(make_model, images, stop, order):
    options = {"steps": 6, "interval": 2, "gradient_order": order}
    uninterrupted = Loop(make_model(), images, **options).run().state_dict()

    first = Loop(make_model(), images, **options)
    saved = io.BytesIO()
    torch.save([first.run(stop=stop).state_dict(), first.model.state_dict(), first.optimizer.state_dict()], saved)
    saved.seek(0)
    search_state, weights, optimizer_state = torch.load(saved, weights_only=True)

    second = Loop(make_model(seed=1), images, **options)
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(optimizer_state)
    second.search.load_state_dict(search_state)
    resumed = second.run(start=stop).state_dict()
    assert all(equal(resumed[key], uninterrupted[key]) for key in ("keep", "scores", "masks"))
    assert (resumed["steps_done"], resumed["ratio"]) == (6, 0.5)


@pytest.mark.parametrize("loaded_from_it", [False, True])
def test_a_saved_state_is_a_snapshot(make_model, loaded_from_it):
    search = Search(make_model(), target=HALF, steps=4)
    gradients = random_gradients(search.structures, 4)
    for now in gradients[:2]:
        feed(search, now)
    state = search.state_dict()
    before = copy.deepcopy(state)
    if loaded_from_it:
        search.load_state_dict(state)
    for now in gradients[2:]:
        feed(search, now)
    assert all(equal(state[key], before[key]) for key in ("keep", "scores", "masks"))


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"target": Target(prunable=0.4)}, "target"),
        ({"target": Target(prunable=0.5 + 1e-7)}, "target"),
        ({"target": Target(params=0.5)}, "target"),
        ({"steps": 7}, "steps"),
        ({"schedule": "linear"}, "schedule"),
        ({"interval": 2}, "interval"),
        ({"gradient_order": "authors"}, "gradient_order"),
        ({"sparsity": {"attn": 1.0, "mlp": 1.0}}, "sparsity"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_search_is_refused_by_the_setting_that_differs(make_model, other, key):
    options = {"target": HALF, "steps": 6}
    state = Search(make_model(), **options).state_dict()
    search = Search(make_model(), **{**options, **other})
    before = search.state_dict()
    with pytest.raises(UpopError, match=f"saved with {key}="):
        search.load_state_dict(state)
    assert search.state_dict()["steps_done"] == before["steps_done"]


def test_a_state_of_another_model_is_refused(make_model):
    state = Search(make_model(layers=3), target=HALF, steps=6).state_dict()
    with pytest.raises(UpopError, match="saved with units="):
        Search(make_model(), target=HALF, steps=6).load_state_dict(state)


# ---------------------------------------------------------------- errors


def test_two_searches_on_one_model_are_refused(make_model):
    model = make_model()
    first = Search(model, target=HALF, steps=3)
    with pytest.raises(ModelError, match=r"another search.*detach"):
        Search(model, target=HALF, steps=3)
    first.detach()
    Search(model, target=HALF, steps=3)


def test_a_step_without_backward_is_refused(make_model):
    search = Search(make_model(), target=HALF, steps=3)
    with pytest.raises(UpopError, match=r"no gradient has reached the masks.*after loss\.backward\(\)"):
        search.step()
    feed(search, random_gradients(search.structures, 1)[0])
    with pytest.raises(UpopError, match="no gradient has reached the masks"):
        search.step()
    assert search.steps_done == 1


def test_a_layer_that_takes_no_part_in_the_loss_is_named(make_model, images):
    model = make_model(layers=3)
    search = Search(model, target=HALF, steps=3)
    model.vit.layers[1].register_forward_hook(lambda module, inputs, output: output.detach())
    model(images()).logits.sum().backward()
    with pytest.raises(UpopError, match=r"no gradient has reached attn\.0 .* every layer must take part in the loss"):
        search.step()


def test_slim_before_the_end_is_refused(make_model):
    search = Search(make_model(), target=HALF, steps=3)
    feed(search, random_gradients(search.structures, 1)[0])
    with pytest.raises(UpopError, match=r"1 of 3 steps are done.*finish\(\)"):
        search.slim()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_not_counted(make_model, bad):
    search = Search(make_model(), target=HALF, steps=3)
    gradients = random_gradients(search.structures, 1)[0]
    feed(search, gradients)
    before = search.state_dict()
    broken = {name: g.clone() for name, g in gradients.items()}
    broken["mlp.1"][3] = bad
    with pytest.raises(TrainingError, match="a mask gradient is NaN or infinite at step 2"):
        feed(search, broken)
    after = search.state_dict()
    assert all(equal(before[key], after[key]) for key in ("keep", "scores", "masks"))
    assert after["steps_done"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sin"}, r"schedule: expected one of sine, .* got 'sin'; did you mean 'sine'\?"),
        ({"gradient_order": "author"}, r"gradient_order: expected one of paper, authors, got 'author'"),
        ({"method": "upp"}, r"method: expected one of upop, .*got 'upp'; did you mean 'upop'\?"),
        ({"normalise": "z"}, r"normalise: expected one of zscore, .* got 'z'"),
        ({"method": "mask", "shrink": "progressive"}, r"shrink: a method that trains its masks cuts once"),
        ({"threshold": 0.0}, r"a threshold decides the ratio itself; leave out the target prunable=0.5"),
        ({"target": None}, r"an open-ended search needs one of threshold, max_drop, tolerance"),
        ({"max_drop": 0.1, "tolerance": 0.1}, r"one of threshold, max_drop, tolerance, got max_drop and tolerance"),
        ({"max_drop": 5.0}, r"max_drop: expected a fraction from 0 to 1 \(0.01 = one point\), got 5.0"),
        ({"tolerance": 0.1, "method": "random"}, r"tolerance: needs a progressive search"),
        ({"method": "mask", "target": Target(prunable=0.98)}, r"cannot be met with the same ratio in every kind"),
        ({"steps": 0}, r"expected steps, interval and checks >= 1.*steps=0"),
        ({"interval": 0}, r"interval and checks >= 1.*interval=0"),
        ({"steps": 2.5}, r"whole numbers, got steps=2\.5"),
        ({"steps": math.inf}, r"whole numbers, got steps=inf"),
        ({"interval": 1.5}, r"whole numbers, .*interval=1\.5"),
        ({"checks": "4"}, r"whole numbers, .*checks='4'"),
        ({"sparsity": {"atn": 1.0}}, r"sparsity: .*'atn'; did you mean 'attn'\?"),
        ({"sparsity": {"attn": "1e-3"}}, r"sparsity: attn: expected a finite number >= 0, got '1e-3'"),
        ({"sparsity": {"mlp": math.nan}}, r"sparsity: mlp: expected a finite number >= 0, got nan"),
        ({"sparsity": {"mlp": -1.0}}, r"sparsity: mlp: expected a finite number >= 0, got -1\.0"),
    ],
)
def test_a_bad_option_is_refused_before_the_model_is_touched(make_model, options, message):
    model = make_model()
    with pytest.raises(UpopError, match=message):
        Search(model, **{"target": HALF, "steps": 3, **options})
    assert not any("forward" in vars(m) for m in model.modules())


def test_whatever_fails_while_a_search_is_made_leaves_the_model_untouched(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr("upop.search.Scores", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Search(model, target=HALF, steps=3)
    assert not any("forward" in vars(m) for m in model.modules())


def test_steps_may_be_a_whole_number_of_any_type(make_model):
    search = Search(make_model(), target=HALF, steps=3.0, interval=np.int64(2))
    for now in random_gradients(search.structures, 3):
        feed(search, now)
    assert search.done
    assert all(bool(((v == 0) | (v == 1)).all()) for v in values(search).values())


@pytest.mark.parametrize("unit", ["params", "prunable", "macs"])
@pytest.mark.parametrize("method", ["progressive", "mask"])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_ratio_that_a_uniform_method_says_is_reachable_is(make_model, unit, method, layers):
    model = make_model(width=96, heads=3, layers=layers)
    cost = find_cost(model, find_structures(model), Target(**{unit: 0.5}).currency)
    # Just what the ranking of all kinds together could give.
    target = Target(**{unit: removable(cost) / (cost.prunable if unit == "prunable" else cost.dense)})
    with pytest.raises(TargetError, match="the same ratio in every kind") as refused:
        Search(model, target=target, steps=3, method=method)
    most = float(re.search(rf"reachable is {unit}=([0-9.]+),", str(refused.value))[1])
    Search(model, target=Target(**{unit: most}), steps=3, method=method).detach()
    with pytest.raises(TargetError):
        Search(model, target=Target(**{unit: most + 1e-4}), steps=3, method=method)


@pytest.mark.parametrize("align", [{}, {"mlp": 8}], ids=["any width", "aligned"])
@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("dims", "mlp")], ids=",".join)
@pytest.mark.parametrize("method", ["upop", "taylor"])
def test_a_step_never_waits_for_an_accelerator(make_model, kinds, align, method):
    # On the meta device, whatever would ask for a number (item, cpu, nonzero, if) raises.
    with torch.device("meta"):
        model = make_model(heads=4, width=192, layers=3)
    search = Search(model, target=HALF, steps=50, structures=kinds, align=align, method=method)
    search.steps_done = 1  # the first step, like each twentieth, looks whether all is finite
    for _ in range(3):
        search.penalty().backward()
        for mask in search.masks.values.values():
            mask.grad = torch.empty_like(mask)
        search.step()
    assert search.steps_done == 4
    with pytest.raises((NotImplementedError, RuntimeError)):
        search.keep()


def test_targets_and_kinds_may_be_given_as_on_the_command_line(make_model):
    search = Search(make_model(), target="params=0.5", structures="attn, mlp", steps=3)
    assert (search.target, {s.kind for s in search.structures}) == (Target(params=0.5), {"attn", "mlp"})
    with pytest.raises(UpopError, match=r"structures: expected some of .*, got 'foo'"):
        Search(make_model(), target="params=0.5", structures="attn,foo", steps=3)
    with pytest.raises(TargetError, match=r"target: expected upop.Target\(params=0.5\), its text .*, got 0.5"):
        Search(make_model(), target=0.5, steps=3)


@pytest.mark.parametrize("options", [{"align": {"mlp": 4}}, {"structures": ("dims", "mlp")}])
def test_a_threshold_refuses_units_that_fall_together(make_model, options):
    with pytest.raises(TargetError, match=r"threshold: decides on each unit by itself; leave out align"):
        Search(make_model(), target=None, threshold=0.0, steps=3, **options)


def test_an_align_for_a_kind_that_is_not_ranked_is_refused(make_model):
    with pytest.raises(UpopError, match=r"align: expected one of attn, mlp, got 'dims'"):
        Search(make_model(), target=HALF, steps=3, align={"dims": 8})


# ---------------------------------------------------------------- steps that are left out


@pytest.mark.parametrize("options", [{}, {"gradient_order": "authors"}, {"method": "taylor", "shrink": "progressive"}])
def test_a_skipped_step_counts_and_adds_nothing_to_the_scores(make_model, options):
    gradients = random_gradients(Search(make_model(), target=HALF, steps=5).structures, 5)
    search = Search(make_model(), target=HALF, steps=5, **options)
    feed(search, gradients[0])
    before = search.state_dict()
    for name, mask in search.masks.values.items():
        mask.grad = torch.full_like(mask, math.nan) if name == "mlp.1" else torch.ones_like(mask)
    assert not search.finite()
    search.penalty().backward()
    search.skip()
    after = search.state_dict()
    assert after["steps_done"] == 2
    assert after["ratio"] > before["ratio"], "masks go on along the schedule"
    assert equal(before["scores"], after["scores"])
    assert search.finite()
    for now in gradients[2:]:
        feed(search, now)
    assert search.done
    assert set(torch.cat(list(values(search).values())).tolist()) == {0.0, 1.0}
    search.skip()
    assert search.steps_done == 5


def test_cleared_gradients_are_as_if_there_had_been_no_backward(make_model):
    one, other = (Search(make_model(), target=HALF, steps=3) for _ in range(2))
    gradients = random_gradients(one.structures, 3)
    for mask in other.masks.values.values():
        mask.grad = torch.full_like(mask, math.inf)
    other.penalty().backward()
    other.clear()
    for now in gradients:
        feed(one, now)
        feed(other, now)
    assert equal(one.state_dict()["scores"], other.state_dict()["scores"])


@pytest.mark.parametrize("method", ["mask", "unified"])
def test_masks_that_no_optimizer_trains_are_found_out_before_the_search_is_over(make_model, images, method):
    loop = Loop(make_model(), images, steps=4, method=method)
    with pytest.raises(UpopError, match=r"step\(\): after 3 steps no mask has moved.*trained_masks\(\) to the"):
        loop.run()
    long = Loop(make_model(), images, steps=100, method=method)
    with pytest.raises(UpopError, match="after 20 steps no mask has moved"):
        long.run()


@pytest.mark.parametrize("method", ["mask", "unified"])
def test_masks_that_nobody_trains_are_found_out_by_an_early_end_too(make_model, images, method):
    loop = Loop(make_model(), images, method=method)
    loop.run(0, 3)
    with pytest.raises(UpopError, match="after 3 steps no mask has moved"):
        loop.search.finish()


def test_masks_that_move_slowly_in_a_long_warm_up_are_trained(make_model):
    search = Search(make_model(), target=HALF, steps=100_000, method="unified")
    for step in range(25):
        feed(search, {s.name: torch.ones(s.units) for s in search.structures})
        for mask in search.trained_masks():
            mask.data -= 1e-9 * step  # which float32 rounds away beside 1
    assert search.steps_done == 25


def test_numbers_of_numpy_are_saved_as_plain_ones(make_model, images):
    options = {"sparsity": {"attn": np.float32(0.5), "mlp": np.float64(0.1)}, "seed": np.int64(3)}
    loop = Loop(make_model(), images, target=Target(params=np.float32(0.3)), max_drop=np.float64(0.5), **options)
    loop.search.observe(np.float64(0.9))
    loop.run(0, 1)
    closed = Search(make_model(), target=None, steps=3, threshold=np.float32(0.5), **options)
    for search in (loop.search, closed):
        state, file = search.state_dict(), io.BytesIO()
        tensors = ("scores", "keep", "masks")
        json.dumps({key: value for key, value in state.items() if key not in tensors})
        torch.save(state, file)
        file.seek(0)
        search.load_state_dict(torch.load(file, weights_only=True))


def test_a_threshold_that_is_no_number_is_refused(make_model):
    with pytest.raises(TargetError, match="threshold: expected a number, got nan"):
        Search(make_model(), target=None, steps=3, threshold=math.nan)


def test_a_model_that_another_search_masks_too_is_not_slimmed_by_halves(make_model):
    model = make_model()
    attn, mlp = (Search(model, target=HALF, steps=1, structures=kind) for kind in ("attn", "mlp"))
    for search in (attn, mlp):
        feed(search, random_gradients(search.structures, 1)[0])
    with pytest.raises(ModelError, match=r"layers\.0.*: masked by another search; .*upop\.slim\(model, \{\*\*"):
        attn.slim()
    both = upop.slim(model, {**attn.keep(), **mlp.keep()})
    mlp.detach()
    assert parameters(both) < parameters(attn.slim())


def test_a_search_that_is_finished_early_goes_back_to_what_was_accepted(make_model, images):
    loop = Loop(make_model(), images, steps=8, target=None, max_drop=0.01, checks=4)
    search = loop.search
    search.observe(0.9)
    loop.run(stop=2)
    search.observe(0.9)
    accepted = search.ratio
    loop.run(start=2, stop=4)
    assert search.ratio > accepted > 0
    search.observe(0.1)
    search.finish()
    assert search.ratio == accepted
    assert removed_cost(search.structures, search.keep()) <= 1.05 * accepted * prunable_cost(search.structures)
    assert equal(values(search), {name: k.float() for name, k in search.keep().items()})


def test_where_only_an_accuracy_is_missing_slim_asks_for_that(make_model, images):
    loop = Loop(make_model(), images, steps=2, target=None, max_drop=0.01, checks=1)
    loop.search.observe(0.9)
    loop.run()
    with pytest.raises(UpopError, match=r"^Search\.slim\(\): an accuracy is due .*; call observe\(accuracy\)"):
        loop.search.slim()


def test_a_state_that_was_loaded_is_nobody_elses(make_model, images):
    def search():
        return Search(make_model(), target=None, max_drop=0.01, steps=2, checks=1)

    first = search()
    state = first.state_dict()
    first.load_state_dict(state)
    first.observe(0.9)
    other = search()
    other.load_state_dict(state)
    assert other.needs_accuracy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Search("model", target=HALF, steps=2), r"expected a torch\.nn\.Module, got str"),
        (lambda m: Search(m, target=HALF, steps=2, align=8), r"^align: expected multiples by kind, .* got 8"),
        (lambda m: Search(m, target=Target(params=[0.5]), steps=2), r"^target .* got list"),
        (lambda m: Search(m, target=HALF, steps=2).load_state_dict({}), r"expected what Search\.state_dict\(\) gives"),
        (lambda m: upop.analyze(m, align={"mpl": 8}), r"^align: expected kinds among attn, mlp, got 'mpl'"),
        (lambda m: upop.analyze(m, align={"mlp": 0}), r"^align: mlp: expected a whole number"),
        (lambda m: upop.slim(m, {s.name: [True] * s.units for s in find_structures(m)}), r"got list$"),
    ],
)
def test_what_is_no_input_at_all_is_refused_in_a_line(make_model, call, message):
    with pytest.raises(UpopError, match=message) as caught:
        call(make_model())
    assert "\n" not in str(caught.value)


def test_multiples_may_be_whole_numbers_of_any_type(make_model):
    assert Search(make_model(), target=HALF, steps=2, align={"mlp": np.int64(8)}).align == {"mlp": 8}
