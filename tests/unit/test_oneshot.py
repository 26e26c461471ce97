"""One-shot scores: what they mean, which end goes first, and that the model is left as it is."""

import copy

import pytest
import torch
from family_models import make_stand_in
from torch.nn import functional as F

from upop.compensate import input_moments
from upop.criteria import weight_norms
from upop.errors import TrainingError, UpopError
from upop.families import find_structures
from upop.masks import Masks
from upop.oneshot import SCORES, lost_variance, rank
from upop.ranking import normalise, select
from upop.slim import slim
from upop.structures import prunable_cost


@pytest.fixture
def batches(images):
    return [(images(6, seed=seed), torch.arange(6) % 10) for seed in range(3)]


@pytest.fixture(params=["vit", "fused qkv"])
def model(request, make_model):
    return make_model("vit") if request.param == "vit" else make_stand_in()


def logits(model, x):
    found = model(x)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("score", SCORES)
def test_every_unit_gets_a_score_and_the_model_keeps_everything(model, batches, score):
    structures = find_structures(model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    found = rank(model, structures, iter(batches), score=score)
    assert {name: value.shape for name, value in found.items()} == {s.name: (s.units,) for s in structures}
    assert all(value.dtype == torch.float64 and value.isfinite().all() for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert model.training
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    again = rank(model, structures, iter(batches), score=score)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    select(structures, normalise(structures, found), 0.3 * prunable_cost(structures))


@pytest.mark.parametrize("score", ["taylor", "gradient"])
def test_where_memory_is_short_a_batch_is_ranked_in_parts_to_the_same_scores(batches, score):
    model = make_stand_in(dtype=torch.float64)
    structures, data = find_structures(model), [(x.double(), y) for x, y in batches]
    whole = rank(model, structures, data, score=score)

    def short(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with model.register_forward_pre_hook(short):
        found = rank(model, structures, data, score=score)
    for name, value in whole.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-9)  # the loss is in float32


def test_gradient_is_the_slope_of_the_loss_when_a_mask_rises(batches):
    model = make_stand_in(dtype=torch.float64)
    structures, data = find_structures(model), [(x.double(), y) for x, y in batches]
    found = rank(model, structures, data, score="gradient")

    @torch.no_grad()
    def loss(name, unit, value):
        masks = Masks(model, structures)
        masks.values[name][unit] = value
        total = sum(float(F.cross_entropy(logits(model, x), y)) for x, y in data)
        masks.detach()
        return total

    for name, unit in (("attn.0", 3), ("mlp.1", 17)):
        slope = (loss(name, unit, 1.015625) - loss(name, unit, 0.984375)) / 0.03125
        assert float(found[name][unit]) == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_taylor_is_minus_the_size_of_the_gradient_batch_by_batch(model, batches):
    structures = find_structures(model)
    found = rank(model, structures, batches, score="taylor")
    each = [rank(model, structures, [batch], score="gradient") for batch in batches]
    for name, value in found.items():
        torch.testing.assert_close(value, -sum(one[name].abs() for one in each))


def test_variance_is_the_squared_error_that_the_best_bias_leaves(batches):
    model = make_stand_in()
    structures = find_structures(model)
    found = rank(model, structures, batches, score="variance")
    rows = []
    handle = model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    handle.remove()
    inputs = torch.cat(rows).double()
    given = inputs[:, 5:6] * model.blocks[0].mlp.fc2.weight[:, 5].detach().double()
    lost = (given - given.mean(0)).square().sum(1).mean()
    assert -float(found["mlp.0"][5]) == pytest.approx(float(lost), rel=1e-4)


@torch.no_grad()
def test_units_that_do_nothing_go_first_and_constant_ones_too_by_variance(model, batches):
    structures = find_structures(model)
    s = structures[1]
    assert s.kind == "mlp"
    fc1, fc2 = model.get_submodule(s.producers[0].path), model.get_submodule(s.consumers[0].path)
    fc1.weight[7], fc1.bias[7], fc2.weight[:, 7] = 0.0, 0.0, 0.0
    fc1.weight[9], fc1.bias[9] = 0.0, 5.0
    for score in ("taylor", "variance", "magnitude"):
        assert int(rank(model, structures, batches, score=score)[s.name].argmax()) in (7, 9), score
    variance = rank(model, structures, batches, score="variance")[s.name]
    assert set(variance.topk(2).indices.tolist()) == {7, 9}
    assert int(rank(model, structures, batches, score="taylor")[s.name].argmax()) == 7


def test_magnitude_is_the_smallest_norm_first_and_reads_no_batch(model):
    structures = find_structures(model)
    norms = weight_norms(model, structures)
    found = rank(model, structures, [], score="magnitude")
    assert all(torch.equal(found[name], -norm) for name, norm in norms.items())
    first, other = (rank(model, structures, [], score="random", seed=seed) for seed in (0, 1))
    assert not torch.equal(first["attn.0"], other["attn.0"])


def test_soft_labels_and_frozen_weights_are_ranked_alike(make_model, batches):
    model = make_model("vit")
    structures = find_structures(model)
    soft = [(x, F.one_hot(y, 10).float()) for x, y in batches]
    hard = rank(model, structures, batches)
    model.requires_grad_(False)
    for name, value in rank(model, structures, soft).items():
        torch.testing.assert_close(value, hard[name])


def test_errors_say_what_to_give(make_model, batches):
    model = make_model("vit")
    structures = find_structures(model)
    with pytest.raises(UpopError, match=r"score: expected one of taylor, .*, got 'tailor'; did you mean 'taylor'\?"):
        rank(model, structures, batches, score="tailor")
    with pytest.raises(UpopError, match="score: expected one batch of images and labels or more, got none"):
        rank(model, structures, [])
    with pytest.raises(TrainingError, match=r"score: attn.0: a mask gradient is NaN or infinite"):
        rank(model, structures, [(batches[0][0] * float("nan"), batches[0][1])])
    parts = find_structures(model, ("qk", "v", "mlp"))
    with pytest.raises(UpopError, match=r"score variance: qk.0: no layer reads these units .*; use taylor"):
        lost_variance(model, parts, input_moments(model, parts, [batches[0][0]]))
    taylor = rank(model, parts, batches)
    assert {name.partition(".")[0] for name in taylor} == {"qk", "v", "mlp"}
    small = slim(model, select(parts, taylor, 0.3 * prunable_cost(parts)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
