"""Profiling counts what a formula counts, gives sane latencies, and leaves models as they were."""

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

import upop
from upop.errors import ModelError
from upop.families import find_structures
from upop.profiling import compare_latency, count_macs, count_params

LAYERS, WIDTH, HEADS, HIDDEN, LABELS, IMAGE, PATCH = 2, 32, 2, 48, 5, 16, 4
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "num_labels": LABELS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def tiny_vit(**changes) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**(SIZES | changes)))


def formula_macs(*, tokens: int, head_dims: list[int], hidden: list[int]) -> int:
    """MACs of a tiny_vit with `tokens` tokens (the class token among them) and these widths per layer."""
    total = (tokens - 1) * WIDTH * 3 * PATCH**2 + WIDTH * LABELS
    for head_dim, units in zip(head_dims, hidden, strict=True):
        inner = HEADS * head_dim
        total += 4 * tokens * WIDTH * inner  # q, k, v, output
        total += 2 * tokens**2 * inner  # q k' and its product with v
        total += 2 * tokens * WIDTH * units
    return total


def snapshot(model: torch.nn.Module) -> list[tuple]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t.data_ptr(), t.device, t.dtype, t.shape, t.requires_grad) for name, t in tensors]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_macs_of_deit_base_are_the_known_number(attention: str) -> None:
    config = ViTConfig(num_labels=10, attn_implementation=attention)  # the defaults are DeiT-Base's sizes
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    assert model.config._attn_implementation == attention
    assert count_macs(model) / 1e9 == pytest.approx(17.563, abs=5e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_the_channels_that_the_model_takes(channels: int) -> None:
    model = tiny_vit(num_channels=channels)
    tokens = (IMAGE // PATCH) ** 2
    patches = tokens * WIDTH * PATCH**2  # of one channel
    assert count_macs(model) - count_macs(tiny_vit()) == (channels - 3) * patches
    assert upop.analyze(model).costs["macs"].dense == count_macs(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_macs_of_a_slimmed_model_follow_the_formula(attention: str) -> None:
    model = tiny_vit(attn_implementation=attention)
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in find_structures(model)}
    keep["attn.0"][3:9] = False
    keep["mlp.0"][::2] = False
    keep["mlp.1"][1:] = False
    small = upop.slim(model, keep)
    dense_head_dim = WIDTH // HEADS
    assert count_macs(model) == formula_macs(tokens=17, head_dims=[dense_head_dim] * 2, hidden=[HIDDEN] * 2)
    assert count_macs(small) == formula_macs(
        tokens=17, head_dims=[dense_head_dim - 6, dense_head_dim], hidden=[HIDDEN // 2, 1]
    )
    assert count_params(small) == sum(p.numel() for p in small.parameters()) < count_params(model)


def test_macs_depend_on_the_image_size_that_is_asked_for() -> None:
    model = tiny_vit(image_size=24)
    assert count_macs(model) == formula_macs(tokens=37, head_dims=[16, 16], hidden=[HIDDEN] * 2)
    assert count_macs(model, image_size=24) == count_macs(model)
    wide = tiny_vit(image_size=(16, 24))
    assert count_macs(wide) == formula_macs(tokens=25, head_dims=[16, 16], hidden=[HIDDEN] * 2)
    with pytest.raises(upop.UpopError, match=r"expected config\.image_size or .*, or give image_size="):
        count_macs(torch.nn.Linear(3, 3))


def test_counting_leaves_a_masked_model_as_it_was() -> None:
    model = tiny_vit(hidden_dropout_prob=0.5)
    model.vit.embeddings.eval()
    search = upop.Search(model, target=upop.Target(prunable=0), steps=4)
    dense_macs = formula_macs(tokens=17, head_dims=[16, 16], hidden=[HIDDEN] * 2)
    model(pixel_values=torch.randn(2, 3, IMAGE, IMAGE)).logits.sum().backward()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert count_macs(model) == dense_macs
    assert snapshot(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    search.step()  # its masks still have the gradients of the backward above


def test_a_shared_parameter_counts_once() -> None:
    model = tiny_vit()
    before = count_params(model)
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    assert count_params(model) == before - WIDTH * HIDDEN


def test_latency_says_what_was_measured_and_restores_the_models() -> None:
    dense, masked = tiny_vit(hidden_dropout_prob=0.5), tiny_vit().bfloat16()
    upop.Search(masked, target=upop.Target(prunable=0), steps=4)
    deit = DeiTForImageClassification(DeiTConfig(**SIZES)).eval()
    models = {"dense": dense.train(), "masked": masked.train(), "deit": deit}
    dense.vit.embeddings.eval()
    modes = {name: [m.training for m in model.modules()] for name, model in models.items()}
    before = {name: snapshot(model) for name, model in models.items()}
    state = torch.get_rng_state()
    found = compare_latency(models, batch=3, image_size=IMAGE, min_runs=4, max_seconds=0.1)
    assert list(found) == ["dense", "masked", "deit"]
    assert [latency.dtype for latency in found.values()] == ["float32", "bfloat16", "float32"]
    for name, latency in found.items():
        assert latency.batch == 3
        assert latency.device == "cpu"
        assert 4 <= latency.runs == found["dense"].runs <= 80
        assert latency.median_ms > 0
        assert latency.spread_ms >= 0
        assert [m.training for m in models[name].modules()] == modes[name]
        assert snapshot(models[name]) == before[name]
    assert torch.equal(torch.get_rng_state(), state)


def test_latency_runs_take_turns_and_need_no_more_than_the_least_runs() -> None:
    calls: list[str] = []

    class Toy(torch.nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert torch.is_inference_mode_enabled()
            calls.append(self.name)
            return super().forward(pixel_values)

    models = {name: Toy(4, 4) for name in "ab"}
    for name, model in models.items():
        model.name = name
    found = compare_latency(models, batch=1, image_size=4, channels=1, min_runs=2, max_seconds=0)
    assert {latency.runs for latency in found.values()} == {2}
    assert "".join(calls) == "ab" * (3 + 2)  # warm-up among them


def test_training_modes_are_restored_after_an_error_too() -> None:
    model = tiny_vit().train()
    with pytest.raises(ValueError, match="image size"):
        compare_latency({"model": model}, batch=1, image_size=IMAGE + 4)
    assert all(m.training for m in model.modules())


def test_latency_refuses_models_on_another_device_and_senseless_numbers() -> None:
    with torch.device("meta"):
        elsewhere = torch.nn.Linear(2, 2)
    with pytest.raises(upop.UpopError, match=r"mine: expected it on cpu, got meta; call model\.to\('cpu'\)"):
        compare_latency({"mine": elsewhere}, batch=1, image_size=2)
    with pytest.raises(upop.UpopError, match="expected min_runs >= 2 and batch >= 1, got min_runs=1"):
        compare_latency({}, batch=1, image_size=2, min_runs=1)


class Convolutions(torch.nn.Module):
    """Takes its images first, under a name of its own."""

    def __init__(self, **attributes):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 4, stride=4)
        vars(self).update(attributes)

    def forward(self, x):
        return self.body(x).flatten(1)


@pytest.mark.parametrize("size", [8, (8, 8)])
def test_macs_of_a_model_that_says_the_size_of_its_images_itself(size) -> None:
    assert count_macs(Convolutions(image_size=size)) == 4 * 4 * 3 * 16
    assert count_macs(Convolutions(), image_size=8) == 4 * 4 * 3 * 16


def test_without_a_size_one_line_says_what_to_set() -> None:
    with pytest.raises(
        ModelError, match=r"^Convolutions: expected config\.image_size or .*; set model\.image_size = "
    ):
        count_macs(Convolutions())


def test_latencies_of_models_with_names_of_their_own() -> None:
    models = {"a": Convolutions(), "vit": tiny_vit()}
    assert set(compare_latency(models, batch=1, image_size=IMAGE, min_runs=2, max_seconds=0.0)) == set(models)
