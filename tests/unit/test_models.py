"""Models come ready for the data: in float32, with its classes in its order, and with known image statistics."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import BeitConfig, BeitForMaskedImageModeling, ResNetConfig, ResNetForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import upop
from upop.config import make_config
from upop.data import Batches, load_data
from upop.errors import ModelError
from upop.models import CIFAR_MEAN, LoadedModel, fit_head_, load_model, save_image_processor
from upop.plan import read_data


def test_built_in_shapes_are_the_same_for_the_same_seed():
    first, second, other = (load_model("deit-digits", seed=seed).model for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert load_model("deit-tiny-cifar").mean == CIFAR_MEAN


def test_a_shape_can_be_varied():
    config = load_model("deit-tiny-cifar-6layers-patch8-width96").model.config
    assert (config.num_hidden_layers, config.patch_size, config.num_attention_heads) == (6, 8, 3)
    assert (config.hidden_size, config.intermediate_size, config.image_size) == (96, 384, 32)
    with pytest.raises(ModelError, match=r"a width that 3 heads share .* got width 100 and patch 4"):
        load_model("deit-tiny-cifar-width100")
    for name in ("deit-tiny-cifar-0layers", "deit-tiny-cifar-width", "deit-tiny-cifar-6layers-6layers"):
        with pytest.raises(ModelError, match="expected a built-in shape"):
            load_model(name)


def test_a_folder_is_loaded_even_if_it_is_called_like_a_shape_that_cannot_be(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("deit-tiny-width100")
    assert load_model("deit-tiny-width100").trained


def test_a_folder_saved_in_bfloat16_is_trained_and_judged_in_float32(make_model, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(str(tmp_path)).model.parameters()} == {torch.float32}


def test_the_same_classes_in_another_order_give_the_same_answers_by_name(make_model):
    model = make_model("teacher", labels=3)
    model.config.id2label = {0: "dog", 1: "cat", 2: "ant"}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixel_values=x).logits
        fit_head_(model, ("ant", "cat", "dog"), name="mine", replace=False)
        after = model(pixel_values=x).logits
    assert torch.allclose(after, before[:, [2, 1, 0]], atol=1e-6)
    assert model.config.label2id == {"ant": 0, "cat": 1, "dog": 2}


def test_names_that_differ_in_case_and_dashes_are_the_same_names(make_model):
    model = make_model(labels=3)
    model.config.id2label = {0: "Dog", 1: "Golden_retriever", 2: "ant"}
    weight = model.classifier.weight.detach().clone()
    assert fit_head_(model, ("ant", "dog", "golden retriever"), name="mine", replace=False) == ()
    assert torch.equal(model.classifier.weight, weight[[2, 0, 1]])
    assert model.config.id2label == {0: "ant", 1: "dog", 2: "golden retriever"}


def test_a_head_that_is_kept_with_names_of_its_own_is_said_aloud(make_model):
    (note,) = fit_head_(make_model(labels=3), ("ant", "cat", "dog"), name="mine", replace=False)
    assert note.startswith(
        "mine: its classes are called LABEL_0, LABEL_1, LABEL_2, ..., the data's ant, cat, dog, ..."
    )
    # One that is trained learns what they mean.
    assert fit_head_(make_model(labels=3), ("ant", "cat", "dog"), name="mine", replace=True) == ()


def test_a_head_of_another_size_is_refused_or_replaced(make_model):
    with pytest.raises(ModelError, match="mine: its head has 10 labels, the data 4 classes"):
        fit_head_(make_model(), tuple("abcd"), name="mine", replace=False)
    model = make_model("teacher")
    fit_head_(model, tuple("abcd"), name="mine", replace=True)
    assert model(pixel_values=torch.randn(2, 3, 32, 32)).logits.shape == (2, 4)


@pytest.mark.parametrize("name", ["vit", "teacher"])
def test_a_model_without_labels_gets_a_head(make_model, images, logits_of, tmp_path, name):
    model = make_model(name, labels=0)
    fit_head_(model, tuple("abcd"), name="mine", replace=True)
    upop.save_pretrained(model, tmp_path)
    loaded = upop.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, images()), logits_of(model, images()))
    assert logits_of(loaded, images()).shape == (4, 4)


def test_a_fresh_head_does_not_answer_the_old_ones_problem(make_model):
    model = make_model(problem_type="multi_label_classification")
    fit_head_(model, tuple(model.config.id2label.values()), name="mine", replace=True)
    assert model.config.problem_type == "multi_label_classification"
    fit_head_(model, tuple("abcd"), name="mine", replace=True)
    assert model.config.problem_type is None


def test_image_statistics_that_nobody_states_are_assumed_aloud(make_model, tmp_path):
    make_model("vit").save_pretrained(tmp_path / "plain")
    loaded = load_model(str(tmp_path / "plain"))
    assert loaded.mean == (0.5, 0.5, 0.5)
    assert "assumed mean" in loaded.notes[0]


@pytest.mark.parametrize("content", ["{", json.dumps({"image_mean": 0.5, "image_std": 0.5})])
def test_image_statistics_that_make_no_sense_are_refused(make_model, tmp_path, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(
        ModelError,
        match=r"preprocessor_config\.json: (expected readable JSON, got .*; correct or remove it|expected 3 means)",
    ):
        load_model(str(tmp_path))


def test_a_backbone_without_a_head_will_do_where_a_new_head_is_trained(make_model, tmp_path):
    make_model().vit.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="missing keys"):
        load_model(str(tmp_path))
    model = load_model(str(tmp_path), new_head=True).model
    fit_head_(model, tuple("abcd"), name="mine", replace=True)
    assert model(pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 4)


def test_a_model_trained_to_fill_in_what_is_masked_will_do_too(tmp_path):
    from transformers import ViTConfig, ViTForMaskedImageModeling

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    whole = ViTForMaskedImageModeling(ViTConfig(**sizes, encoder_stride=8))
    whole.save_pretrained(tmp_path)
    body = load_model(str(tmp_path), new_head=True).model.vit.state_dict()
    assert all(torch.equal(value, whole.vit.state_dict()[name]) for name, value in body.items())


def test_so_will_a_beit_that_fills_in_what_is_masked(tmp_path):
    shape = dict(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = BeitForMaskedImageModeling(BeitConfig(**shape, intermediate_size=64, vocab_size=20))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), new_head=True)
    fit_head_(loaded.model, tuple("abcd"), name="mine", replace=True)
    assert loaded.model(pixel_values=torch.randn(1, 3, 16, 16)).logits.shape == (1, 4)
    name = "beit.layers.1.mlp.fc1.weight"
    assert torch.equal(loaded.model.get_parameter(name), model.get_parameter(name))
    with pytest.raises(ModelError, match="4 missing keys"):
        load_model(str(tmp_path))


def test_the_image_half_of_a_two_tower_model_will_do_too(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes | {"vocab_size": 50}))
    whole.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), new_head=True)
    assert loaded.image_size == 32
    fit_head_(loaded.model, tuple("abcd"), name="mine", replace=True)
    assert loaded.model(pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 4)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(loaded.model.get_parameter(name), whole.state_dict()[name])


def test_a_model_whose_config_names_no_image_size_is_refused(tmp_path):
    shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"image_size .* got a ResNetForImageClassification without image_size"):
        load_model(str(tmp_path))


def test_models_of_grey_images_are_refused(make_model, tmp_path):
    make_model(num_channels=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"square RGB images, got image_size 32 and 1 channel"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "sizes",
    [[(64, 64)], [(96, 64)], [(40, 120)], [(64, 64), (96, 48), (50, 70)]],
    ids=["square", "wide", "tall", "mixed"],
)
def test_the_saved_processor_sees_what_accuracy_is_measured_on(make_model, tmp_path, sizes):
    """Smooth pictures: how two libraries resize noise is not the question, but which part of a picture they see."""
    y, x = np.mgrid[0:1:128j, 0:1:128j]
    for number in range(24):
        pixels = np.stack([x, y, x * y], -1) * 255
        file = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).resize(sizes[number % len(sizes)], Image.Resampling.BILINEAR).save(
            file
        )
    data = load_data(str(tmp_path / "data"), image_size=32)
    loaded = LoadedModel(make_model(), 32, (0.4,) * 3, (0.2,) * 3, trained=True, shorter_side=data.shorter_side)
    save_image_processor(tmp_path, loaded)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    how = {"size": 32, "mean": (0.4,) * 3, "std": (0.2,) * 3, "num_classes": 2, "device": torch.device("cpu")}
    batches = Batches(data.train, batch_size=64, **how)
    ours = torch.cat([images for images, _ in batches])
    files = [Image.open(path) for path in sorted((tmp_path / "data").rglob("*.png"))]
    theirs = processor(images=files, return_tensors="pt")["pixel_values"]
    distance = (ours[:, None] - theirs[None]).abs().flatten(2).amax(2).amin(1)
    assert float(distance.max()) < 0.1, "four of 256 steps: crops round to a pixel"


def test_the_processor_of_a_folder_says_how_its_images_are_cut(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    save_image_processor(tmp_path, LoadedModel(model, 32, (0.5,) * 3, (0.5,) * 3, trained=True, shorter_side=37))
    assert load_model(str(tmp_path)).shorter_side == 37


@pytest.mark.parametrize(
    ("said", "shorter"),
    [
        ({"size": {"height": 32, "width": 32}}, 32),  # ViTImageProcessor's: nothing is cut off
        ({"size": {"shortest_edge": 40}, "do_center_crop": False}, 32),
        ({"size": {"shortest_edge": 32}, "do_center_crop": True}, 32),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True}, 40),
        ({"size": {"height": 40, "width": 40}, "do_center_crop": True}, 40),  # DeiTImageProcessor's
        ({"size": 40, "do_center_crop": True}, 40),  # as older releases write it
        (None, 37),  # nobody says: 256/224
    ],
    ids=repr,
)
def test_a_models_own_processor_says_how_much_of_images_of_many_sizes_is_cut_off(make_model, tmp_path, said, shorter):
    make_model().save_pretrained(tmp_path / "model")
    if said is not None:
        whole = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 32, "width": 32}, **said}
        (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(whole))
    y, x = np.mgrid[0:1:128j, 0:1:128j]
    picture = Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype("uint8"))
    for number in range(24):
        file = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((0, 0, 128, 90 + number)).save(file)
    loaded = load_model(str(tmp_path / "model"))
    config = make_config({"model": str(tmp_path / "model"), "data": str(tmp_path / "data")})
    data = read_data(config, loaded)
    assert data.shorter_side == shorter
    border = (1 - 32 / shorter) / 2
    files = [Image.open(path) for path in sorted((tmp_path / "data").rglob("*.png"))]
    expected = np.stack([ImageOps.fit(file, (32, 32), Image.Resampling.BICUBIC, bleed=border) for file in files])
    seen = torch.cat([split.images for split in (data.train, data.validation, data.test)]).permute(0, 2, 3, 1)
    distance = (seen[:, None].int() - torch.from_numpy(expected)[None].int()).abs().flatten(2).amax(2).amin(1)
    # A border of a sixteenth would be off by 16 of 256 steps at the edges.
    assert int(distance.max()) <= 6, "crops round to a pixel"


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
    ],
)
def test_images_are_scaled_as_the_folders_processor_scales_them(make_model, tmp_path, said, mean, std):
    make_model().save_pretrained(tmp_path)
    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | said))
    loaded = load_model(str(tmp_path))
    assert loaded.mean == pytest.approx((mean,) * 3)
    assert loaded.std == pytest.approx((std,) * 3)
    assert loaded.notes == ()


@pytest.mark.parametrize(
    "said",
    [
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True},
        {"size": {"height": 24, "width": 24}},
    ],
    ids=["cut", "squashed"],
)
def test_a_processor_of_smaller_images_than_the_config_names_is_said_aloud(make_model, tmp_path, said):
    make_model().save_pretrained(tmp_path)
    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | said))
    loaded = load_model(str(tmp_path))
    assert loaded.image_size == 32
    (note,) = loaded.notes
    assert "preprocessor_config.json makes images of 24 pixels, its config.json says 32: taken to be 32" in note
