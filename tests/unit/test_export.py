"""Promises about exported models: the same answers, in any program; or no file at all."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import upop
from upop.cli.export import export as command
from upop.config import make_config
from upop.errors import ModelError, UpopError
from upop.export import export, read_images
from upop.families import find_structures
from upop.models import LoadedModel, load_model, save_image_processor

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)
LABELS = [f"class {index}" for index in range(10)]
WAYS = [("onnx", "fp32"), ("onnx", "int8"), ("torch", "fp32"), ("torch", "bf16"), ("torch", "int8")]
# Largest difference as a fraction of the largest logit; the weights are random at full size, trained ones do better.
CLOSE = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.2}


@pytest.fixture(scope="module")
def loaded(make_model, random_keep):
    """A slimmed model with its own uneven width in every layer."""
    model = make_model("vit", width=96)
    small = upop.slim(model, random_keep(find_structures(model)))
    small.config.id2label = dict(enumerate(LABELS))
    return LoadedModel(small, image_size=32, mean=MEAN, std=STD, trained=True)


@pytest.fixture(scope="module")
def exported(loaded, images, tmp_path_factory):
    """`exported(format, variant)`: the result, made once."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def make(format, variant):
        if (format, variant) not in done:
            out = folder / f"{format}-{variant}"
            done[format, variant] = export(
                loaded, out, format=format, variant=variant, images=images(20), min_agreement=0.5
            )
        return done[format, variant]

    return make


class Plain(nn.Module):
    """A model with a config, as small as can be; `operator` is done to its logits."""

    def __init__(self, operator=torch.relu):
        super().__init__()
        self.head, self.operator = nn.Linear(3 * 8 * 8, 2), operator
        self.config = SimpleNamespace(num_labels=2, id2label={0: "no", 1: "yes"})

    def forward(self, pixel_values):
        return self.operator(self.head(pixel_values.flatten(1)))


def plain(operator=torch.relu):
    return LoadedModel(Plain(operator), image_size=8, mean=MEAN, std=STD, trained=True)


def run(path, pixels):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(pixels).detach()
    import onnxruntime

    return torch.from_numpy(onnxruntime.InferenceSession(path).run(["logits"], {"pixel_values": pixels.numpy()})[0])


@pytest.mark.parametrize(("format", "variant"), WAYS)
def test_the_file_gives_the_slimmed_models_logits_at_any_batch(exported, loaded, images, logits_of, format, variant):
    result = exported(format, variant)
    for batch in (1, 2, 7, 33):
        pixels = images(batch, seed=batch)
        expected, found = logits_of(loaded.model, pixels), run(result.path, pixels)
        assert found.dtype == torch.float32
        assert float((found - expected).abs().max()) <= CLOSE[variant] * float(expected.abs().max())


