"""Promises of upop.pretrained: ordinary folders, the same logits in a fresh process, clear refusal of bad ones."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import upop
from upop.errors import ModelError
from upop.families import find_structures
from upop.masks import Masks

NAMES = ["vit", "deit", "teacher"]
FC1_BIAS = "vit.layers.1.mlp.fc1.bias"
STORED_FC1_BIAS = "vit.encoder.layer.1.intermediate.dense.bias"

FRESH_PROCESS = """
import json, sys
from pathlib import Path
import upop
early = any(name.endswith("modeling_vit") for name in sys.modules)
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
root, names = Path(sys.argv[1]), sys.argv[2:]
pixels = load_file(root / "pixels.safetensors")["pixels"]
found = {"modeling_imported_by_upop": early}
for name in names:
    auto = AutoModelForImageClassification.from_pretrained(root / name).eval()
    ours = upop.from_pretrained(root / name)
    with torch.no_grad():
        logits = {"auto": auto(pixels).logits, "ours": ours(pixels).logits}
    save_file(logits, root / f"{name}.logits.safetensors")
    found[name] = [type(auto).__name__, type(ours).__name__, auto.config.model_type, ours.training]
(root / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(make_model, images, logits_of, random_keep, tmp_path_factory):
    """A folder with one slimmed model per class, and the models by name."""
    root = tmp_path_factory.mktemp("slimmed")
    models = {}
    for name in NAMES:
        model = make_model(name)
        models[name] = upop.slim(model, random_keep(find_structures(model)))
        upop.save_pretrained(models[name], root / name)
    save_file({"pixels": images()}, root / "pixels.safetensors")
    return root, models


@pytest.fixture(scope="module")
def fresh(folders):
    """What a fresh process sees in the folders."""
    root, _ = folders
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(root), *NAMES], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_bit_identical_in_a_fresh_process(folders, fresh, images, logits_of, name):
    root, models = folders
    expected = logits_of(models[name], images())
    found = load_file(root / f"{name}.logits.safetensors")
    assert torch.equal(found["ours"], expected)
    assert torch.equal(found["auto"], expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", "PrunedViTForImageClassification"),
        ("deit", "PrunedDeiTForImageClassification"),
        ("teacher", "PrunedDeiTForImageClassificationWithTeacher"),
    ],
)
def test_the_auto_class_gives_the_pruned_class_after_import_upop(fresh, name, expected):
    auto, ours, model_type, training = fresh[name]
    assert auto == ours == expected
    assert model_type == ("upop_vit" if name == "vit" else "upop_deit")
    assert training is False


def test_import_upop_does_not_import_transformers_model_code(fresh):
    assert fresh["modeling_imported_by_upop"] is False


@pytest.mark.parametrize("name", NAMES)
def test_nothing_pickled_is_in_the_folder(folders, name):
    files = sorted(path.name for path in (folders[0] / name).iterdir())
    assert files == ["config.json", "model.safetensors", "modeling_upop.py"]
    config = json.loads((folders[0] / name / "config.json").read_text())
    assert (config["attn_widths"], config["mlp_widths"]) == ([19, 19], [153, 153])


