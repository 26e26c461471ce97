"""Promises of upop.modeling_upop: every family's slimmed models travel, with upop and without it, to the same bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from family_models import HF, make_hf
from safetensors.torch import load_file, save_file
from torch import nn

import upop
from upop import modeling_upop
from upop.errors import ModelError
from upop.families import FAMILIES, find_structures
from upop.modeling_upop import AUTO_CLASSES, MODELS, find_layers, narrow_
from upop.testing import _randomise_

CODE = "modeling_upop.py"
KINDS = {"attn": ("attn", "mlp"), "dims": ("dims", "head", "mlp", "block"), "qk": ("qk", "v", "mlp")}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

WITHOUT_UPOP = """
import sys
class NoUpop:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "upop":
            raise ModuleNotFoundError(name, name="upop")
sys.meta_path.insert(0, NoUpop())
import json
from pathlib import Path
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
root = Path(sys.argv[1])
images = load_file(root / "images.safetensors")["images"]
labels = {}
for folder in sorted(path.parent for path in root.glob("*/config.json")):
    auto = next(key for key in json.loads((folder / "config.json").read_text())["auto_map"] if key != "AutoConfig")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = {key: value.contiguous() for key, value in model(images).items() if torch.is_tensor(value)}
    save_file(outputs, root / f"{folder.name}.safetensors")
    if folder.name == "clip-classifier":
        model.save_pretrained(root / "again")
    if auto == "AutoModelForImageClassification":
        classify = transformers.pipeline("image-classification", model=str(folder), trust_remote_code=True)
        labels[folder.name] = classify(Image.new("RGB", (40, 30), (200, 30, 30)), top_k=1)[0]["label"]
assert "upop" not in sys.modules
(root / "labels.json").write_text(json.dumps(labels))
"""

MORE_OUTPUTS = """
import torch
from family_models import HF, make_hf
import upop
from upop.families import find_structures

