"""Promises of upop.masks: the identity at 1, no trace after detach, the gradients of masked activations."""

import copy
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from upop.errors import ModelError
from upop.families import find_structures
from upop.masks import Masks
from upop.slim import slim

NAMES = ["vit", "deit", "teacher"]


def attach(model):
    return Masks(model, find_structures(model))


def producers(model):
    """(structure, repeats over heads, module) of every masked Linear."""
    return [(s, port.outer, model.get_submodule(port.path)) for s in find_structures(model) for port in s.producers]


def masked_activations(model, values):
    """Mask by multiplying activations, with forward hooks: the reference. Returns the hooks."""
    return [
        module.register_forward_hook(lambda _m, _i, out, name=s.name, heads=heads: out * values[name].repeat(heads))
        for s, heads, module in producers(model)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_one_are_the_identity_bit_for_bit(make_model, images, logits_of, name, attention):
    model = make_model(name, attention=attention)
    before = logits_of(model, images())
    attach(model)
    assert torch.equal(logits_of(model, images()), before)


def test_names_parameters_and_state_dict_stay_while_masks_are_attached(make_model):
    model = make_model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()]
    classes = [type(m) for m in model.modules()]
    attach(model).set_({s.name: torch.zeros(s.units) for s in find_structures(model)})
    assert ([n for n, _ in model.named_parameters()], [n for n, _ in model.named_modules()]) == names
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_detaching_leaves_no_trace_and_restores_outputs_bit_for_bit(make_model, images, logits_of):
    model = make_model()
    before, traces = logits_of(model, images()), [dict(vars(m)) for m in model.modules()]
    masks = attach(model)
    masks.set_({s.name: torch.full((s.units,), 0.3) for s in find_structures(model)})
    assert not torch.allclose(logits_of(model, images()), before, atol=1e-2)
    masks.detach()
    assert torch.equal(logits_of(model, images()), before)
    assert [list(vars(m)) for m in model.modules()] == [list(trace) for trace in traces]
    assert all(vars(m)[k] is trace[k] for m, trace in zip(model.modules(), traces, strict=True) for k in trace)


def test_a_second_set_of_masks_is_refused_until_the_first_is_detached(make_model):
    model = make_model()
    first = attach(model)
    with pytest.raises(ModelError, match=r"^vit\.layers\.0\.attention\.q_proj: .*already replaced.*detach that first"):
        attach(model)
    first.detach()
    second = attach(model)
    first.detach()
    assert "forward" in vars(model.vit.layers[0].mlp.fc1), "detaching twice must not take off another's masks"
    second.detach()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, 0.3, 0.0, "mixed"])
def test_outputs_and_gradients_equal_those_of_multiplied_activations(make_model, images, name, value):
    model, x = make_model(name, dtype=torch.float64), images(dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    choices = torch.tensor([1.0, 0.3, 0.0]) if value == "mixed" else torch.tensor([value])
    values = {
        s.name: choices[torch.randint(len(choices), (s.units,), generator=generator)] for s in find_structures(model)
    }
    labels = torch.tensor([1, 2, 3, 4])

    reference = {key: v.double().requires_grad_() for key, v in values.items()}
    hooks = masked_activations(model, reference)
    expected = model(x).logits
    torch.nn.functional.cross_entropy(expected, labels).backward()
    weights = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for hook in hooks:
        hook.remove()

    masks = attach(model)
    masks.set_(values)
    found = model(x).logits
    torch.nn.functional.cross_entropy(found, labels).backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for key, gradient in masks.gradients().items():
        wanted = reference[key].grad
        scale = float(wanted.abs().max())
        assert value == 0 or scale > 1e-4
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-5 * scale + 1e-12)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[key], rtol=1e-9, atol=1e-12)


def test_gradients_of_several_backwards_add_up_and_are_cleared_when_taken(make_model, images):
    model = make_model(dtype=torch.float64)
    masks = attach(model)
    assert masks.gradients() is None
    x = images(dtype=torch.float64)
    parts = []
    for half in (x[:2], x[2:]):
        model(half).logits.square().sum().backward()
        parts.append(masks.gradients())
    assert masks.gradients() is None
    for half in (x[:2], x[2:]):
        model(half).logits.square().sum().backward()
    for key, total in masks.gradients().items():
        torch.testing.assert_close(total, parts[0][key] + parts[1][key])


def test_frozen_weights_still_give_mask_gradients(make_model, images):
    model = make_model().requires_grad_(False)
    masks = attach(model)
    model(images()).logits.square().sum().backward()
    assert all(bool((g != 0).any()) for g in masks.gradients().values())


