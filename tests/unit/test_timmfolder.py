"""Promises of upop.timmfolder: slimmed timm models come back to the same bits, or are not written at all."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from family_models import make_stand_in
from torch import nn

import upop
from upop.errors import ModelError
from upop.families import find_structures
from upop.testing import _randomise_

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class PatchEmbed(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj, self.img_size = proj, (32, 32)

    def forward(self, x):
        return self.proj(x)


def create_model(model_name, pretrained=False, checkpoint_path="", **arguments):
    """Stands in for timm.create_model: two architectures, which differ in their MLPs."""
    assert not pretrained
    assert not checkpoint_path
    mlp = {"vit_small": "Mlp", "vit_swiglu": "SwiGLU"}[model_name]
    model = make_stand_in(mlp=mlp, **{key: arguments[key] for key in ("qkv_bias", "fused") if key in arguments})
    model.blocks = model.blocks[: arguments.get("depth", 2)]
    model.pretrained_cfg = {"architecture": model_name, "mean": (0.5, 0.5, 0.5), "filter_fn": create_model}
    model.patch_embed = PatchEmbed(model.patch_embed)
    model.num_classes, model.global_pool = arguments.get("num_classes", 10), "token"
    return model


@pytest.fixture
def timm(monkeypatch):
    """A timm that is not installed."""
    names = ("vit_small", "vit_swiglu")
    fake = SimpleNamespace(create_model=create_model, is_model=lambda name: name in names, __version__="1.0.31")
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


@pytest.fixture
def small(timm, random_lanes):
    """A slimmed stand-in."""

    def make(name="vit_small", kinds=("attn", "mlp"), **options):
        model = timm.create_model(name, **options)
        _randomise_(model, torch.Generator().manual_seed(0))
        return upop.slim(model, random_lanes(find_structures(model, kinds)))

    return make


def assert_same_bits(loaded, model):
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("dims", "mlp", "block")], ids=",".join)
@pytest.mark.parametrize("name", ["vit_small", "vit_swiglu"])
def test_a_slimmed_model_comes_back_to_the_same_bits_and_is_pruned_again(small, tmp_path, random_lanes, name, kinds):
    model = small(name, kinds)
    upop.save_pretrained(model, tmp_path / "small")
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["config.json", "model.safetensors"]
    loaded = upop.from_pretrained(tmp_path / "small")
    assert not loaded.training
    assert_same_bits(loaded, model)
    smaller = upop.slim(loaded, random_lanes(find_structures(loaded), seed=1))
    upop.save_pretrained(smaller, tmp_path / "smaller")
    assert_same_bits(upop.from_pretrained(tmp_path / "smaller"), smaller)


def test_the_folder_says_architecture_arguments_and_widths(small, tmp_path):
    model = small()
    upop.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_small"
    assert config["model_args"] == {
        "num_classes": 10,
        "img_size": [32, 32],
        "in_chans": 3,
        "global_pool": "token",
        "depth": 2,
    }
    assert config["upop"]["widths"] == {
        "attn": [block.attn.head_dim for block in model.blocks],
        "mlp": [block.mlp.fc1.out_features for block in model.blocks],
    }
    assert config["pretrained_cfg"] == {"architecture": "vit_small", "mean": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv\.bias: expected None, timm makes"),
        ({"fused": False}, r"blocks\.0\.attn: expected .*'fused_attn': False.*, timm makes .*'fused_attn': True"),
    ],
    ids=["weights", "a setting"],
)
def test_what_the_model_does_not_show_has_to_be_given(small, tmp_path, options, message):
    model = small(**options)
    with pytest.raises(ModelError, match=rf"^vit_small: {message}.*; give what it was made with: .*timm_args"):
        upop.save_pretrained(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    upop.save_pretrained(model, tmp_path / "small", timm_args=options)
    assert_same_bits(upop.from_pretrained(tmp_path / "small"), model)


def test_a_model_that_timm_did_not_create_is_refused(tmp_path):
    model = make_stand_in()
    with pytest.raises(ModelError, match=r"^StandIn: expected a model of timm\.create_model"):
        upop.save_pretrained(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_without_timm_the_line_says_to_install_it(small, tmp_path, monkeypatch):
    upop.save_pretrained(small(), tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm cannot be imported .*; pip install timm"):
        upop.from_pretrained(tmp_path)


def edit(**changes):
    return lambda config: config | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(architecture="resnet50"), r"expected an architecture of this timm .* got 'resnet50'"),
        (edit(architecture="hf-hub:me/evil"), r"got 'hf-hub:me/evil'"),
        (edit(architecture=7), "got 7"),
        (edit(model_args={"checkpoint_path": "evil.pth"}), r"got 'vit_small' with checkpoint_path"),
        (edit(model_args={"num_classes": 10, "pretrained": True}), r"with pretrained"),
        (edit(model_args={"depth": 1}), r"expected|Error"),
        (edit(upop={}), r"cannot load the timm model \(KeyError: 'widths'\)"),
        (edit(upop={"widths": {"attn": [1], "mlp": [1, 1]}}), r"upop\.widths\.attn: expected a number for each layer"),
        (
            edit(upop={"widths": {"attn": [33, 1], "mlp": [1, 1]}}),
            r"upop\.widths\.attn: expected numbers in \[1, 32\]",
        ),
        (edit(upop={"widths": {"attn": [True, 1], "mlp": [1, 1]}}), r"upop\.widths\.attn: expected a number"),
        (edit(upop={"widths": {"attn": [9, 9], "mlp": [9, 9]}}), r"size mismatch|expected"),
    ],
    ids=[
        *("architecture", "download", "no name", "a pickle", "pretrained", "depth", "no widths", "too few"),
        *("too wide", "a bool", "others"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(small, tmp_path, change, message):
    upop.save_pretrained(small(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ModelError, match=message) as refused:
        upop.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_command_line_says_that_it_takes_hugging_face_models_only(small, tmp_path):
    from upop.models import load_model

    upop.save_pretrained(small(), tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path}: a model of timm")):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("dims", "mlp", "block")], ids=",".join)
@pytest.mark.parametrize(
    ("name", "options", "hidden"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 5}, {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 0}, {"drop_rate": 0.1}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, {}),
        ("deit3_small_patch16_224", {"img_size": 32}, {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, {}),
        ("vit_giant_patch14_dinov2", {"img_size": 28}, {}),
        ("vit_base_patch16_siglip_224", {"img_size": 32}, {"qkv_bias": False}),
    ],
)
def test_models_of_timm_itself_come_back_to_the_same_bits(tmp_path, random_lanes, name, options, hidden, kinds):
    real = pytest.importorskip("timm")
    model = real.create_model(name, depth=2, **options, **hidden).eval()
    _randomise_(model, torch.Generator().manual_seed(0))
    small = upop.slim(model, random_lanes(find_structures(model, kinds)))
    if hidden:
        with pytest.raises(ModelError, match="timm_args"):
            upop.save_pretrained(small, tmp_path)
    upop.save_pretrained(small, tmp_path, timm_args=hidden)
    images = torch.randn(2, 3, *small.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(upop.from_pretrained(tmp_path)(images), small(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_come_back_in_the_format_they_had(small, tmp_path, dtype):
    model = small().to(dtype)
    upop.save_pretrained(model, tmp_path / "out")
    loaded = upop.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES.to(dtype)), model(IMAGES.to(dtype)))


def test_a_model_whose_scale_was_rounded_twice_is_saved(timm, tmp_path):
    def cut(model, width):
        return upop.slim(model, {s.name: torch.arange(s.units) < width for s in find_structures(model, ("attn",))})

    model = timm.create_model("vit_small")
    once, twice = cut(model, 1), cut(cut(model, 30), 1)
    assert once.blocks[0].attn.scale != twice.blocks[0].attn.scale, "the test must not pass by equal scales"
    upop.save_pretrained(twice, tmp_path)
    assert_same_bits(upop.from_pretrained(tmp_path), twice)


def test_a_model_laid_out_otherwise_is_refused_in_a_line(small, tmp_path):
    model = small()
    del model.patch_embed.img_size
    with pytest.raises(ModelError, match=r"expected a model laid out as timm's VisionTransformer.*img_size.*the keep"):
        upop.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_is_no_part_of_what_a_model_is(small, tmp_path):
    model = small()
    model.grad_checkpointing = True
    upop.save_pretrained(model, tmp_path / "out")
    assert_same_bits(upop.from_pretrained(tmp_path / "out"), model)
