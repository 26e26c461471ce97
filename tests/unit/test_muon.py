"""Muon in batches: torch's own Muon, matrix by matrix, is what it must come to."""

import copy

import pytest
import torch
from torch import nn

from upop.muon import Muon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (24, 8), (8, 8)]


def matrices(seed=0):
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=source)) for shape in SHAPES]


def give_gradients(parameters, seed):
    source = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=source)


@pytest.fixture(params=["by shape", "together"])
def batched_as(request, monkeypatch):
    """As on a CPU, or as on an accelerator."""
    if request.param == "together":
        monkeypatch.setattr("upop.muon._batches", lambda matrices: [matrices])


def assert_close(ours, theirs):
    # Newton-Schulz runs in bfloat16: 8 bits, of updates whose entries are below 1 and here multiplied by the rate.
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"nesterov": False},
        {"momentum": 0.5, "ns_steps": 3},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
)
def test_steps_are_those_of_torch(options, batched_as):
    ours, theirs = matrices(), matrices()
    batched, single = Muon(ours, lr=0.02, **options), torch.optim.Muon(theirs, lr=0.02, **options)
    for step in range(4):
        for parameters, optimizer in ((ours, batched), (theirs, single)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_close(ours, theirs)
    assert not torch.allclose(ours[0], matrices()[0], atol=1e-2)  # they moved


def test_an_update_has_singular_values_near_one():
    source = torch.Generator().manual_seed(0)
    some = [torch.randn(shape, generator=source) for shape in ((12, 12), (12, 30), (30, 12), (1, 12), (5, 40))]
    for matrix, update in zip(some, orthogonalised(some, COEFFICIENTS, steps=5, eps=1e-7), strict=True):
        assert update.shape == matrix.shape
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.3
        assert values.median() > 0.6


def in_float64(matrix):
    """Newton-Schulz, written down once more."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = COEFFICIENTS[0] * x + (COEFFICIENTS[1] * a + COEFFICIENTS[2] * a @ a) @ x
    return x


@pytest.mark.parametrize(("has_bf16", "off"), [(True, 0.05), (False, 1e-5)])
def test_bfloat16_is_for_hardware_that_computes_in_it(monkeypatch, has_bf16, off):
    """Where it is emulated, it is ten times as slow as float32, not faster."""
    monkeypatch.setattr("upop.muon.has_bf16", {"cpu": has_bf16}.get)
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    (update,) = orthogonalised([matrix], COEFFICIENTS, steps=5, eps=1e-7)
    error = float((update - in_float64(matrix)).abs().max())
    assert error <= off
    assert has_bf16 == (error > 1e-5)


def test_matrices_of_different_shapes_do_not_change_each_other():
    source = torch.Generator().manual_seed(0)
    some = [torch.randn(shape, generator=source) for shape in ((12, 12), (12, 30), (30, 12), (1, 12), (5, 40))]
    together = orthogonalised(some, COEFFICIENTS, steps=5, eps=1e-7)
    for matrix, update in zip(some, together, strict=True):
        (alone,) = orthogonalised([matrix], COEFFICIENTS, steps=5, eps=1e-7)
        torch.testing.assert_close(update, alone, rtol=0, atol=0.02)  # bfloat16, in another order


def test_state_goes_from_torch_to_ours_and_back():
    theirs = matrices()
    single = torch.optim.Muon(theirs, lr=0.02)
    give_gradients(theirs, 0)
    single.step()
    ours = copy.deepcopy(theirs)
    batched = Muon(ours, lr=0.02)
    batched.load_state_dict(copy.deepcopy(single.state_dict()))
    for parameters, optimizer in ((ours, batched), (theirs, single)):
        give_gradients(parameters, 1)
        optimizer.step()
    assert_close(ours, theirs)
    single.load_state_dict(batched.state_dict())


def test_a_matrix_without_gradient_stays_as_it_is():
    parameters = matrices()
    give_gradients(parameters, 0)
    parameters[3].grad = None
    before = parameters[3].detach().clone()
    Muon(parameters, lr=0.02, weight_decay=0.5).step()
    assert torch.equal(parameters[3], before)


def test_a_shape_costs_the_same_calls_however_many_matrices_have_it():
    def calls(count):
        parameters = [nn.Parameter(torch.randn(8, 24)) for _ in range(count)]
        give_gradients(parameters, 0)
        optimizer = Muon(parameters, lr=0.02)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        names = [event.name for event in profile.events()]
        return sum(name in ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm") for name in names)

    assert calls(2) == calls(6) > 0