def test_labels_and_widths_survive_saving(make_model, random_keep, tmp_path):
    model = make_model(labels=2, id2label={0: "cat", 1: "dog"})
    small = upop.slim(model, random_keep(find_structures(model)))
    upop.save_pretrained(small, tmp_path)
    loaded = upop.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    linears = [m for m in loaded.modules() if isinstance(m, nn.Linear)]
    assert all((m.out_features, m.in_features) == m.weight.shape for m in linears)
    assert {m.scaling for m in loaded.modules() if hasattr(m, "scaling")} == {32**-0.5}


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_slimmed_model_can_be_pruned_and_saved_again(folders, images, logits_of, tmp_path, name):
    model = upop.from_pretrained(folders[0] / name)
    search = upop.Search(model, target=upop.Target(prunable=0.3), steps=2)
    for seed in (0, 1):
        loss = torch.nn.functional.cross_entropy(model(images(seed=seed)).logits, torch.arange(4))
        (loss + search.penalty()).backward()
        search.step()
    smaller = search.slim()
    torch.testing.assert_close(logits_of(smaller, images()), logits_of(model, images()), rtol=0, atol=1e-5)
    assert max(smaller.config.mlp_widths) <= 153
    upop.save_pretrained(smaller, tmp_path)
    reloaded = upop.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert torch.equal(logits_of(reloaded, images()), logits_of(smaller, images()))


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_folder_loads_as_what_it_is(make_model, images, logits_of, tmp_path, name):
    model = make_model(name)
    upop.save_pretrained(model, tmp_path)
    loaded = upop.from_pretrained(str(tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits_of(loaded, images()), logits_of(model, images()))


@pytest.mark.parametrize("name", NAMES)
def test_a_users_own_subclass_is_slimmed_saved_and_loaded(make_model, images, logits_of, random_keep, tmp_path, name):
    model = make_model(name)
    model.__class__ = type("Mine", (type(model),), {})
    small = upop.slim(model, random_keep(find_structures(model)))
    upop.save_pretrained(small, tmp_path)
    assert torch.equal(logits_of(upop.from_pretrained(tmp_path), images()), logits_of(small, images()))


def test_saving_during_a_search_saves_the_models_own_weights(make_model, images, logits_of, tmp_path):
    model = make_model()
    logits = logits_of(model, images())
    Masks(model, find_structures(model)).set_({s.name: torch.zeros(s.units) for s in find_structures(model)})
    upop.save_pretrained(model, tmp_path)
    assert torch.equal(logits_of(upop.from_pretrained(tmp_path), images()), logits)


def auto(folder, **keywords):
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, **keywords).eval()


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_attention_can_be_chosen_when_loading(folders, images, logits_of, name):
    root, models = folders
    loaded = auto(root / name, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = auto(root / name, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert logits_of(loaded, images()).shape == (4, 10)
    torch.testing.assert_close(logits_of(loaded, images()), logits_of(models[name], images()))


def test_a_slimmed_config_builds_a_model_of_its_widths(folders):
    from transformers import AutoConfig, AutoModelForImageClassification

    built = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folders[0] / "vit"))
    assert built.vit.layers[0].mlp.fc1.weight.shape == (153, 64)
    assert built.vit.layers[1].attention.q_proj.weight.shape == (2 * 19, 64)


# ---------------------------------------------------------------- what cannot be used


def edit_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(edit):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "only pickled weights": (pickle_weights, "model.safetensors"),
    "truncated weights": (truncate, "Safetensor"),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"bad/config\.json: expected readable JSON, got .*; copy or download the folder again",
    ),
    "unknown model type": (edit_config(model_type="upop_vitt"), "upop_vitt"),
    "too few widths": (edit_config(attn_widths=[3]), r"attn_widths.*expected 2 numbers in \[1, 32\], got \[3\]"),
    "width too large": (edit_config(attn_widths=[3, 33]), r"attn_widths.*\[1, 32\], got \[3, 33\]"),
    "width zero": (edit_config(mlp_widths=[0, 9]), r"mlp_widths.*\[1, 256\], got \[0, 9\]"),
    "width negative": (edit_config(mlp_widths=[9, -9]), r"mlp_widths.*\[1, 256\], got \[9, -9\]"),
    "width is text": (edit_config(mlp_widths=["a", 9]), "mlp_widths"),
    "width is a fraction": (edit_config(mlp_widths=[1.5, 9]), "mlp_widths"),
    "width is a bool": (edit_config(mlp_widths=[True, 9]), "mlp_widths"),
    "widths are one number": (edit_config(mlp_widths=9), "mlp_widths"),
    "widths of other weights": (edit_config(mlp_widths=[9, 9]), r"vit\.layers\.0\.mlp\.fc1"),
    "missing tensor": (edit_weights(lambda w: w.pop(STORED_FC1_BIAS)), rf"missing.*{re.escape(FC1_BIAS)}"),
    "unexpected tensor": (edit_weights(lambda w: w.update(extra=torch.zeros(1))), "unexpected.*extra"),
    "tensor of the wrong shape": (
        edit_weights(lambda w: w.update({STORED_FC1_BIAS: torch.zeros(3)})),
        re.escape(FC1_BIAS),
    ),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_folder_is_refused_in_one_line_that_names_it(folders, tmp_path, problem):
    change, message = BAD[problem]
    folder = tmp_path / "bad"
    shutil.copytree(folders[0] / "vit", folder)
    assert upop.from_pretrained(folder) is not None
    change(folder)
    with pytest.raises(ModelError, match=message) as refused:
        upop.from_pretrained(folder)
    text = str(refused.value)
    assert "\n" not in text
    assert str(folder) in text or text.startswith("config.json")
    assert "ignore_mismatched_sizes" not in text, "not an option of ours"


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "nowhere"))):
        upop.from_pretrained(tmp_path / "nowhere")


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_refused_by_name():
    with pytest.raises(ModelError, match=r"^nobody/nothing: no such local folder, and not to be had from the Hub"):
        upop.from_pretrained("nobody/nothing")


