"""Promises of upop.slim: a smaller model with the masked model's outputs; the original stays as it is."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import upop
from upop import Search, Target
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.masks import Masks

NAMES = ["vit", "deit", "teacher"]
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def masked(model, keep):
    masks = Masks(model, find_structures(model))
    masks.set_({name: k.float() for name, k in keep.items()})
    return masks


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES)
def test_slimmed_logits_equal_masked_logits(make_model, images, logits_of, random_keep, size, attention, name):
    width, heads = SIZES[size]
    model = make_model(name, width=width, heads=heads, attention=attention)
    keep = random_keep(find_structures(model))
    masks = masked(model, keep)
    expected, small = logits_of(model, images()), upop.slim(model, keep)
    assert small.config._attn_implementation == attention
    torch.testing.assert_close(logits_of(small, images()), expected, rtol=0, atol=1e-5)
    masks.detach()
    assert (logits_of(model, images()) - expected).abs().max() > 0.1, "the keep must matter"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_slimmed_logits_equal_masked_logits_in_float64(make_model, images, logits_of, random_keep, size, name):
    # sdpa only: transformers' eager attention computes its softmax in float32.
    width, heads = SIZES[size]
    model = make_model(name, width=width, heads=heads, dtype=torch.float64)
    keep, x = random_keep(find_structures(model)), images(2, dtype=torch.float64)
    masked(model, keep)
    torch.testing.assert_close(
        logits_of(upop.slim(model, keep), x), logits_of(model, x), rtol=0, atol=1e-12, check_dtype=True
    )


def test_slimming_to_the_floors_still_equals_masking(make_model, images, logits_of):
    model = make_model(dtype=torch.float64)
    keep = {s.name: torch.arange(s.units) == s.units - 1 for s in find_structures(model)}
    masked(model, keep)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(logits_of(upop.slim(model, keep), x), logits_of(model, x), rtol=0, atol=1e-12)


def test_models_without_qkv_bias_are_slimmed_too(make_model, images, logits_of, random_keep):
    model = make_model(qkv_bias=False, dtype=torch.float64)
    keep, x = random_keep(find_structures(model)), images(dtype=torch.float64)
    masked(model, keep)
    torch.testing.assert_close(logits_of(upop.slim(model, keep), x), logits_of(model, x), rtol=0, atol=1e-12)


def test_the_kept_qkv_biases_are_the_originals(make_model, random_keep):
    # The authors' code assigns `qkv.weight.bias`, so that a random bias trains in its place.
    model = make_model()
    keep = random_keep(find_structures(model))
    small = upop.slim(model, keep)
    for layer in (0, 1):
        rows = keep[f"attn.{layer}"].repeat(2)
        for name in ("q_proj", "k_proj", "v_proj"):
            path = f"vit.layers.{layer}.attention.{name}.bias"
            assert torch.equal(small.get_parameter(path), model.get_parameter(path)[rows])


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_scale_stays_the_originals(make_model, random_keep, name):
    model = make_model(name)
    small = upop.slim(model, random_keep(find_structures(model)))
    attentions = [m for m in small.modules() if hasattr(m, "scaling")]
    assert [(a.scaling, a.head_dim) for a in attentions] == [(32**-0.5, 19)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_every_linears_features_match_its_weight(make_model, random_keep, name):
    model = make_model(name)
    small = upop.slim(model, random_keep(find_structures(model)))
    linears = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert all((m.out_features, m.in_features) == m.weight.shape for m in linears)
    assert all(m.bias.shape == (m.out_features,) for m in linears)
    assert parameters(small) < parameters(model)


def test_the_original_stays_as_it_is(make_model, images, logits_of, random_keep):
    model = make_model()
    logits, state = logits_of(model, images()), copy.deepcopy(model.state_dict())
    config, kind = copy.deepcopy(model.config.to_dict()), type(model)
    upop.slim(model, random_keep(find_structures(model)))
    assert torch.equal(logits_of(model, images()), logits)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert type(model) is kind


@pytest.mark.parametrize("cut", ["some", "nothing"])
def test_the_slimmed_model_shares_no_memory_with_the_original(make_model, random_keep, cut):
    model = make_model()
    structures = find_structures(model)
    keep = random_keep(structures) if cut == "some" else {s.name: torch.ones(s.units) > 0 for s in structures}
    state, small = copy.deepcopy(model.state_dict()), upop.slim(model, keep)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    small.config.id2label[0] = "changed"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config.id2label[0] != "changed"
    assert not set(model.modules()) & set(small.modules())
    assert all(getattr(m, "config", small.config) is small.config for m in small.modules())


def test_masks_attached_to_the_original_are_not_carried_over(make_model, images, logits_of):
    model = make_model()
    unmasked = logits_of(model, images())
    masks = masked(model, {s.name: torch.full((s.units,), 0.3) for s in find_structures(model)})
    small = upop.slim(model, {s.name: torch.ones(s.units) > 0 for s in find_structures(model)})
    assert not any("forward" in vars(m) for m in small.modules())
    assert torch.equal(logits_of(small, images()), unmasked)
    assert not torch.equal(logits_of(model, images()), unmasked), "the original keeps its masks"
    masks.detach()


def test_training_mode_dtype_frozen_weights_and_labels_are_kept(make_model, random_keep):
    model = make_model(labels=2, id2label={0: "cat", 1: "dog"}, dtype=torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" not in name)
    small = upop.slim(model, random_keep(find_structures(model)))
    assert all(m.training for m in small.modules())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert small.config.id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_the_slimmed_model_computes_the_same_loss(make_model, images, random_keep, name):
    model, labels = make_model(name), torch.tensor([0, 1, 2, 3])
    keep = random_keep(find_structures(model))
    masked(model, keep)
    expected = model(images(), labels=labels).loss
    torch.testing.assert_close(upop.slim(model, keep)(images(), labels=labels).loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_slimmed_model_can_be_copied(make_model, images, logits_of, random_keep, name):
    model = make_model(name)
    small = upop.slim(model, random_keep(find_structures(model)))
    twin = copy.deepcopy(small)
    assert torch.equal(logits_of(twin, images()), logits_of(small, images()))
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(logits_of(twin, images()), logits_of(small, images()))


def test_a_slimmed_model_can_be_slimmed_again(make_model, images, logits_of, random_keep):
    small = upop.slim(make_model(dtype=torch.float64), random_keep(find_structures(make_model())))
    keep, x = random_keep(find_structures(small), seed=1), images(dtype=torch.float64)
    masked(small, keep)
    smaller = upop.slim(small, keep)
    assert parameters(smaller) < parameters(small)
    torch.testing.assert_close(logits_of(smaller, x), logits_of(small, x), rtol=0, atol=1e-12)
    assert smaller.config.attn_widths == [int(keep[f"attn.{i}"].sum()) for i in (0, 1)]


def test_a_keep_of_another_model_is_refused_and_nothing_is_touched(make_model, random_keep):
    model = make_model()
    keep = random_keep(find_structures(make_model(layers=3)))
    with pytest.raises(UpopError, match=r"keep\['attn\.2'\]: no such structure"):
        upop.slim(model, keep)
    assert parameters(model) == parameters(make_model())


def test_what_accelerate_left_on_the_model_does_not_follow_into_the_smaller_one(make_model, images):
    model = make_model()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    search = Search(model, target=Target(prunable=0.5), steps=1)
    prepared = accelerator.prepare(model)
    prepared(images()).logits.sum().backward()
    search.step()
    small = search.slim()
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(small))
    assert small(images()).logits.dtype == torch.float32, "no precision of another loop's choosing"


def within_itself(values):
    return values.append(values) or values


@pytest.mark.parametrize(
    ("kept_as", "inside"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: [x], lambda x: x[0]),
        (lambda x: {"at": (1, x)}, lambda x: x["at"][1]),
        (lambda x: within_itself([x]), lambda x: x[0]),
    ],
    ids=["alone", "in a list", "in a dict", "in a list that holds itself"],
)
def test_what_a_hook_keeps_of_the_last_forward_does_not_stand_in_the_way(
    make_model, images, logits_of, random_keep, kept_as, inside
):
    model = make_model()
    keep = random_keep(find_structures(model))
    expected = logits_of(upop.slim(model, keep), images())
    layer = model.vit.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: setattr(module, "seen", kept_as(output)))
    model(images()).logits.sum().backward()
    seen = inside(layer.seen)
    small = upop.slim(model, keep)
    assert torch.equal(inside(small.vit.layers[0].seen), seen)
    assert inside(layer.seen) is seen
    assert torch.equal(logits_of(small, images()), expected)


@pytest.mark.parametrize("keep", [{}, None, []])
def test_nothing_to_keep_is_refused_in_one_line(make_model, keep):
    with pytest.raises(ModelError, match=r"keep: expected structure names with bool \[units\] each, .* got"):
        upop.slim(make_model(), keep)


@pytest.mark.parametrize("path", ["vit.layers.0.attention", "vit.layers.1.mlp.fc1", ""])
def test_a_forward_that_somebody_put_there_is_refused_by_its_path(make_model, path):
    model = make_model()
    module = model.get_submodule(path)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in find_structures(model)}
    for call in (lambda: upop.slim(model, keep), lambda: Search(model, target=Target(params=0.3), steps=1)):
        with pytest.raises(UpopError, match=rf"^{path or type(model).__name__}: expected the forward of its class"):
            call()
