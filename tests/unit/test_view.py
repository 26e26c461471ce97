"""What `upop view` finds, reads and says, without its page."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upop
from upop import view
from upop.errors import DataError, ModelError
from upop.folder import weights_hash
from upop.models import load_model, save_image_processor
from upop.view import find_folders, load_viewed, predict, read_image, width_rows

LABELS = ["cat", "dog", "owl", "fox", "bee", "ant"]


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """What `upop prune` leaves: a dense model and its slimmed twin, with a result."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    dense = make_model("vit", image=16, patch=8, width=32, labels=len(LABELS))
    dense.config.id2label = dict(enumerate(LABELS))
    keep = {s.name: torch.arange(s.units) < s.units // 2 for s in upop.analyze(dense).structures}
    for name, model in (("dense", dense), ("model", upop.slim(dense, keep))):
        upop.save_pretrained(model, folder / name)
        save_image_processor(folder / name, load_model(str(folder / name)))
    result = {
        "weights": weights_hash(folder / "model"),
        "accuracy": {"dense": {"test": 0.75}, "search": {"validation": 0.5}, "retrain": {"test": 0.625}},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def models(run):
    return load_viewed(find_folders([str(run)]), device="cpu")


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(width=40, height=30, seed=0):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# ---------------------------------------------------------------- which models


def test_a_run_is_its_dense_and_its_pruned_model(run, models):
    assert find_folders([str(run)]) == {"dense": run / "dense", "pruned": run / "model"}
    dense, pruned = models
    assert pruned.params == sum(p.numel() for p in upop.from_pretrained(run / "model").parameters()) < dense.params
    assert pruned.macs < dense.macs
    assert dense.widths == {"attn": [16, 16], "mlp": [128, 128]}
    assert pruned.widths == {"attn": [8, 8], "mlp": [64, 64]}
    assert (dense.accuracy, pruned.accuracy) == (0.75, 0.625)


def test_any_model_folders_can_be_compared_and_one_that_comes_twice_is_shown_once(run):
    assert find_folders([str(run / "model")]) == {"model": run / "model"}
    both = find_folders([str(run), str(run / "model"), str(run / "dense")])
    assert list(both.values()) == [run / "dense", run / "model"]
    assert list(both) == ["half dense", "half pruned"]


def test_runs_that_began_from_one_dense_model_share_it(run, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        small = upop.from_pretrained(run / "model")
        torch.nn.init.normal_(small.classifier.weight)
        upop.save_pretrained(small, folder / "model")
        (folder / "result.json").write_text(json.dumps({"config": {"model": str(run / "dense")}}))
    found = find_folders([str(tmp_path / "a"), str(tmp_path / "b")])
    assert list(found.values()) == [run / "dense", tmp_path / "a/model", tmp_path / "b/model"]
    assert list(found) == ["a dense", "a pruned", "b pruned"]


def test_what_holds_no_model_is_refused_and_a_folder_of_runs_names_one(run, tmp_path):
    with pytest.raises(ModelError, match=r"absent: expected .*, there is no such folder"):
        find_folders([str(tmp_path / "absent")])
    with pytest.raises(ModelError, match=r"found neither$"):
        find_folders([str(tmp_path)])
    with pytest.raises(ModelError, match=r"found neither; did you mean .*half\?$"):
        find_folders([str(run.parent)])


def test_an_accuracy_of_other_weights_is_not_shown(run, tmp_path):
    folder = tmp_path / "changed"
    small = upop.from_pretrained(run / "model")
    torch.nn.init.normal_(small.classifier.weight)
    upop.save_pretrained(small, folder / "model")
    (folder / "result.json").write_text((run / "result.json").read_text())
    [only] = load_viewed(find_folders([str(folder)]), device="cpu")
    assert only.accuracy is None


# ---------------------------------------------------------------- what they say


def test_predictions_are_those_of_the_pipeline(run, models):
    from transformers import pipeline

    image = noise()
    for found, name in zip(predict(models, image, seconds=0.01), ("dense", "model"), strict=True):
        wanted = pipeline("image-classification", model=str(run / name))(image, top_k=view.TOP)
        assert [label for label, _ in found.top] == [entry["label"] for entry in wanted]
        assert [share for _, share in found.top] == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)
        assert len(found.top) == 5
        assert found.ms > 0


@pytest.mark.parametrize(("labels", "problem"), [(1, None), (3, "multi_label_classification")])
def test_labels_that_do_not_exclude_each_other_are_as_likely_as_the_pipeline_says(
    make_model, tmp_path, labels, problem
):
    model = make_model("vit", image=16, patch=8, width=32, labels=labels)
    model.config.problem_type = problem
    upop.save_pretrained(model, tmp_path)
    save_image_processor(tmp_path, load_model(str(tmp_path)))
    [mine] = predict(load_viewed({"mine": tmp_path}, device="cpu"), noise(), seconds=0)
    from transformers import pipeline

    theirs = pipeline("image-classification", model=str(tmp_path))(noise())
    assert dict(mine.top) == pytest.approx({found["label"]: found["score"] for found in theirs}, abs=1e-6)


def test_a_model_that_names_no_classes_is_refused(make_model, tmp_path):
    model = make_model("vit", image=16, patch=8, width=32, labels=1)
    model.config.problem_type = "regression"
    upop.save_pretrained(model, tmp_path)
    with pytest.raises(ModelError, match="expected a classifier, got a model for regression"):
        load_viewed({"mine": tmp_path}, device="cpu")


def test_a_model_without_a_processor_gets_images_as_training_would_give_them(run, tmp_path):
    bare = tmp_path / "bare"
    upop.save_pretrained(upop.from_pretrained(run / "dense"), bare)
    [theirs] = predict(load_viewed({"a": bare}, device="cpu"), noise(), seconds=0.01)
    [ours] = predict(load_viewed({"a": run / "dense"}, device="cpu"), noise(), seconds=0.01)
    assert [label for label, _ in theirs.top] == [label for label, _ in ours.top]


@pytest.mark.parametrize("said", [{"size": 12}, {"size": {"shortest_edge": 16}}, {"do_resize": False}], ids=str)
def test_a_processor_of_images_that_the_model_does_not_take_is_left_aside(run, tmp_path, said):
    shutil.copytree(run / "dense", tmp_path, dirs_exist_ok=True)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | said))
    [found] = predict(load_viewed({"a": tmp_path}, device="cpu"), noise(), seconds=0)
    assert len(found.top) == 5