def test_bfloat16_models_stay_bfloat16_with_float32_masks_and_gradients(make_model, images):
    model = make_model(dtype=torch.bfloat16)
    masks = attach(model)
    logits = model(images(dtype=torch.bfloat16)).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert {v.dtype for v in masks.values.values()} == {torch.float32}
    assert {g.dtype for g in masks.gradients().values()} == {torch.float32}


def test_setting_values_keeps_the_tensors(make_model):
    model = make_model()
    masks = attach(model)
    tensors = dict(masks.values)
    masks.set_({s.name: torch.zeros(s.units) for s in find_structures(model)})
    assert all(masks.values[key] is tensor and not tensor.any() for key, tensor in tensors.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_masks_hold_under_autocast_and_gradient_checkpointing(make_model, images):
    model = make_model().train()
    values = {s.name: torch.linspace(0, 1, s.units) for s in find_structures(model)}

    def gradients(checkpointing):
        own = copy.deepcopy(model)
        if checkpointing:
            own.gradient_checkpointing_enable()
        masks = attach(own)
        masks.set_(values)
        with torch.autocast("cpu", torch.bfloat16):
            loss = own(images()).logits.float().square().sum()
        loss.backward()
        return masks.gradients()

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


def _kept_bytes(model, pixels):
    """What a forward pass leaves allocated for its backward."""
    model(pixel_values=pixels)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        output = model(pixel_values=pixels)
    events = profile.profiler.kineto_results.events()
    del output
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_no_second_copy_of_the_weights_is_kept_for_backward(make_model, images):
    model = make_model("vit").train()
    plain = _kept_bytes(model, images())
    structures = find_structures(model)
    Masks(model, structures)
    paths = {port.path for s in structures for port in s.producers}
    weights = sum(model.get_submodule(path).weight.nbytes for path in paths)
    assert _kept_bytes(model, images()) - plain < 0.1 * weights


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_frees_what_it_frees_without_masks(make_model, images, reentrant):
    def kept(masked):
        model = make_model(layers=3).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if masked:
            Masks(model, find_structures(model))
        linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
        seen = []
        for module in linears:
            module.register_forward_pre_hook(lambda _, x: seen.append(StorageWeakRef(x[0].untyped_storage())))
        output = model(pixel_values=images().requires_grad_()).logits
        assert len(seen) == len(linears)
        alive = sum(not each.expired() for each in seen)
        output.sum().backward()
        return alive

    assert kept(masked=True) == kept(masked=False)


def test_what_is_kept_for_backward_may_go_elsewhere_with_masks_on(make_model, images):
    def seen(masked):
        model, places = make_model().train(), []
        if masked:
            Masks(model, find_structures(model))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: places.append(x.shape) or x, lambda x: x):
            loss = model(pixel_values=images()).logits.sum()
        loss.backward()
        return Counter(places)

    assert not seen(masked=False) - seen(masked=True)


def test_a_copy_is_masked_as_the_model_is_until_the_masks_come_off(make_model, images, logits_of):
    """AveragedModel copies the model at the start and averages weights from then on; masks are decided later."""
    model = make_model()
    dense = logits_of(model, images())
    masks = attach(model)
    average = torch.optim.swa_utils.AveragedModel(model).module
    masks.set_({s.name: (torch.arange(s.units) % 2).float() for s in find_structures(model)})
    assert torch.equal(logits_of(average, images()), logits_of(model, images()))
    assert not torch.allclose(logits_of(average, images()), dense, atol=1e-2)
    keep = {s.name: torch.arange(s.units) % 2 == 1 for s in find_structures(model)}
    torch.testing.assert_close(logits_of(slim(average, keep), images()), logits_of(average, images()))
    masks.detach()
    assert torch.equal(logits_of(average, images()), dense)
    again = attach(average)
    again.set_({s.name: torch.zeros(s.units) for s in find_structures(average)})
    assert not torch.allclose(logits_of(average, images()), dense, atol=1e-2)
    again.detach()


def test_functional_transforms_see_masked_weights(make_model, images):
    model = make_model()
    masks = attach(model)
    masks.set_({s.name: torch.full((s.units,), 0.5) for s in find_structures(model)})
    labels = torch.arange(8) % 10

    def loss(parameters):
        logits = torch.func.functional_call(model, parameters, (images(8),)).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    torch.nn.functional.cross_entropy(model(images(8)).logits, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
