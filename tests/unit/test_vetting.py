"""A model folder is judged before anything is built from it: it cannot take memory, time or the machine."""

import json
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import upop
from upop.errors import ModelError
from upop.folder import weights_hash
from upop.models import load_model
from upop.vetting import vet


@pytest.fixture(scope="module")
def sound(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "model"
    make_model(labels=2, image=8, patch=4, width=16).save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def weights(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder, **names):
    """Two files of weights and their index, with other names in it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors", {"format": "pt"})
    index = {name: f"model-{int(place >= half)}.safetensors" for place, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index | names}))


def twice(folder):
    shards(folder)
    tensors = load_file(folder / "model-0.safetensors")
    save_file(tensors, folder / "model-2.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["another"] = "model-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(Vtouch executed\ntR.")

    return change


HOSTILE = {
    "a billion layers": (lambda f: config(f, num_hidden_layers=10**9), r"num_hidden_layers: expected a number that"),
    "layers as text": (lambda f: config(f, num_hidden_layers="2"), r"num_hidden_layers: expected a number that"),
    "a billion labels": (lambda f: config(f, num_labels=10**9), r"num_labels: expected a number that the weights can"),
    "a wide model": (lambda f: config(f, hidden_size=10**6), r"hidden_size: expected a number that the weights can"),
    "more than its weights": (
        lambda f: config(f, intermediate_size=60_000),
        r"describes 3,\d+,\d+ parameters, the weigh",
    ),
    "a large image": (lambda f: config(f, image_size=60_000), r"parameters, the weights hold"),
    "negative": (lambda f: config(f, hidden_size=-16), r"hidden_size: expected a number"),
    "not a number": (
        lambda f: weights(f, **{"classifier.bias": torch.tensor([0.0, float("nan")])}),
        r"classifier\.bias: .*no",
    ),
    "infinite": (lambda f: weights(f, **{"classifier.bias": torch.tensor([0.0, float("inf")])}), r"not finite"),
    "pickled": (only("pytorch_model.bin"), r"found pytorch_model\.bin only, which can run code .* if you trust"),
    "other formats": (only("flax_model.msgpack"), r"found flax_model\.msgpack only, which can run code"),
    "a shard elsewhere": (
        lambda f: shards(f, x="../other.safetensors"),
        r"expected names of \.safetensors files beside it",
    ),
    "a shard anywhere": (lambda f: shards(f, x="/etc/passwd"), r"expected names of \.safetensors files beside it"),
    "a pickled shard": (
        lambda f: shards(f, x="pytorch_model.bin"),
        r"expected names of \.safetensors files beside it",
    ),
    "a shard that is missing": (
        lambda f: shards(f, x="model-9.safetensors"),
        r"3 files of weights, model-9\S+ is missing",
    ),
    "a tensor twice": (twice, r"expected every tensor once, got \S+ in 2 files"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_one_line_at_once(model, name):
    change, message = HOSTILE[name]
    change(model)
    began = time.monotonic()
    with pytest.raises(ModelError, match=message) as refused:
        upop.from_pretrained(model)
    assert "\n" not in str(refused.value)
    assert str(model) in str(refused.value)
    assert not (model / "executed").exists()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pth", "checkpoint.pt", "weights.safetensors"])
def test_weights_without_a_config_are_refused_with_what_to_do_as_a_folder_and_as_a_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    runs = "" if name.endswith(".safetensors") else ", and can run code when it is loaded"
    advice = f"got {name}, which does not say of what model it is{runs}; build the model in Python, load the weights"
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match=re.escape(f"{given}: expected a model folder with ") + ".*" + advice):
            upop.from_pretrained(given)


def test_a_folder_of_timms_own_is_refused_with_the_way_there_is(tmp_path):
    """As timm's save_for_hf writes it."""
    values = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "pretrained_cfg": {"mean": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"head.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    advice = f"timm.create_model('local-dir:{tmp_path}'), then upop.Search"
    for read in (upop.from_pretrained, load_model):
        with pytest.raises(ModelError, match=re.escape(f"{tmp_path}: a model folder of timm's own;")) as refused:
            read(str(tmp_path))
        assert advice in str(refused.value)


def test_a_model_in_shards_is_loaded(model, sound, images, logits_of):
    shards(model)
    pixels = images(size=8)
    assert torch.equal(logits_of(upop.from_pretrained(model), pixels), logits_of(upop.from_pretrained(sound), pixels))


def test_weights_in_shards_are_told_apart_by_any_of_them(model):
    whole = weights_hash(model)
    shards(model)
    first = weights_hash(model)
    tensors = load_file(model / "model-1.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model-1.safetensors", {"format": "pt"})
    assert len({None, whole, first, weights_hash(model)}) == 4


def test_a_header_that_promises_more_than_the_file_holds_is_refused(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["classifier.weight"]["shape"] = [2**30, 2**30]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short"):
        vet(model)


def test_what_was_counted_is_what_the_files_hold(model):
    promise = vet(model)
    tensors = load_file(model / "model.safetensors")
    assert (promise.names, promise.numbers) == (tensors.keys(), sum(t.numel() for t in tensors.values()))


def test_the_advice_names_the_folder_that_was_given(model):
    (model / "config.json").write_bytes(b"\x00")
    with pytest.raises(ModelError, match=re.escape(f"{model / 'config.json'}: expected readable JSON")):
        vet(model)
