"""Promises of upop.families: every structure of a known model, and a refusal that names what stands in the way."""

import re
from pathlib import Path

import pytest
import torch
from family_models import HF, SIZES, make_hf, make_stand_in
from torch import nn

import upop
from upop.errors import ModelError
from upop.families import FAMILIES, Family, find_family, find_structures, mlp, register_family
from upop.masks import Masks
from upop.testing import check_family

NAMES = ["vit", "deit", "teacher"]
DTYPES = [torch.float32, torch.bfloat16]
TIMM = {
    "fused": {},
    "unfused": {"fused": False},
    "no qkv bias": {"qkv_bias": False},
    "layer scale": {"layer_scale": True},
    "GluMlp": {"mlp": "GluMlp"},
    "SwiGLU": {"mlp": "SwiGLU"},
    "parallel": {"parallel": True},
}
GUIDE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture
def families():
    """The registry; every test leaves it as it was."""
    return FAMILIES


def half(model):
    return {s.name: torch.arange(s.units) % 2 == 0 for s in find_structures(model)}


# Of the other kernel, exactness is looked at in float64 below, with finer units.
@pytest.mark.parametrize(("kernel", "dtype"), [("eager", torch.float32), ("sdpa", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", HF)
def test_every_hugging_face_family_is_described_rightly(name, kernel, dtype):
    check_family(make_hf(name, attention=kernel, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_timms_layout_is_described_rightly(name, dtype):
    check_family(make_stand_in(dtype=dtype, **TIMM[name]), images=torch.randn(2, 3, 32, 32))


KINDS = [("dims", "mlp"), ("attn", "mlp", "block"), ("dims", "block"), ("qk", "v", "mlp")]


@pytest.mark.parametrize("kinds", KINDS, ids=",".join)
@pytest.mark.parametrize("name", HF)
def test_finer_and_coarser_units_of_every_hugging_face_family_are_exact(name, kinds):
    check_family(make_hf(name, dtype=torch.float64), kinds=kinds)


@pytest.mark.parametrize("name", [name for name in HF if "beit" not in name])
def test_whole_heads_go_where_no_head_has_numbers_of_its_own(name):
    check_family(make_hf(name, dtype=torch.float64), kinds=("head", "dims", "mlp"))


def test_heads_with_position_biases_of_their_own_stay():
    with pytest.raises(ModelError, match=r"kind 'head': .* attention does not allow it, only attn, dims, qk, v"):
        find_structures(make_hf("beit"), ("head", "mlp"))


def test_heads_with_position_biases_of_their_own_stay_in_layers_that_were_taken_apart():
    model = make_hf("beit")
    keep = {s.name: torch.arange(s.units) % s.width < s.layer + 5 for s in find_structures(model, ("qk", "v"))}
    small = upop.slim(model, keep | {"v.0": torch.arange(64) % 32 < 9})
    with pytest.raises(ModelError, match=r"kind 'head': layers\.0\..*v_proj: this .* does not allow it, only v, dims"):
        find_structures(small, ("head", "qk", "v"))


@pytest.mark.parametrize("name", TIMM)
def test_finer_units_of_timms_layout_are_exact(name):
    model = make_stand_in(dtype=torch.float64, **TIMM[name])
    kinds = ("dims", "mlp") if TIMM[name].get("parallel") else ("dims", "mlp", "block")
    check_family(model, kinds=kinds, images=torch.randn(2, 3, 32, 32))


def test_blocks_that_do_not_end_in_their_branches_stay():
    with pytest.raises(ModelError, match=r"kind 'block': expected a family that says where its blocks are"):
        find_structures(make_stand_in(parallel=True), ("attn", "block"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["Block", "ResPostBlock", "ParallelThingsBlock", "GluMlp", "SwiGLU", "distilled"])
def test_timm_itself_is_described_rightly(kind, fused, dtype):
    timm = pytest.importorskip("timm")
    kinds = timm.models.vision_transformer
    options = {"block_fn": getattr(kinds, kind)} if kind.endswith("Block") else {}
    options |= {"mlp_layer": getattr(timm.layers, kind)} if kind == "SwiGLU" else {}
    options |= {"mlp_layer": timm.layers.SwiGLUPacked} if kind == "GluMlp" else {}
    model_class = timm.models.deit.VisionTransformerDistilled if kind == "distilled" else kinds.VisionTransformer
    model = model_class(img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=2, num_classes=10, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    check_family(model.to(dtype))


# Real shapes, on the meta device: (class, config, parameters as published, units of a layer).
REAL = {
    "vit-base": ("ViTForImageClassification", {"num_labels": 1000}, 86_567_656, (64, 3072)),
    "deit-small": (
        "DeiTForImageClassification",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000},
        22_050_664 + 384 * 2,
        (64, 1536),
    ),
    "dinov2-base": ("Dinov2Model", {"image_size": 518}, 86_580_480, (64, 3072)),
    "dinov2-giant": (
        "Dinov2Model",
        {
            **{"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "image_size": 518},
            "use_swiglu_ffn": True,
        },
        1_136_480_768,
        (64, 4096),
    ),
    "clip-large": (
        "CLIPVisionModel",
        {
            **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
            "patch_size": 14,
        },
        303_179_776,
        (64, 4096),
    ),
    "siglip-so400m": (
        "SiglipVisionModel",
        {
            **{"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304},
            **{"patch_size": 14, "image_size": 384},
        },
        428_225_600,
        (72, 4304),
    ),
    "beit-base": (
        "BeitForImageClassification",
        {"use_relative_position_bias": True, "num_labels": 1000},
        86_530_984,
        (64, 3072),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_models_of_real_size_are_described_and_rebuilt_from_their_config_alone(name):
    import transformers

    from upop.modeling_upop import find_layers, pruned_model
    from upop.pretrained import adopt_
    from upop.surgery import cut_

    kind, values, parameters, units = REAL[name]
    stock = getattr(transformers, kind)
    with torch.device("meta"):
        model = stock(stock.config_class(**values))
    assert sum(p.numel() for p in model.parameters()) == parameters
    structures = find_structures(model)
    assert [s.units for s in structures] == [*units] * (len(structures) // 2)
    keep = half(model)
    removed = sum(int((~keep[s.name]).sum()) * s.cost for s in structures)
    cut_(model, structures, {name: k.to("cpu") for name, k in keep.items()})
    assert sum(p.numel() for p in model.parameters()) == parameters - removed
    adopt_(model)
    with torch.device("meta"):
        again = pruned_model(stock)(model.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert [(layer.heads, layer.head_dim) for layer in find_layers(again)] == [
        (layer.heads, layer.head_dim) for layer in find_layers(model)
    ]


@pytest.mark.parametrize("name", HF)
def test_hugging_face_blocks_have_no_linear_that_is_left_out(name):
    model, path = make_hf(name), HF[name][3]
    owned = {port.path for s in find_structures(model) for port in (*s.producers, *s.consumers)}
    assert owned == {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p.startswith(f"{path}.")}
    assert [s.name for s in find_structures(model)] == ["attn.0", "mlp.0", "attn.1", "mlp.1"]


def test_relative_position_biases_and_heads_stay_whole():
    model = make_hf("beit")
    small = upop.slim(model, half(model))
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name:
            assert torch.equal(small.get_parameter(name), parameter)
    attention = small.get_submodule("layers.0.attention")
    assert attention.q_proj.out_features // attention.head_dim == attention.num_attention_heads == 2
    assert attention.k_proj.bias is None


@pytest.mark.parametrize("name", [n for n in HF if n not in ("vit", "deit")])
def test_hugging_face_softmax_scales_stay_the_originals(name):
    model = make_hf(name)
    scales = [
        getattr(m, "scaling", getattr(m, "scale", None))
        for m in upop.slim(model, half(model)).modules()
        if hasattr(m, "head_dim") and hasattr(m, "q_proj")
    ]
    assert scales == [32**-0.5] * 2


def test_timms_q_takes_up_the_change_of_scale_whichever_path_is_taken():
    model, images = make_stand_in(dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = half(model) | {"attn.1": torch.arange(32) < 5}
    small = upop.slim(model, keep)
    old, new = model.blocks[1].attn, small.blocks[1].attn
    assert (new.num_heads, new.head_dim, new.attn_dim) == (2, 5, 10)
    assert new.scale == pytest.approx(5**-0.5)
    factor = torch.tensor([(5 / 32) ** 0.5, 1, 1], dtype=torch.float64).view(3, 1, 1)
    for name in ("weight", "bias"):
        before, after = getattr(old.qkv, name), getattr(new.qkv, name)
        torch.testing.assert_close(after.view(3, 2, 5, -1), before.view(3, 2, 32, -1)[:, :, :5] * factor[..., None])
    fused = small(images)
    for block in small.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(small(images), fused, rtol=0, atol=1e-12)
    masks = Masks(model, find_structures(model))
    masks.set_({name: k.double() for name, k in keep.items()})
    torch.testing.assert_close(fused, model(images), rtol=0, atol=1e-12)


def test_a_slimmed_timm_model_can_be_slimmed_again():
    model, images = make_stand_in(dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = upop.slim(model, half(model))
    check_family(small, images=images)
    smaller = upop.slim(small, half(small))
    at_once = upop.slim(model, {n: torch.arange(len(k)) % 4 == 0 for n, k in half(model).items()})
    torch.testing.assert_close(smaller(images), at_once(images), rtol=0, atol=1e-12)


def test_keeping_everything_changes_no_bit_of_a_timm_model():
    model = make_stand_in()
    small = upop.slim(model, {s.name: torch.ones(s.units) > 0 for s in find_structures(model)})
    state = small.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert small.blocks[0].attn.scale == pytest.approx(model.blocks[0].attn.scale, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, r"^blocks\.0\.attn\.q_norm: expected none, got LayerNorm: head dims that are normalised"),
        ({"scale_norm": True}, r"^blocks\.0\.attn\.norm: expected none, got LayerNorm"),
        ({"gated": True}, r"^blocks\.0\.attn\.gate: expected none, got Linear: .* gated"),
        ({"mlp_norm": True}, r"^blocks\.0\.mlp\.norm: expected none, got LayerNorm: neurons that are normalised"),
        ({"act": nn.Sigmoid}, r"^blocks\.0\.mlp\.act: .*Sigmoid with f\(0\) = 0\.5"),
    ],
    ids=["qk_norm", "scale_norm", "gate", "mlp_norm", "sigmoid"],
)
def test_timm_blocks_that_cannot_be_cut_exactly_are_refused_by_path(options, message):
    with pytest.raises(ModelError, match=message):
        find_structures(make_stand_in(**options))


def test_a_timm_block_with_another_attention_is_refused_by_path():
    class DiffAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(64, 192)

    model = make_stand_in()
    model.blocks[1].attn = DiffAttention()
    with pytest.raises(ModelError, match=r"^blocks\.1\.attn\.qkv: expected .* Attention .*, got a DiffAttention with"):
        find_structures(model)


HF_PARTS = {
    "vit": ["attention.q_proj", "attention.scaling", "mlp.fc1", "mlp.activation_fn"],
    "deit": ["attention.o_proj", "attention.head_dim", "mlp.fc2"],
    "vit-tower": ["attention.v_proj"],
    "dinov2-registers": ["attention.q_proj", "attention.scaling", "mlp.fc2"],
    "clip-projection": ["self_attn.scale", "self_attn.head_dim", "mlp.activation_fn"],
    "dinov2": ["attention.k_proj", "attention.scaling", "attention.head_dim", "mlp.fc1", "mlp.activation_fn"],
    "dinov2-swiglu": ["attention.o_proj", "mlp.up_proj", "mlp.down_proj"],
    "clip-classifier": ["self_attn.q_proj", "self_attn.out_proj", "self_attn.scale", "mlp.fc2"],
    "siglip": ["self_attn.v_proj", "self_attn.head_dim", "mlp"],
    "beit": ["attention", "attention.scaling", "mlp.fc2"],
}


@pytest.mark.parametrize(("name", "missing"), [(name, m) for name, parts in HF_PARTS.items() for m in parts])
def test_one_line_says_what_transformers_has_renamed(name, missing):
    model = make_hf(name)
    path = f"{HF[name][3]}.1.{missing}"
    parent, _, attribute = path.rpartition(".")
    delattr(model.get_submodule(parent), attribute)
    with pytest.raises(
        ModelError, match=rf": {re.escape(path)}\b.* is missing; expected the layout of transformers 5\."
    ):
        find_structures(model)


@pytest.mark.parametrize("missing", ["qkv", "proj", "num_heads", "head_dim", "attn_dim", "scale"])
def test_one_line_says_what_timm_has_renamed(missing):
    model = make_stand_in()
    delattr(model.blocks[1].attn, missing)
    with pytest.raises(
        ModelError, match=rf": blocks\.1\.attn\.{missing}\b.* is missing; expected the layout of timm 1\."
    ):
        find_structures(model)


def test_a_list_of_blocks_that_moved_is_said_so():
    model = make_hf("dinov2")
    model.encoder = nn.Identity()
    with pytest.raises(ModelError, match=r"^Dinov2Model: .*encoder\.layer, the list of blocks, is missing; .*5\.18"):
        find_structures(model)


def test_windows_are_no_family_yet_and_are_refused_before_anything_is_touched():
    import transformers

    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    model = transformers.SwinForImageClassification(config)
    with pytest.raises(
        ModelError,
        match=r"^SwinForImageClassification: unsupported model; .*see upop\.families\.register_family and docs",
    ):
        upop.Search(model, target=upop.Target(params=0.5), steps=3)


def test_torchs_own_attention_is_refused_with_what_to_do():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(ModelError, match=r"1 is a torch\.nn\.MultiheadAttention, .*split_attentions_ makes them"):
        find_structures(model)


def test_an_attention_inside_torchs_own_layer_gets_no_advice_that_would_break_it():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ModelError, match=r"0\.self_attn is part of a torch\.nn\.TransformerEncoderLayer") as refused:
        find_structures(model)
    assert "split_attentions_" not in str(refused.value)


def test_a_slimmed_model_that_could_not_be_loaded_again_refuses_to_be_saved(families, tmp_path):
    # A family of one's own, of a model that has save_pretrained: no config says its widths.
    model = make_hf("clip")
    register_family(Family("mine", lambda m: type(m) is type(model), find_family(model).find))
    small = upop.slim(upop.slim(model, half(model)), half(upop.slim(model, half(model))))
    for save in (small.save_pretrained, lambda folder: upop.save_pretrained(small, folder)):
        with pytest.raises(ModelError, match=rf"^{type(model).__name__}: .* slimmed model .* state_dict\(\)"):
            save(tmp_path / "small")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "dense")  # the dense one is not touched
    again = upop.slim(model, half(model))
    again.load_state_dict(upop.slim(model, half(model)).state_dict())


def test_families_say_whether_their_slimmed_models_can_be_saved():
    assert [family.saves for family in FAMILIES] == [True, True, True, True, False, False]


def test_the_guides_family_works_and_is_about_ten_lines(families):
    own = GUIDE.read_text().partition("## Your own kind of model")[2]
    listings = re.findall(r"```python\n(.*?)```", own, flags=re.DOTALL)
    assert len(listings) == 3
    program = {}
    for listing in listings:
        exec(listing, program)
    assert len([line for line in listings[1].splitlines() if line.strip()]) <= 10
    assert families[0].name == "my models"
    model = program["MyModel"]()
    assert "my models" in str(upop.analyze(model))
    assert [s.name for s in find_structures(model)] == ["attn.0", "mlp.0", "attn.1", "mlp.1"]


def test_a_family_of_ones_own_is_asked_first_and_replaced_by_name(families):
    def mlps(model):
        return tuple(mlp(model, n, f"blocks.{n}.mlp", act="act") for n in range(2))

    model = make_stand_in(qk_norm=True)
    register_family(Family("mine", lambda m: False, mlps))
    register_family(Family("mine", lambda m: m is model or isinstance(m, type(model)), mlps))
    assert [f.name for f in families].count("mine") == 1
    assert [s.name for s in find_structures(model)] == ["mlp.0", "mlp.1"]
    check_family(model, images=torch.randn(2, 3, 32, 32))


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
    found = [(row.kind, row.layers, row.units, row.step, row.floor, row.cost["params"]) for row in analysis.rows()]
    assert found == [("attn", 2, "32", 1, 1, 518), ("mlp", 2, "256", 1, 1, 129)]
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


def test_a_model_without_weights_is_refused():
    with pytest.raises(ModelError, match="none with weights"):
        upop.analyze(nn.Identity())


def test_of_a_model_with_another_head_the_part_that_is_known_is_named():
    import transformers

    config = transformers.ViTConfig(**SIZES, encoder_stride=8)
    model = transformers.ViTForMaskedImageModeling(config)
    with pytest.raises(ModelError, match=r"^ViTForMaskedImageModeling: .*; its part vit, a ViTModel, is one: search"):
        upop.analyze(model)
    model.vit = upop.slim(model.vit, half(model.vit))
    assert model(torch.randn(1, 3, 32, 32)).reconstruction.shape == (1, 3, 32, 32)


def test_adapters_of_peft_are_to_be_merged_first(make_model):
    model = make_model()
    lora = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.vit.layers[1].attention.q_proj = lora(64, 64)
    with pytest.raises(ModelError, match=r"^vit\.layers\.1\.attention\.q_proj: .* got peft\.tuners.*merge_and_unload"):
        find_structures(model)
    wrapper = type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})
    with pytest.raises(
        ModelError, match=r"^PeftModel: unsupported .*merge them first, model = .*merge_and_unload\(\)"
    ):
        find_structures(wrapper(model))


class QuantisedTensor(torch.Tensor):
    """As torchao's: a Linear's weight that is no plain tensor."""

    def __tensor_flatten__(self):
        return [], None


def test_a_quantised_model_is_to_be_pruned_before(make_model):
    model = make_model()
    plain = model.vit.layers[0].mlp.fc1.weight
    model.vit.layers[0].mlp.fc1.weight = nn.Parameter(plain.detach().as_subclass(QuantisedTensor))
    with pytest.raises(
        ModelError, match=r"^vit\.layers\.0\.mlp\.fc1\.weight: .* got QuantisedTensor.*prune before quanti"
    ):
        find_structures(model)
    model.vit.layers[0].mlp.fc1.weight = nn.Parameter(plain.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"fc1\.weight: .* of torch\.int8; prune before quantising"):
        find_structures(model)


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
    with pytest.raises(ModelError, match=rf"^{path}: expected a plain torch\.nn\.Linear, got .*Quantised; merge"):
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


def tie_modules(model, blocks):
    blocks[1].mlp.fc1 = blocks[0].mlp.fc1


def tie_weights(model, blocks):
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight


def tie_with_what_is_not_pruned(model, blocks):
    model.extra = nn.Linear(64, 256)
    model.extra.bias = blocks[0].mlp.fc1.bias


@pytest.mark.parametrize("tie", [tie_modules, tie_weights, tie_with_what_is_not_pruned])
@pytest.mark.parametrize("of_timm", [False, True])
def test_weights_that_two_structures_share_are_refused(make_model, tie, of_timm):
    model = make_stand_in() if of_timm else make_model()
    tie(model, model.blocks if of_timm else model.vit.layers)
    wanted = r"^.*(1\.mlp\.fc1|extra): expected weights of its own, got those of .*0\.mlp\.fc1: .*; give it a copy"
    with pytest.raises(ModelError, match=wanted):
        find_structures(model)


def test_queries_may_share_their_weights_with_keys(make_model, images, logits_of):
    """Units are the same head dims there; whole blocks that are the same are one."""
    model = make_model()
    for block in model.vit.layers:
        block.attention.k_proj.weight = block.attention.q_proj.weight
    model.vit.layers[1] = model.vit.layers[0]
    keep = {s.name: torch.arange(s.units) % 2 == 0 for s in find_structures(model)}
    masks = Masks(model, find_structures(model))
    masks.set_({name: value.float() for name, value in keep.items()})
    torch.testing.assert_close(logits_of(upop.slim(model, keep), images()), logits_of(model, images()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("of_timm", [False, True])
def test_wrappers_are_refused_whatever_they_wrap(make_model, wrap, of_timm):
    with pytest.raises(ModelError, match="expected the model itself, got a wrapper of it"):
        find_structures(wrap(make_stand_in() if of_timm else make_model()))