def test_code_in_a_folder_is_never_run(folders, tmp_path):
    folder, trace = tmp_path / "bad", tmp_path / "trace"
    shutil.copytree(folders[0] / "vit", folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    edit_config(
        model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    )(folder)
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        upop.from_pretrained(folder)
    assert not trace.exists()


def test_a_model_that_cannot_save_itself_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"^Sequential: expected a Hugging Face model"):
        upop.save_pretrained(nn.Sequential(nn.Linear(2, 2)), tmp_path)


class Doubled(transformers.ViTForImageClassification):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).logits * 2


class Larger(transformers.ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(3, 3)


def slimmed(model, head=None):
    if head is not None:
        model.classifier = head
    return upop.slim(model, {s.name: torch.arange(s.units) < s.units // 2 for s in find_structures(model)})


def outer_model(config):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    text = sizes | {"vocab_size": 50}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=sizes | {"image_size": 32, "patch_size": 8}, text_config=text)
    )
    model.vision_model = slimmed(model.vision_model)
    return model


NOT_WHAT_COMES_BACK = {
    "an outer model": (outer_model, r"^CLIPModel: a folder would .* another model: vision_model\..*save its slimmed"),
    "a forward of its own": (lambda config: slimmed(Doubled(config)), "^Doubled: expected the forward of ViTForIm"),
    "more layers": (lambda config: slimmed(Larger(config)), r"more\.weight: expected \(3, 3\), its config makes None"),
    "another head": (
        lambda config: slimmed(transformers.ViTForImageClassification(config), nn.Sequential(nn.Linear(64, 2))),
        r"classifier\.0\.weight: expected \(2, 64\), its config makes None",
    ),
    "more labels": (
        lambda config: slimmed(transformers.ViTForImageClassification(config), nn.Linear(64, 10)),
        r"classifier\.weight: expected \(10, 64\), its config makes \(2, 64\); say so in its config \(num_labels\)",
    ),
}


@pytest.mark.parametrize("what", NOT_WHAT_COMES_BACK)
def test_a_model_that_would_come_back_as_another_is_refused_before_anything_is_written(make_model, tmp_path, what):
    make, message = NOT_WHAT_COMES_BACK[what]
    model = make(make_model(labels=2).config)
    with pytest.raises(ModelError, match=message) as refused:
        upop.save_pretrained(model, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_saving_over_a_file_is_refused_by_name(folders, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ModelError, match=re.escape(str(path))):
        upop.save_pretrained(folders[1]["vit"], path)
    assert path.read_text() == "mine"


def test_saving_below_a_file_is_refused_by_name(folders, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "file" / "model"))):
        upop.save_pretrained(folders[1]["vit"], tmp_path / "file" / "model")