def test_widths_are_drawn_against_the_widest_of_their_kind(models):
    head_dims, neurons = width_rows(models)
    assert (head_dims.label, head_dims.widest, head_dims.layers) == ("head dims", 16, 2)
    assert neurons.models == (("dense", (128, 128)), ("pruned", (64, 64)))


# ---------------------------------------------------------------- pictures of all kinds


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (17, 5)])
def test_pictures_of_every_mode_and_shape_get_an_answer(mode, size, models):
    image = noise(*size)
    image = Image.new("I;16", size, 40_000) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    found = read_image(file.getvalue())
    assert (found.mode, found.size) == ("RGB", size)
    assert all(sum(share for _, share in each.top) <= 1.0001 for each in predict(models, found, seconds=0.01))


def test_a_photograph_that_lies_on_its_side_is_turned():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 30).save(file, "JPEG", exif=exif)
    assert read_image(file.getvalue()).size == (30, 40)


def bomb(side=30_000):
    """A PNG of a few bytes that says it is of 900 megapixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a picture", "this is not an image; expected one of PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "this is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "this is not an image"),
        (png(noise())[:-800], "this image cannot be read"),
        (png(noise())[:20], "image"),
        (bomb(9_000), "at most 64 megapixels, got 9,000 x 9,000 pixels"),
        (bomb(), "megapixels|decompression bomb"),
    ],
    ids=["empty", "text", "svg", "postscript", "cut", "header", "large", "bomb"],
)
def test_what_is_no_usable_picture_is_one_clear_line(data, message):
    with pytest.raises(DataError, match=message) as error:
        read_image(data)
    assert "\n" not in str(error.value)


def test_samples_are_test_images_with_their_classes():
    found = view.samples("digits")
    assert len(found) == view.SAMPLES
    assert {label for label, _ in found} <= set("0123456789")
    assert all(read_image(file).size == (8, 8) for _, file in found)
    assert Path("digits").exists() is False


def test_samples_are_there_for_many_classes(tmp_path):
    for number in range(3 * 120):
        file = tmp_path / "data" / f"class{number // 3:03}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(file)
    assert len(view.samples(str(tmp_path / "data"))) == view.SAMPLES


def test_samples_show_the_whole_central_square_and_leave_out_what_is_broken(tmp_path):
    """Pictures of many sizes, white but for a black frame of two pixels around the central square."""
    for number in range(60):
        file = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (40 + number, 40))
        picture.paste(255, (number // 2 + 2, 2, number // 2 + 38, 38))
        picture.save(file)
    (tmp_path / "data/a/00.png").write_bytes(b"broken")
    (tmp_path / "data/a/notes.txt").write_text("")
    for _, file in view.samples(str(tmp_path / "data")):
        grey = np.asarray(read_image(file))[..., 0]
        assert grey.shape == (224, 224)
        assert np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).max() < 40
        assert grey[20:-20, 20:-20].min() > 215
