"""Compensation: exact where it can be, the least squared error elsewhere, nothing where nothing was lost."""

import copy
import logging

import pytest
import torch
from family_models import make_hf, make_stand_in
from torch.nn import functional as F

from upop.compensate import Moments, cut_and_compensate_, input_moments
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.masks import Masks
from upop.slim import slim
from upop.structures import Port, make_structure

HOWS = ["mean", "least-squares"]
MODELS = {
    "vit": lambda make_model: make_model("vit"),
    "fused qkv": lambda make_model: make_stand_in(),
    "fused qkv, LayerScale": lambda make_model: scaled(make_stand_in(layer_scale=True)),
}


def scaled(model):
    """With scales at which the branches matter."""
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            torch.nn.init.uniform_(scale.gamma, 0.3, 1.7)
    return model


@pytest.fixture(params=MODELS)
def model(request, make_model):
    return MODELS[request.param](make_model)


def outputs(model, x):
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def inputs_of(model, path, batches):
    """Rows [images * tokens, I], float64, that reach the Linear at `path`."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    for x in batches:
        outputs(model, x)
    handle.remove()
    return torch.cat([each.flatten(0, 1) for each in rows]).double()


def compensated(model, keep, batches, how, **options):
    structures = find_structures(model)
    moments = input_moments(model, structures, batches, covariance=True)
    whole = copy.deepcopy(model)
    cut_and_compensate_(whole, structures, keep, moments, how=how, **options)
    small = slim(whole, keep)
    # In bfloat16 products of other sizes may round otherwise, on CPUs with matrix tiles: by a few of its steps.
    atol = 1e-5 if next(model.parameters()).dtype != torch.bfloat16 else 4 * 2**-7
    torch.testing.assert_close(outputs(small, batches[0]), outputs(whole, batches[0]), rtol=0, atol=atol)
    return small


def test_moments_are_those_of_all_images_and_tokens(model, images):
    batches = [images(3), images(2, seed=1)]
    structures = find_structures(model)
    found = input_moments(model, structures, batches, covariance=True)
    light = input_moments(model, structures, iter(batches))
    assert set(found) == set(light) == {port.path for s in structures for port in s.consumers}
    for path, moments in found.items():
        rows = inputs_of(model, path, batches)
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(moments.covariance, torch.cov(rows.T, correction=0), rtol=0, atol=1e-5)
        torch.testing.assert_close(moments.variance, moments.covariance.diagonal())
        torch.testing.assert_close(light[path].variance, moments.variance, rtol=0, atol=1e-5)
        assert torch.equal(light[path].mean, moments.mean)
        assert light[path].covariance is None


@torch.no_grad()
def silence_(model, structure, units):
    """Units whose input to the consumer is the same for all images: their producers see nothing of the image."""
    chosen = torch.zeros(structure.units, dtype=torch.bool).index_fill_(0, units, True)
    for port in structure.producers:
        rows = port.expand(chosen)
        module = model.get_submodule(port.path)
        module.weight[rows] = 0.0
        if structure.kind == "attn":
            # Queries and keys of 0 give nothing to the logits, which nothing could put back.
            values = len(rows) // (3 if len(structure.producers) == 1 else 1)
            is_value = len(structure.producers) == 1 or port is structure.producers[-1]
            module.bias[rows & (torch.arange(len(rows)) < len(rows) - (values if is_value else 0))] = 0.0
    return ~chosen


@pytest.mark.parametrize("how", HOWS)
def test_units_that_are_constant_are_removed_without_a_trace(model, images, how):
    keep = {s.name: silence_(model, s, torch.arange(1, s.units, 3)) for s in find_structures(model)}
    batches = [images(4)]
    whole, other = outputs(model, images(2, seed=7)), slim(model, keep)
    small = compensated(model, keep, batches, how)
    torch.testing.assert_close(outputs(small, images(2, seed=7)), whole, rtol=0, atol=2e-5)
    assert (outputs(other, images(2, seed=7)) - whole).abs().max() > 1e-2, "without it they leave one"


def squared_error(model, small, path, kept, rows):
    """Mean squared error of the consumer's output for inputs that nothing before it has changed."""
    whole, cut = model.get_submodule(path), small.get_submodule(path)
    with torch.no_grad():
        expected = F.linear(rows, whole.weight.double(), whole.bias.double())
        return float((F.linear(rows[:, kept], cut.weight.double(), cut.bias.double()) - expected).square().mean())


