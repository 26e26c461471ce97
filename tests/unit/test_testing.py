"""Promises of upop.testing: a right description passes, and each way to be wrong is one line that says which."""

import copy
from dataclasses import replace

import pytest
import torch
from family_models import make_hf, make_stand_in
from torch import nn

import upop
from upop.errors import ModelError, UpopError
from upop.families import FAMILIES, Family, find_structures, register_family
from upop.structures import Attribute, Port
from upop.testing import check_family

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def misdescribed():
    """`misdescribed(model, change)`: the model, as a family whose structures are changed by `change`."""
    before = list(FAMILIES)

    def make(model, change):
        right = next(f for f in before if f.matches(model))
        register_family(
            Family("wrong", right.matches, lambda m: tuple(change(s) for s in right.find(m)), lambda m: None)
        )
        return model

    yield make
    FAMILIES[:] = before


def change_attn(**fields):
    return lambda s: replace(s, **{k: f(s) for k, f in fields.items()}) if s.kind == "attn" else s


def without_rescaling(s):
    return tuple(replace(port, rescaled=0) for port in s.producers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_description_passes_in_every_dtype(dtype):
    check_family(make_hf("dinov2", dtype=dtype))
    check_family(make_stand_in(dtype=dtype), images=IMAGES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_forgotten_softmax_scale_is_found_in_every_dtype(misdescribed, dtype, fused):
    model = misdescribed(make_stand_in(fused=fused, dtype=dtype), change_attn(producers=without_rescaling))
    with pytest.raises(
        UpopError, match=r"^attn\.\d: expected masked and slimmed outputs to agree to .* softmax scale"
    ):
        check_family(model, images=IMAGES)


def test_a_scale_that_follows_the_width_where_it_must_not_is_found(misdescribed):
    model = misdescribed(
        make_hf("clip"),
        change_attn(attributes=lambda s: (*s.attributes, Attribute(s.attributes[0].path, "scale", 1, -0.5))),
    )
    with pytest.raises(UpopError, match=r"^attn\.\d: expected masked and slimmed outputs to agree"):
        check_family(model)


def test_rows_in_another_order_than_the_model_reads_them_are_found(misdescribed):
    def transposed(s):
        return tuple(Port(p.path, outer=1, inner=p.outer) for p in s.consumers)

    with pytest.raises(UpopError, match=r"^attn\.\d: .* are its rows laid out so"):
        check_family(misdescribed(make_hf("siglip"), change_attn(consumers=transposed)))


def test_a_unit_cost_that_is_not_what_goes_is_found(misdescribed):
    model = misdescribed(make_hf("beit"), lambda s: replace(s, cost=s.cost + 1))
    with pytest.raises(UpopError, match=r"^BeitModel: expected slimming to remove \d+ parameters by cost, got \d+$"):
        check_family(model)


def test_masks_that_the_forward_does_not_see_are_found():
    class Reads(nn.Module):
        """Computes with a Linear's weight without calling it."""

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

        def forward(self, x):
            return self.fc2(self.act(x @ self.fc1.weight.T + self.fc1.bias))

    before = list(FAMILIES)
    try:
        register_family(
            Family("reads", lambda m: isinstance(m, Reads), lambda m: (upop.families.mlp(m, 0, "", act="act"),))
        )
        with pytest.raises(ModelError, match="missing"):
            check_family(Reads(), images=torch.randn(2, 8))
        wrapped = nn.Sequential(Reads())
        register_family(
            Family(
                "wraps", lambda m: isinstance(m, nn.Sequential), lambda m: (upop.families.mlp(m, 0, "0", act="act"),)
            )
        )
        with pytest.raises(UpopError, match=r"^mlp\.0: expected a finite gradient at its mask, got none; .*called"):
            check_family(wrapped, images=torch.randn(2, 8))
    finally:
        FAMILIES[:] = before


def test_a_number_that_was_not_said_to_follow_the_width_is_an_error_not_a_pass(misdescribed):
    model = misdescribed(make_hf("dinov2"), change_attn(attributes=lambda s: ()))
    with pytest.raises((UpopError, RuntimeError)):
        check_family(model)


def test_a_family_that_finds_nothing_is_refused(misdescribed):
    model = misdescribed(make_stand_in(), lambda s: s)
    FAMILIES[0] = replace(FAMILIES[0], find=lambda m: ())
    with pytest.raises(UpopError, match=r"^StandIn: expected structures to prune, found none"):
        check_family(model, images=IMAGES)


def test_a_description_that_touches_the_model_is_found(misdescribed):
    model = misdescribed(make_stand_in(), lambda s: s)
    find = FAMILIES[0].find
    FAMILIES[0] = replace(FAMILIES[0], find=lambda m: (setattr(m.head, "looked", len(vars(m.head))), find(m))[1])
    with pytest.raises(UpopError, match=r"^head.*: expected slimming and masking to leave the model as it is"):
        check_family(model, images=IMAGES)


@pytest.mark.parametrize("make", [make_stand_in, lambda: make_hf("clip-classifier")], ids=["timm", "hf"])
def test_the_given_model_is_not_touched(make):
    model = make().train()
    state, shape = copy.deepcopy(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    check_family(model, images=IMAGES)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [sorted(vars(m)) for m in model.modules()] == shape
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_fresh_layer_scales_do_not_hide_a_wrong_description(misdescribed):
    # As timm makes them: 1e-5, so that no block matters to the outputs.
    model = misdescribed(make_stand_in(layer_scale=True), change_attn(producers=without_rescaling))
    with pytest.raises(UpopError, match=r"^attn\.\d: expected masked and slimmed outputs"):
        check_family(model, images=IMAGES)


def test_images_of_the_right_size_are_made_where_the_model_states_it():
    check_family(make_hf("clip-classifier"))
    model = make_stand_in()
    check_family(model)
    del model.patch_embed.img_size
    with pytest.raises(
        UpopError, match=r"^StandIn: images: expected a tensor, got None, and the model states no size"
    ):
        check_family(model)


@pytest.mark.parametrize("kinds", [None, ("dims", "mlp")], ids=str)
def test_layers_that_were_taken_apart_may_stand_beside_whole_ones(kinds):
    model = make_hf("vit")
    keep = {s.name: torch.arange(s.units) >= 0 for s in find_structures(model, ("qk", "v"))}
    small = upop.slim(model, keep | {"v.1": torch.arange(64) % 32 < 20})
    assert {s.kind for s in find_structures(small)} == {"attn", "qk", "v", "mlp"}
    check_family(small, kinds=kinds)


def test_outputs_and_tolerance_can_be_chosen():
    model = make_stand_in()
    check_family(model, images=IMAGES, forward=lambda m, x: {"nested": [(m(x), "text"), torch.arange(3)]})
    with pytest.raises(UpopError, match="agree to 0, got a difference of"):
        check_family(model, images=IMAGES, tolerance=0)
    with pytest.raises(UpopError, match="expected outputs that gradients can flow from, got none"):
        check_family(model, images=IMAGES, forward=lambda m, x: m(x).detach())
