"""Promises of upop.structures: costs come from shapes and add up; what does not fit is refused by path."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import upop
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.structures import (
    Attribute,
    Port,
    Structure,
    check_keep,
    linear,
    make_structure,
    prunable_cost,
    removable_cost,
    removed_cost,
    widths,
)

SIZES = {"tiny": (192, 3, 6.008), "small": (384, 6, 12.008), "base": (768, 12, 24.008)}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module", params=SIZES)
def deit(request, make_model):
    """(size, model with 12 layers at 224 pixels, on the meta device, its structures)"""
    width, heads, _ = SIZES[request.param]
    with torch.device("meta"):
        model = make_model("deit", width=width, heads=heads, layers=12, image=224, patch=16, labels=1000)
    return request.param, model, find_structures(model)


def test_an_attention_unit_costs_6_12_or_24_times_an_mlp_unit(deit):
    size, _, structures = deit
    cost = {s.kind: s.cost for s in structures}
    assert cost["attn"] / cost["mlp"] == pytest.approx(SIZES[size][2], abs=5e-4)


def test_units_times_cost_is_what_disappears_when_only_floors_stay(deit):
    _, model, structures = deit
    floors = {s.name: torch.arange(s.units) < s.floor for s in structures}
    disappeared = parameters(model) - parameters(upop.slim(model, floors))
    assert disappeared == sum((s.units - s.floor) * s.cost for s in structures)
    assert disappeared == removable_cost(structures) == removed_cost(structures, floors)


@pytest.mark.parametrize("name", ["vit", "deit", "teacher"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_removed_cost_is_what_disappears_for_any_keep(make_model, random_keep, name, qkv_bias):
    model = make_model(name, qkv_bias=qkv_bias)
    structures = find_structures(model)
    keep = random_keep(structures)
    assert removed_cost(structures, keep) == parameters(model) - parameters(upop.slim(model, keep))


def test_deit_small_has_the_published_number_of_parameters(make_model):
    with torch.device("meta"):
        model = make_model("vit", width=384, heads=6, layers=12, image=224, patch=16, labels=1000)
    assert parameters(model) == 22_050_664
    assert prunable_cost(find_structures(model)) == 21_265_920


def test_a_port_lays_values_out_as_outer_units_inner():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    rows = Port("any", outer=2, inner=3).expand(values)
    assert rows.tolist() == [1, 1, 1, 2, 2, 2] * 2
    rows.sum().backward()
    assert values.grad.tolist() == [6, 6]


def test_unit_cost_counts_rows_biases_and_columns():
    model = nn.ModuleDict({"up": nn.Linear(5, 12), "gate": nn.Linear(5, 12, bias=False), "down": nn.Linear(12, 7)})
    structure = make_structure(
        model,
        kind="mlp",
        layer=0,
        units=3,
        producers=[Port("up", outer=2, inner=2), Port("gate", outer=2, inner=2)],
        consumers=[Port("down", outer=2, inner=2)],
    )
    assert structure.cost == 4 * (5 + 1) + 4 * 5 + 4 * 7


@pytest.mark.parametrize("side", ["producers", "consumers"])
def test_a_linear_of_another_size_than_its_family_says_is_refused_by_path(side):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "odd": nn.Linear(9, 9)})
    ports = {"producers": [Port("a")], "consumers": [Port("a")]} | {side: [Port("odd")]}
    with pytest.raises(ModelError, match=r"odd\.(in|out)_features: expected 1 x 8 x 1 = 8, got 9"):
        make_structure(model, kind="mlp", layer=0, units=8, **ports)


def test_a_subclass_of_linear_is_refused_by_path():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Quantised(2, 2))
    assert linear(model, "0") is model[0]
    with pytest.raises(ModelError, match=r"^1: expected a plain torch\.nn\.Linear, got .*Quantised"):
        linear(model, "1")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("how", ["l1_unstructured", "weight_norm", "spectral_norm", "parametrizations"])
def test_a_weight_that_is_computed_from_others_is_refused_by_path(how, name):
    model = nn.Sequential(nn.Linear(4, 4))
    if how == "l1_unstructured":
        prune.l1_unstructured(model[0], name, 0.5)
    elif how == "parametrizations":
        nn.utils.parametrizations.weight_norm(model[0])
    elif name == "bias":
        pytest.skip("norms are of matrices")
    else:
        getattr(nn.utils, how)(model[0])
    with pytest.raises(
        ModelError, match=r"^0: expected a plain|^0\." + name + r": expected a parameter.*prune\.remove"
    ):
        linear(model, "0")


def test_names_are_kind_and_layer_and_values_are_frozen():
    structure = Structure("attn", 3, 8, 10, (Port("q"),), (Port("o"),), (Attribute("a", "head_dim"),))
    assert structure.name == "attn.3"
    with pytest.raises(AttributeError):
        structure.units = 4


def test_widths_are_one_number_a_layer_per_kind():
    structures = [Structure(kind, layer, 4 + layer, 1, (), ()) for layer in (0, 1) for kind in ("attn", "mlp")]
    assert widths(structures) == {"attn": [4, 5], "mlp": [4, 5]}


KEEP = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, "'attn.0' is missing"),
        ({"attn.0": KEEP, "attn.7": KEEP}, r"keep\['attn.7'\]: no such structure"),
        ({"attn.0": KEEP[:2]}, r"expected a bool tensor \[3\], got torch.bool \[2\]"),
        ({"attn.0": KEEP.float()}, r"expected a bool tensor \[3\], got torch.float32"),
        ({"attn.0": KEEP.long()}, r"expected a bool tensor \[3\], got torch.int64"),
        ({"attn.0": KEEP.to(torch.uint8)}, r"expected a bool tensor \[3\], got torch.uint8"),
        ({"attn.0": ~KEEP}, r"at least 2 unit\(s\) must stay, got 1"),
    ],
    ids=["missing", "unknown", "size", "float", "int64", "uint8", "floor"],
)
def test_a_keep_that_does_not_fit_is_refused_by_name(keep, message):
    structure = Structure("attn", 0, 3, 1, (), (), floor=2)
    check_keep([structure], {"attn.0": KEEP})
    with pytest.raises(UpopError, match=message):
        check_keep([structure], keep)