for name in HF:
    model = make_hf(name, attention="eager")
    small = upop.slim(model, {s.name: torch.arange(s.units) < 9 for s in find_structures(model)})
    found = small(torch.zeros(1, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    print(name, len(found.hidden_states or ()), len(found.attentions or ()))
"""


def random_model(name, **config):
    model = make_hf(name, **config)
    _randomise_(model, torch.Generator().manual_seed(0))
    return model


def slimmed(name, kinds, random_lanes, **config):
    model = random_model(name, **config)
    wanted = [kind for kind in kinds if not (kind == "head" and "beit" in name)]
    return upop.slim(model, random_lanes(find_structures(model, wanted)))


@torch.no_grad()
def outputs(model):
    return {key: value for key, value in model(IMAGES).items() if isinstance(value, torch.Tensor)}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---------------------------------------------------------------- with upop


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", HF)
def test_every_family_comes_back_from_its_folder_to_the_same_bits(name, kinds, random_lanes, tmp_path):
    small = slimmed(name, KINDS[kinds], random_lanes)
    upop.save_pretrained(small, tmp_path / "small")
    loaded = upop.from_pretrained(tmp_path / "small")
    assert type(loaded) is type(small)
    assert_same_bits(outputs(loaded), outputs(small))
    auto = getattr(transformers, AUTO_CLASSES[type(small).__name__.removeprefix("Pruned")])
    assert_same_bits(outputs(auto.from_pretrained(tmp_path / "small").eval()), outputs(small))
    # What came back is pruned, saved and loaded again.
    smaller = upop.slim(loaded, random_lanes(find_structures(loaded), seed=1))
    smaller.save_pretrained(tmp_path / "smaller")
    assert_same_bits(outputs(upop.from_pretrained(tmp_path / "smaller")), outputs(smaller))


@pytest.mark.parametrize("name", ["dinov2", "beit-classifier", "clip-classifier"])
def test_config_json_says_every_width(name, random_lanes, tmp_path):
    small = (
        slimmed(name, ("dims", "mlp", "block"), random_lanes, num_hidden_layers=3)
        if "clip" not in name
        else (slimmed(name, ("dims", "mlp", "block"), random_lanes))
    )
    upop.save_pretrained(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = find_layers(small)
    assert config["attn_widths"] == [layer.q.out_features // 2 for layer in layers]
    assert config["mlp_widths"] == [layer.out_of_hidden.in_features for layer in layers]
    assert config.get("value_widths") is None
    assert config.get("head_counts") is None
    assert config.get("vision_config", config)["num_hidden_layers"] == len(layers) == (1 if "clip" in name else 2)


def test_a_backbones_config_forgets_the_stages_that_went(random_lanes, tmp_path):
    small = slimmed("dinov2", ("attn", "block"), random_lanes, out_features=["stage2"])
    upop.save_pretrained(small, tmp_path)
    assert upop.from_pretrained(tmp_path).config.out_features == ["stage1"]


@pytest.mark.parametrize("name", ["vit", "clip-classifier"])
def test_a_model_without_any_block_left_travels(name, random_lanes, tmp_path):
    model = random_model(name)
    small = upop.slim(model, {s.name: torch.tensor([False]) for s in find_structures(model, ("block",))})
    upop.save_pretrained(small, tmp_path)
    assert upop.from_pretrained(tmp_path).config.attn_widths == []
    assert_same_bits(outputs(upop.from_pretrained(tmp_path)), outputs(small))


@pytest.mark.parametrize("name", [name for name in HF if name.endswith("classifier") or name in ("dinov2", "siglip")])
def test_a_dense_folder_comes_back_as_what_it_is(name, tmp_path):
    model = random_model(name)
    upop.save_pretrained(model, tmp_path)
    assert not (tmp_path / CODE).exists()
    loaded = upop.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same_bits(outputs(loaded), outputs(model))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "slimmed"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit-tower", {"add_pooling_layer": False}),
        ("vit-tower", {"use_mask_token": True}),
        ("deit-tower", {"add_pooling_layer": False, "use_mask_token": True}),
        ("beit", {"add_pooling_layer": False}),
    ],
)
def test_a_tower_comes_back_with_the_parts_it_was_made_with(name, arguments, dense, random_lanes, tmp_path):
    model = make_hf(name)
    model = type(model)(model.config, **arguments).eval()
    model = model if dense else upop.slim(model, random_lanes(find_structures(model)))
    upop.save_pretrained(model, tmp_path)
    loaded = upop.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same_bits(outputs(loaded), outputs(model))


@pytest.mark.parametrize("kinds", [("attn", "mlp"), ("qk", "v", "block")], ids=",".join)
@pytest.mark.parametrize(
    "name", [name for name in HF if name in ("vit", "deit", "clip-projection") or "classifier" in name]
)
def test_the_backbone_of_a_slimmed_model_is_saved_as_a_model_of_its_own(name, kinds, random_lanes, tmp_path):
    small = slimmed(name, kinds, random_lanes)
    said = small.config.to_dict()
    backbone = getattr(small, "vision_model", small.base_model)
    upop.save_pretrained(backbone, tmp_path)
    loaded = upop.from_pretrained(tmp_path)
    assert type(loaded).__name__ == f"Pruned{type(backbone).__name__}"
    assert_same_bits(outputs(loaded), outputs(backbone))
    assert small.config.to_dict() == said, "the model around it is as it was"


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2-classifier", "beit-classifier"])
def test_a_classifiers_folder_is_not_taken_for_that_of_a_tower(name, random_lanes, tmp_path):
    upop.save_pretrained(slimmed(name, ("attn", "mlp"), random_lanes), tmp_path)
    with pytest.raises(ValueError, match=r"expected a bare tower's, got Pruned\w+: load that, with .*Classification"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_the_auto_classes_know_a_slimmed_model_that_was_never_saved(random_lanes, monkeypatch):
    # As in a process that has not built a config of slimmed models yet.
    auto = transformers.AutoModelForImageClassification
    monkeypatch.setattr(auto._model_mapping, "_extra_content", {})
    monkeypatch.setattr(modeling_upop, "_register_models", modeling_upop._register_models.__wrapped__)
    small = slimmed("vit", ("attn", "mlp"), random_lanes)
    assert type(auto.from_config(small.config)) is type(small)


def test_all_families_of_hugging_face_are_listed():
    listed = {
        name for layout in ("VIT", "DINOV2", "CLIP", "BEIT") for name in getattr(upop.families.hf, layout).classes
    }
    assert set(AUTO_CLASSES) == listed
    assert {type(make_hf(name)).__name__ for name in HF} | {"DeiTForImageClassificationWithTeacher"} == listed
    assert all(hasattr(modeling_upop, f"Pruned{name}") for name in (*listed, *MODELS))
    assert len(FAMILIES) == 6


def test_no_other_class_can_be_asked_for_by_name():
    for name in ("PrunedBertModel", "ViTConfig", "Prunedos", "Pruned"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_upop, name)


def test_a_folder_of_the_first_format_still_loads(random_lanes, tmp_path):
    small = slimmed("deit", ("attn", "mlp"), random_lanes, num_labels=3)
    upop.save_pretrained(small, tmp_path, code=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in config
    first = {
        "architectures": ["PrunedDeiTForImageClassification"],
        "attn_widths": config["attn_widths"],
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "encoder_stride": 16,
        "head_counts": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 64,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "image_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "label2id": {"a": 0, "b": 1, "c": 2},
        "layer_norm_eps": 1e-12,
        "mlp_widths": config["mlp_widths"],
        "model_type": "upop_deit",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "qkv_bias": True,
        "transformers_version": "5.23.0",
        "value_widths": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(first))
    assert_same_bits(outputs(upop.from_pretrained(tmp_path)), outputs(small))


def test_with_upop_the_folders_code_is_not_run_whatever_is_trusted(random_lanes, tmp_path):
    folder, trace = tmp_path / "small", tmp_path / "trace"
    small = slimmed("dinov2-classifier", ("attn", "mlp"), random_lanes)
    upop.save_pretrained(small, folder)
    (folder / CODE).write_text(f"open({str(trace)!r}, 'w')\n" + (folder / CODE).read_text())
    for trust in (None, True):
        auto = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust).eval()
        assert_same_bits(outputs(auto), outputs(small))
    assert_same_bits(outputs(upop.from_pretrained(folder)), outputs(small))
    assert not trace.exists()


# ---------------------------------------------------------------- without upop


@pytest.fixture(scope="module")
def abroad(random_lanes, tmp_path_factory):
    """Folders of all families, and what a process without upop makes of them."""
    from upop.models import LoadedModel, save_image_processor

    root = tmp_path_factory.mktemp("abroad")
    save_file({"images": IMAGES}, root / "images.safetensors")
    expected = {}
    for number, name in enumerate(HF):
        small = slimmed(name, list(KINDS.values())[number % len(KINDS)], random_lanes)
        upop.save_pretrained(small, root / name)
        save_image_processor(root / name, LoadedModel(small, 32, (0.5,) * 3, (0.5,) * 3, trained=True))
        expected[name] = outputs(small)
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_UPOP, str(root)], capture_output=True, text=True, env=environment, timeout=180
    )
    assert run.returncode == 0, run.stderr
    return root, expected


@pytest.mark.parametrize("name", HF)
def test_without_upop_the_folder_loads_to_the_same_bits(abroad, name):
    root, expected = abroad
    assert_same_bits(load_file(root / f"{name}.safetensors"), expected[name])


def test_without_upop_pipelines_work(abroad):
    labels = json.loads((abroad[0] / "labels.json").read_text())
    assert labels.keys() == {n for n in HF if n.endswith("classifier") or n in ("vit", "deit")}
    assert all(label.startswith("LABEL_") for label in labels.values())


def test_without_upop_a_loaded_model_is_saved_with_its_code(abroad):
    root, expected = abroad
    assert (root / "again" / CODE).read_text() == Path(modeling_upop.__file__).read_text()
    assert_same_bits(outputs(upop.from_pretrained(root / "again")), expected["clip-classifier"])


def test_the_code_stands_alone():
    source = Path(modeling_upop.__file__).read_text()
    imports = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"collections", "dataclasses", "functools", "sys", "torch", "transformers", "typing"}


# ---------------------------------------------------------------- older transformers


class _OldAttention(nn.Module):
    """The attention of ViT, DeiT and DINOv2 in transformers 4.57."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention, name, nn.Linear(64, 64))
        self.attention.num_attention_heads, self.attention.attention_head_size = 2, 32
        self.attention.all_head_size, self.attention.scaling = 64, 32**-0.5
        self.output = nn.Module()
        self.output.dense = nn.Linear(64, 64)


def old_model():
    model = nn.Module()
    model.layer = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.layer:
        block.attention, block.intermediate, block.output = _OldAttention(), nn.Module(), nn.Module()
        block.intermediate.dense, block.output.dense = nn.Linear(64, 256), nn.Linear(256, 64)
    return model


def test_the_layout_of_older_releases_is_narrowed_too(monkeypatch):
    monkeypatch.setattr(modeling_upop.transformers, "__version__", "4.57.6")
    model = old_model()
    narrow_(model, transformers.PreTrainedConfig(attn_widths=[5, 32], head_counts=[1, 2], mlp_widths=[7, 256]))
    first, second = (block.attention.attention for block in model.layer)
    assert (first.query.weight.shape, first.value.weight.shape) == ((5, 64), (5, 64))
    assert model.layer[0].attention.output.dense.weight.shape == (64, 5)
    assert (first.num_attention_heads, first.attention_head_size, first.all_head_size) == (1, 5, 5)
    assert (second.num_attention_heads, second.attention_head_size, second.all_head_size) == (2, 32, 64)
    assert first.scaling == 32**-0.5
    assert model.layer[0].intermediate.dense.weight.shape == (7, 64)
    assert model.layer[0].output.dense.weight.shape == (64, 7)


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (lambda: make_hf("clip"), {"attn_widths": [5, 6]}),
        (lambda: make_hf("beit"), {"attn_widths": [5, 6]}),
        (lambda: make_hf("vit"), {"value_widths": [5, 6]}),
        (old_model, {"value_widths": [5, 6]}),
    ],
    ids=["clip", "beit", "values apart", "values apart, old names"],
)
def test_releases_that_would_compute_otherwise_are_refused(monkeypatch, model, widths):
    monkeypatch.setattr(modeling_upop.transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"expected transformers 5\.18 or newer for these widths, got 4\.57\.6; pip"):
        narrow_(model(), transformers.PreTrainedConfig(**widths))


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_widths": [3]}, r"attn_widths: expected 2 numbers in \[1, 32\], got \[3\]"),
        ({"value_widths": [3, 33]}, r"value_widths: expected 2 numbers in \[1, 32\], got \[3, 33\]"),
        ({"head_counts": [3, 1]}, r"head_counts: expected 2 numbers in \[1, 2\], got \[3, 1\]"),
        ({"mlp_widths": [True, 9]}, r"mlp_widths: expected 2 numbers in \[1, 256\], got \[True, 9\]"),
        ({"architectures": ["PrunedBertModel"]}, "Unrecognized configuration class"),
    ],
    ids=["too few", "too wide", "too many heads", "a bool", "another class"],
)
def test_bad_widths_of_a_composite_config_are_refused_by_name(random_lanes, tmp_path, changes, message):
    folder = tmp_path / "small"
    upop.save_pretrained(slimmed("siglip", ("attn", "mlp"), random_lanes), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message) as refused:
        upop.from_pretrained(folder)
    assert "\n" not in str(refused.value)
    shutil.rmtree(folder)


def test_slimmed_models_give_their_hidden_states_and_attentions_before_any_was_loaded():
    run = [sys.executable, "-c", MORE_OUTPUTS]
    found = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent, check=True)
    assert found.stdout.splitlines() == [f"{name} 3 2" for name in HF]