def test_no_other_bias_has_less_squared_error_at_the_calibration_images(model, images, random_keep):
    structures = find_structures(model)
    keep, batches = random_keep(structures), [images(4)]
    small = compensated(model, keep, batches, "mean")
    generator = torch.Generator().manual_seed(0)
    for s in structures:
        (port,) = s.consumers
        kept, rows = port.expand(keep[s.name]), inputs_of(model, port.path, batches)
        least = squared_error(model, small, port.path, kept, rows)
        bias = small.get_submodule(port.path).bias
        for size in (1e-2, 1e-1, 1.0):
            other = copy.deepcopy(small)
            noise = size * torch.randn(len(bias), generator=generator)
            other.get_submodule(port.path).bias.data += noise
            more = squared_error(model, other, port.path, kept, rows)
            assert more == pytest.approx(least + float(noise.square().mean()), rel=1e-3), "a parabola, and its bottom"


def test_least_squares_is_the_regression_on_the_kept_inputs(model, images, random_keep):
    structures = find_structures(model)
    keep, batches = random_keep(structures), [images(32, seed=seed) for seed in range(2)]
    cut = slim(model, keep)
    mean = compensated(model, keep, batches, "mean")
    least = compensated(model, keep, batches, "least-squares", ridge=1e-9)
    for s in structures:
        (port,) = s.consumers
        whole, kept, rows = (
            model.get_submodule(port.path),
            port.expand(keep[s.name]),
            inputs_of(model, port.path, batches),
        )
        errors = [squared_error(model, each, port.path, kept, rows) for each in (least, mean, cut)]
        assert errors == sorted(errors)
        wanted = F.linear(rows, whole.weight.double(), whole.bias.double()).detach()
        ones = torch.cat([rows[:, kept], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(ones, wanted).solution
        assert errors[0] == pytest.approx(float((ones @ best - wanted).square().mean()), rel=1e-3, abs=1e-9)


def test_a_large_ridge_leaves_the_columns_and_compensates_the_mean(model, images, random_keep):
    keep, batches = random_keep(find_structures(model)), [images(4)]
    ridged = compensated(model, keep, batches, "least-squares", ridge=1e12)
    mean = compensated(model, keep, batches, "mean")
    for a, b in zip(ridged.parameters(), mean.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_units_masked_to_nothing_leave_nothing_to_put_back_bit_for_bit(model, images, random_keep, how):
    structures = find_structures(model)
    keep = random_keep(structures)
    masks = Masks(model, structures)
    masks.set_({name: stays.float() for name, stays in keep.items()})
    plain, small = slim(model, keep), compensated(model, keep, [images(4)], how)
    masks.detach()
    for (name, a), b in zip(plain.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("how", HOWS)
def test_the_model_stays_as_it_was(model, images, random_keep, how):
    before = copy.deepcopy(model.state_dict())
    first = next(iter(model.children()))
    model.train()
    first.eval()
    modes = [module.training for module in model.modules()]
    compensated(model, random_keep(find_structures(model)), [images(4)], how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", HOWS)
def test_nothing_removed_changes_nothing(model, images, how):
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in find_structures(model)}
    pairs = zip(model.parameters(), compensated(model, keep, [images(2)], how).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("how", HOWS)
def test_what_is_gone_already_gives_nothing_more(model, images, random_keep, how):
    """Cut in two rounds: the second has nothing to make up for but what goes in it."""
    structures, batches = find_structures(model), [images(4)]
    first = random_keep(structures)
    whole = copy.deepcopy(model)
    for _ in range(2):
        moments = input_moments(whole, structures, batches, covariance=True)
        before = copy.deepcopy(whole)
        cut_and_compensate_(whole, structures, first, moments, how=how)
    for (name, a), b in zip(whole.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_consumer_without_bias_takes_up_what_its_columns_can(make_model, images, random_keep, caplog):
    model = make_model("vit")
    path = "vit.layers.0.mlp.fc2"
    model.get_submodule(path).bias = None
    structures, batches = find_structures(model), [images(16)]
    keep = random_keep(structures)
    moments = input_moments(model, structures, batches, covariance=True)
    mean, least = copy.deepcopy(model), copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        cut_and_compensate_(mean, structures, keep, moments, how="mean")
    assert caplog.messages == [f"{path}: has no bias to take up the mean of what is removed; left as it is"]
    rows, weight = inputs_of(model, path, batches), model.get_submodule(path).weight.detach().double()
    kept = keep["mlp.0"]
    assert torch.equal(mean.get_submodule(path).weight[:, kept].double(), weight[:, kept])
    cut_and_compensate_(least, structures, keep, moments, ridge=1e-9)
    assert least.get_submodule(path).bias is None
    best = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
    found = least.get_submodule(path).weight[:, kept].detach().double()
    torch.testing.assert_close(rows[:, kept] @ found.T, rows[:, kept] @ best.T, atol=1e-3, rtol=0)


def test_a_dropped_block_is_not_made_up_for_and_the_others_are(make_model, images, random_keep):
    model = make_model("vit", layers=3)
    structures = find_structures(model, ("attn", "mlp", "block"))
    keep = random_keep(structures) | {f"block.{n}": torch.tensor([n != 1]) for n in range(3)}
    moments = input_moments(model, structures, [images(4)])
    whole = copy.deepcopy(model)
    cut_and_compensate_(whole, structures, keep, moments, how="mean")
    small = slim(whole, keep)
    assert len(small.vit.layers) == 2
    torch.testing.assert_close(outputs(small, images(2)), outputs(whole, images(2)), rtol=0, atol=1e-5)
    fc2 = model.vit.layers[2].mlp.fc2
    lost = (fc2.weight.double() * ~keep["mlp.2"]) @ moments["vit.layers.2.mlp.fc2"].mean
    torch.testing.assert_close(small.vit.layers[1].mlp.fc2.bias.double(), fc2.bias.double() + lost, atol=1e-6, rtol=0)


def test_structures_that_share_a_consumer_lose_each_column_once(make_model, images):
    model = make_hf("vit")
    structures = find_structures(model, ("head", "dims"))
    keep = {s.name: torch.arange(s.units) % 4 > 0 for s in structures}
    keep |= {s.name: torch.tensor([False, True]) for s in structures if s.kind == "head"}
    kept = torch.arange(64) >= 32
    kept &= torch.arange(64) % 4 > 0
    moments = input_moments(model, structures, [images(4)], covariance=True)
    path, whole = "vit.layers.0.attention.o_proj", copy.deepcopy(model)
    o = model.get_submodule(path)
    cut_and_compensate_(whole, structures, keep, moments, how="mean")
    lost = (o.weight.double() * ~kept) @ moments[path].mean
    torch.testing.assert_close(whole.get_submodule(path).bias.double(), o.bias.double() + lost, atol=1e-6, rtol=0)
    assert torch.equal(whole.get_submodule(path).weight, o.weight * kept)


def test_a_model_in_bfloat16_is_shifted_in_its_own_precision(make_model, images, random_keep):
    exact, rounded = make_model("vit"), make_model("vit", dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    keep = random_keep(find_structures(exact))
    small = compensated(rounded, keep, [images(4, dtype=torch.bfloat16)], "least-squares")
    wanted = compensated(exact, keep, [images(4)], "least-squares")
    for a, b in zip(small.parameters(), wanted.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.15)


def test_errors_say_what_is_missing(make_model, images, random_keep):
    model = make_model("vit")
    structures = find_structures(model)
    keep = random_keep(structures)
    with pytest.raises(UpopError, match="compensation: expected one batch of images or more, got none"):
        input_moments(model, structures, [])
    light = input_moments(model, structures, [images(2)])
    with pytest.raises(UpopError, match=r"o_proj: least-squares needs moments with covariance=True"):
        cut_and_compensate_(copy.deepcopy(model), structures, keep, light)
    with pytest.raises(UpopError, match="compensation: expected mean or least-squares, got 'median'"):
        cut_and_compensate_(model, structures, keep, light, how="median")
    model.vit.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(ModelError, match=r"vit.layers.1.mlp.fc2: no image has reached it; .* torch.compile"):
        input_moments(model, structures, [images(2)])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_that_are_all_nothing_are_no_obstacle():
    layer = torch.nn.Linear(4, 2)
    structure = make_structure(layer, kind="mlp", layer=0, units=4, producers=[], consumers=[Port("")])
    nothing = Moments(*(torch.zeros(size, dtype=torch.float64) for size in (4, 4, (4, 4))))
    keep = {"mlp.0": torch.tensor([True, True, False, False])}
    before = copy.deepcopy(layer)
    cut_and_compensate_(layer, [structure], keep, {"": nothing})
    assert torch.equal(layer.weight, before.weight * torch.tensor([1, 1, 0, 0]))
    assert torch.equal(layer.bias, before.bias)