@pytest.mark.parametrize(("format", "variant"), WAYS)
def test_the_record_says_what_was_written_and_how_it_was_checked(exported, format, variant):
    result = exported(format, variant)
    record = json.loads((result.path.parent / "export.json").read_text())
    assert {p.name for p in result.path.parent.iterdir()} == {result.path.name, "export.json"}
    assert record["path"] == result.path.name == {"onnx": "model.onnx", "torch": "model.pt2"}[format]
    assert record["bytes"] == result.bytes == result.path.stat().st_size
    assert (record["format"], record["variant"], record["images"]) == (format, variant, 20)
    assert (record["checked_on"], record["batch_sizes"]) == ("data", [1, 14])
    # PyPI's builds for GPUs do not say so in their metadata.
    assert record["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert record["agreement"] == result.agreement >= 0.5
    assert 0 <= record["max_difference"] <= CLOSE[variant] * record["logit_scale"]
    if variant == "fp32":
        assert record["agreement"] == 1
    assert (record["opset"] is None) == (format == "torch")


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_int8_is_smaller_on_disk(exported, format):
    full, small = exported(format, "fp32").bytes, exported(format, "int8").bytes
    assert small < (0.45 if format == "onnx" else 0.7) * full


@pytest.mark.parametrize(("format", "variant"), [("onnx", "fp32"), ("onnx", "int8"), ("torch", "int8")])
def test_the_file_says_how_it_is_fed_and_runs_where_upop_is_not_installed(exported, images, tmp_path, format, variant):
    """Nor transformers and torchao; nor torch, for ONNX."""
    result = exported(format, variant)
    np.save(tmp_path / "images.npy", images(3).numpy())
    absent = ["upop", "transformers", "torchao", *(["torch", "onnx"] if format == "onnx" else [])]
    load = {
        "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
logits = session.run(None, {"pixel_values": images})[0]
usage = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
""",
        "torch": """
import torch
usage = {"usage.json": ""}
logits = torch.export.load(path, extra_files=usage).module()(torch.from_numpy(images)).detach().numpy()
usage = json.loads(usage["usage.json"])
""",
    }
    program = f"""
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import numpy
path, images = {str(result.path)!r}, numpy.load("images.npy")
{load[format]}
numpy.save("logits.npy", logits)
print(json.dumps(usage))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert usage["labels"] == LABELS
    assert (usage["image_size"], usage["mean"], usage["std"]) == (32, list(MEAN), list(STD))
    assert usage["input"].startswith("pixel_values: RGB in [0, 1]")
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, run(result.path, images(3)))


@pytest.mark.parametrize(("format", "variant"), WAYS)
def test_the_file_holds_no_pickled_weights_and_no_paths_of_this_machine(exported, format, variant):
    path = exported(format, variant).path
    parts = [path.read_bytes()]
    if format == "torch":
        archive = zipfile.ZipFile(path)
        parts = [archive.read(name) for name in archive.namelist()]
        weights = json.loads(archive.read("model/data/weights/model_weights_config.json"))["config"]
        assert weights
        assert not any(weight["use_pickle"] for weight in weights.values())
    for root in (Path(upop.__file__).parent, Path(torch.__file__).parent.parent):
        assert not any(str(root).encode() in part for part in parts)


def test_an_asked_for_opset_is_used(tmp_path):
    import onnx

    result = export(plain(), tmp_path / "out", opset=18)
    assert result.opset == 18
    assert [used.version for used in onnx.load(result.path).opset_import] == [18]


def test_without_images_fp32_is_checked_on_noise(tmp_path):
    result = export(plain(), tmp_path / "out", format="torch")
    assert (result.checked_on, result.images, result.source_bytes) == ("noise", 16, None)


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("upop.runtimes.MOST_IN_ONE_FILE", 1)
    result = export(plain(), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data", "export.json"}
    assert result.bytes == sum((tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    pixels = torch.randn(4, 3, 8, 8)
    small = export(plain(), tmp_path / "out", variant="int8", images=pixels, min_agreement=0, overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "export.json"}
    assert run(small.path, pixels).shape == (4, 2)


def test_the_model_stays_as_it_was(tmp_path):
    loaded, pixels = plain(), torch.randn(4, 3, 8, 8)
    model = loaded.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(loaded, tmp_path / "out", format="torch", variant="int8", images=pixels, min_agreement=0)
    assert all(module.training for module in model.modules())
    assert {name: type(value) for name, value in model.named_parameters()} == dict.fromkeys(before, nn.Parameter)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("variant", "spoil", "message"),
    [
        ("fp32", lambda x: x + 1e-3 * x.abs().max(), r"fp32 logits differ from PyTorch's by .*; nothing was written"),
        ("fp32", lambda x: x * float("nan"), "fp32 logits differ from PyTorch's by nan"),
        ("bf16", lambda x: x.flip(-1), r"bf16 logits give PyTorch's answer for .* %; nothing was written; use"),
        ("bf16", lambda x: x + float("inf"), "bf16 logits give PyTorch's answer for"),
        ("fp32", lambda x: x[:, :1], r"gives \[20, 1\] logits, expected \[20, 2\]"),
    ],
)
def test_a_file_that_fails_its_check_does_not_stay(tmp_path, monkeypatch, variant, spoil, message):
    from upop.export import _loaded

    monkeypatch.setattr("upop.export._loaded", lambda file: lambda images: spoil(_loaded(file)(images)))
    pixels = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=message) as refused:
        export(plain(nn.Identity()), tmp_path / "a" / "out", format="torch", variant=variant, images=pixels)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_of_a_model_with_one_logit_the_value_counts():
    from upop.export import _compare

    model = plain(lambda x: x[:, :1]).model
    pixels = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    agreements = [_compare(model, lambda x, by=by: by * model(x), pixels)[3] for by in (1, 1.05, -1, float("nan"))]
    assert agreements[:2] == [1, 1]
    assert agreements[2] < 0.5
    assert agreements[3] == 0


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(plain(), out, format="torch")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr("upop.export.FP32_TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="differ"):
        export(plain(), out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    monkeypatch.undo()
    export(plain(), out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {"model.onnx", "export.json"}


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(
        ModelError, match=r"Plain: the ONNX exporter has no operator for prims.bessel_j0; try ano"
    ) as e:
        export(plain(torch.special.bessel_j0), tmp_path / "out")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_model_without_logits_is_refused_by_its_name(tmp_path, format):
    with pytest.raises(
        ModelError, match=r"^Plain: expected an image classifier, which gives logits, got tuple; run a"
    ):
        export(plain(lambda x: (x, x)), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(tmp_path):
    def branches(x):
        return x if x.sum() > 0 else -x

    for format, other in (("torch", "onnx"), ("onnx", "torch")):
        with pytest.raises(ModelError, match=f"Plain: cannot be exported .*--format {other}") as refused:
            export(plain(branches), tmp_path / "out", format=format)
        assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onxn"}, r"format: expected one of onnx, torch, got 'onxn'; did you mean 'onnx'\?"),
        ({"variant": "int4"}, r"variant: expected one of fp32, bf16, int8, got 'int4'; did you mean 'int8'\?"),
        ({"variant": "bf16"}, r"variant bf16: ONNX Runtime cannot .*; use --variant int8, or --format torch"),
        ({"variant": "int8"}, r"variant int8: expected images to check it on, got none; give --data"),
        ({"format": "torch", "opset": 18}, r"opset 18: format torch has none"),
        ({"opset": 3}, r"opset 3: the exporter wrote opset 18 in its place; use that, or leave it out"),
        ({"min_agreement": 95}, r"min_agreement: expected a fraction in \[0, 1\], got 95"),
        ({"images": torch.zeros(2, 3, 8, 8)}, r"images: expected 3 to 256 of \[3, 8, 8\].*got \[2, 3, 8, 8\]"),
        ({"images": torch.zeros(4, 3, 9, 9)}, r"images: expected 3 to 256 of \[3, 8, 8\].*got \[4, 3, 9, 9\]"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(UpopError, match=message) as refused:
        export(plain(), tmp_path / "out", **options)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_takes_away_what_one_that_was_killed_has_left(tmp_path):
    (tmp_path / ".export-killed.partial").mkdir()
    (tmp_path / ".export-killed.partial" / "model.pt2").write_text("half of it")
    export(plain(), tmp_path, format="torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]


def test_folders_of_others_and_earlier_exports_are_not_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UpopError, match=r"holds thesis.tex, which no export wrote; choose a new or empty folder"):
        export(plain(), tmp_path / "mine", overwrite=True)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "export.json").write_text("{}")
    with pytest.raises(UpopError, match="already holds an export; choose another folder, or say --overwrite"):
        export(plain(), tmp_path / "done")
    with pytest.raises(UpopError, match=r"model.onnx: expected a folder"):
        export(plain(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("onnxruntime", {}, r'onnxruntime not installed; run: pip install "upop\[onnx\]"'),
        (
            "torchao",
            {"format": "torch", "variant": "int8"},
            r'torchao not installed; run: pip install "upop\[torchao\]"',
        ),
    ],
)
def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch, missing, options, message):
    for module in ("export", "runtimes"):
        monkeypatch.setattr(f"upop.{module}.find_spec", lambda name: None if name == missing else True)
    with pytest.raises(UpopError, match=message):
        export(plain(), tmp_path / "out", **options)


@pytest.fixture(scope="module")
def folder(make_model, random_keep, tmp_path_factory):
    """A slimmed model for digits, as a run leaves it."""
    model = make_model("vit", image=16, patch=4)
    small = upop.slim(model, random_keep(find_structures(model)))
    folder = tmp_path_factory.mktemp("run") / "model"
    upop.save_pretrained(small, folder)
    save_image_processor(folder, LoadedModel(small, image_size=16, mean=MEAN, std=STD, trained=True))
    return folder


def test_images_to_check_on_are_spread_over_the_split_and_normalised_as_the_model_wants(folder):
    from upop.plan import read_data

    config = make_config({"model": str(folder), "data": "digits"})
    split = read_data(config, load_model(str(folder))).test
    found = read_images(config, "test")
    assert found.shape == (min(256, len(split)), 3, 16, 16)
    last = (split.images[-1].float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    if split.images.shape[2:] == (16, 16):
        torch.testing.assert_close(found[-1], last)
    with pytest.raises(UpopError, match=r"split: expected one of validation, test, got 'tset'; did you mean 'test'\?"):
        read_images(config, "tset")


def test_the_command_exports_a_folder_and_says_what_it_checked(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command(str(folder), out=out, format="torch", data="digits", subset="60")
    said = capsys.readouterr().out
    record = json.loads((out / "export.json").read_text())
    assert record["source_bytes"] == (folder / "model.safetensors").stat().st_size
    assert (record["images"], record["checked_on"]) == (60, "data")
    assert f"{out / 'model.pt2'}: fp32" in said
    assert "checked on 60 images (data) at batch (1, 12, 32)" in said
    assert "top-1 agrees on 100.0 %" in said


def test_the_command_refuses_before_it_loads_anything(tmp_path):
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(UpopError, match="mine: expected a folder"):
        command("no such model", out=tmp_path / "mine", data="no such data")


def test_the_program_in_the_documentation_names_the_class_of_a_picture(
    exported, loaded, tmp_path, monkeypatch, capsys
):
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    program = text.split("```python")[1].split("```")[0]
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/half").symlink_to(exported("onnx", "fp32").path.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    normal = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert capsys.readouterr().out.strip() == LABELS[int(loaded.model(normal).logits.argmax())]
