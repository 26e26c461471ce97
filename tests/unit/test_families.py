"""Promises of upop.families: every structure of a known model, and a refusal that names what stands in the way."""

import pytest
import torch
from torch import nn

import upop
from upop.errors import ModelError
from upop.families import FAMILIES, find_family, find_structures

NAMES = ["vit", "deit", "teacher"]


@pytest.mark.parametrize("name", NAMES)
def test_structures_are_one_attn_and_one_mlp_a_layer_in_order(make_model, name):
    structures = find_structures(make_model(name, layers=3))
    assert [s.name for s in structures] == ["attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2"]
    assert {(s.kind, s.units, s.floor) for s in structures} == {("attn", 32, 1), ("mlp", 256, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_units_own_their_linears_and_nothing_else(make_model, name):
    model = make_model(name)
    owned = {port.path for s in find_structures(model) for port in (*s.producers, *s.consumers)}
    linears = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears - owned == {path for path in linears if "classifier" in path}
    assert owned <= linears


def test_looking_at_a_model_does_not_touch_it(make_model):
    model = make_model()
    before = [dict(vars(m)) for m in model.modules()]
    upop.analyze(model)
    assert [dict(vars(m)) for m in model.modules()] == before


def test_analyze_counts_and_shows_kinds_and_range(make_model):
    analysis = upop.analyze(make_model())
    assert analysis.params == sum(p.numel() for p in make_model().parameters())
    assert analysis.rows() == [("attn", 2, "32", 518, 2 * 32 * 518), ("mlp", 2, "256", 129, 2 * 256 * 129)]
    assert "ViTForImageClassification (Hugging Face ViT and DeiT): 114,250 parameters" in str(analysis)
    assert "reachable: params=0 to params=0.85" in str(analysis)


def test_a_model_with_fused_attention_is_refused_by_its_modules():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 2)

    with pytest.raises(
        ModelError,
        match=r"^Custom: unsupported model; expected one of: Hugging Face ViT.* unsupported modules: .*"
        r"MultiheadAttention x1 \(attention\)",
    ):
        upop.analyze(Custom())


@pytest.mark.parametrize("act", [upop.analyze, find_family, find_structures])
def test_every_entry_refuses_an_unsupported_model(act):
    with pytest.raises(ModelError, match=r"^Sequential: unsupported model.*Linear x2 \(0\)"):
        act(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_a_model_without_weights_or_without_a_head_is_refused(make_model):
    with pytest.raises(ModelError, match="none with weights"):
        upop.analyze(nn.Identity())
    with pytest.raises(ModelError, match=r"^ViTModel: unsupported model"):
        upop.analyze(make_model().vit)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new", "tanh"])
def test_activations_that_are_zero_at_zero_are_accepted(make_model, activation):
    assert find_structures(make_model(hidden_act=activation))


@pytest.mark.parametrize("activation", ["sigmoid"])
def test_an_activation_that_is_not_zero_at_zero_is_refused_by_path_and_value(make_model, activation):
    with pytest.raises(ModelError, match=r"^vit\.layers\.0\.mlp\.activation_fn: .*Sigmoid with f\(0\) = 0\.5"):
        find_structures(make_model(hidden_act=activation))


@pytest.mark.parametrize("path", ["vit.layers.1.mlp.fc1", "vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2"])
def test_a_linear_that_is_not_plain_is_refused_by_path(make_model, path):
    class Quantised(nn.Linear):
        pass

    model = make_model()
    old = model.get_submodule(path)
    model.set_submodule(path, Quantised(old.in_features, old.out_features))
    with pytest.raises(ModelError, match=rf"^{path}: expected a plain torch\.nn\.Linear, got .*Quantised"):
        find_structures(model)


@pytest.mark.parametrize(
    "path",
    ["vit.layers", "vit.layers.1.attention", "vit.layers.1.attention.k_proj", "vit.layers.0.mlp.activation_fn"],
)
def test_another_layout_of_a_known_class_is_refused_not_a_crash(make_model, path):
    # As in releases of transformers that name these modules otherwise.
    model = make_model()
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    with pytest.raises(ModelError, match="transformers"):
        find_structures(model)


def test_structures_are_found_on_the_meta_device_and_in_any_dtype(make_model):
    with torch.device("meta"):
        meta = find_structures(make_model())
    assert meta == find_structures(make_model()) == find_structures(make_model(dtype=torch.bfloat16))


def test_a_family_says_its_name():
    assert [family.name for family in FAMILIES][:1] == ["Hugging Face ViT and DeiT"]
