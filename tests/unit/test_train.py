"""The training loop: what it promises about steps, rates, losses and broken numbers."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from upop.data import Batches, MemorySplit
from upop.errors import TrainingError
from upop.train import FitOptions, classification_loss, evaluate, fit, make_optimizers, rate_factor


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    images = torch.randint(0, 60, (96, 3, 32, 32), generator=generator, dtype=torch.uint8)
    # The class is the brightness of a quarter of the image: learnable in a few steps.
    for index, label in enumerate(labels):
        images[index, :, :, 8 * label : 8 * label + 8] += 190
    return MemorySplit(images, labels)


def batches(split, **changes):
    settings = {"batch_size": 32, "size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 4, "seed": 0}
    return Batches(split, **{**settings, **changes})


@pytest.fixture
def accelerator(request):
    # Accelerate keeps its settings per process.
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision=getattr(request, "param", "no"))
    AcceleratorState._reset_state()


OPTIONS = FitOptions(epochs=14, lr=2e-3)


@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
def test_fit_learns_and_leaves_the_model_clean(make_model, split, accelerator):
    model = make_model("vit", labels=4)
    names, before = list(model.state_dict()), dict(vars(model))
    data = batches(split)
    start = evaluate({"m": model}, data, accelerator=accelerator)["m"]
    fit(model, batches(split, train=True), OPTIONS, accelerator=accelerator)
    end = evaluate({"m": model}, data, accelerator=accelerator)["m"]
    assert end.accuracy > 0.9 > start.accuracy
    assert end.images == 96
    assert list(model.state_dict()) == names
    assert set(vars(model)) == set(before)
    assert not model.training


def test_the_same_seed_gives_the_same_weights(make_model, split, accelerator):
    first = make_model("vit", labels=4)
    second = copy.deepcopy(first)
    for model in (first, second):
        fit(model, batches(split, train=True), OPTIONS, accelerator=accelerator)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_stage_trains_in_the_chosen_precision_also_a_model_trained_before(make_model, split):
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = make_model("vit", labels=4)
    seen = []
    for _ in range(2):
        fc1 = model.vit.layers[0].mlp.fc1
        handle = fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        fit(model, batches(split, train=True), FitOptions(epochs=1, lr=1e-4), accelerator=accelerator)
        handle.remove()
        model = copy.deepcopy(model)
    assert len(seen) == 6
    assert set(seen) == {torch.bfloat16}
    AcceleratorState._reset_state()


def test_micro_batches_change_memory_not_the_result(make_model, split, accelerator):
    whole = make_model("vit", labels=4).double()
    parts = copy.deepcopy(whole)

    class Doubled:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def epoch(self, number, start=0):
            for images, labels in self.inner.epoch(number, start):
                yield images.double(), labels

    for model, accumulate in ((whole, 1), (parts, 3)):
        options = FitOptions(epochs=1, lr=1e-3, accumulate=accumulate)
        fit(model, Doubled(batches(split, train=True)), options, accelerator=accelerator)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_a_hook_is_called_once_per_optimizer_step_and_its_penalty_trains(make_model, split, accelerator):
    extra = torch.ones(3, requires_grad=True)
    calls = []

    class Hook:
        def penalty(self):
            return extra.sum()

        def step(self):
            calls.append(extra.grad.clone())

        def groups(self):
            return []

        def metrics(self):
            return {"ratio": 0.25}

    seen = []
    options = FitOptions(epochs=2, lr=1e-4, accumulate=2)
    train = batches(split, train=True)
    fit(
        make_model("vit", labels=4),
        train,
        options,
        accelerator=accelerator,
        hook=Hook(),
        report=seen.append,
    )
    assert len(calls) == len(seen) == 2 * len(train)
    assert torch.allclose(calls[0], torch.ones(3))
    assert seen[-1].extra == {"ratio": 0.25}
    assert seen[-1].step == seen[-1].steps
    assert 0 <= seen[-1].accuracy <= 1


def test_a_loss_that_is_not_finite_stops_and_names_its_step(make_model, split, accelerator):
    model = make_model("vit", labels=4)
    steps = []

    def poison(progress):
        steps.append(progress.step)
        if progress.step == 2:
            with torch.no_grad():
                model.classifier.weight.fill_(math.nan)

    done = []
    with pytest.raises(TrainingError, match=r"no longer finite at step 3 of 42 \(epoch 1\)"):
        fit(model, batches(split, train=True), OPTIONS, accelerator=accelerator, report=poison, epoch_end=done.append)
    assert done == []


def test_rates_warm_up_then_fall_to_nothing_or_stay():
    cosine = rate_factor(100, FitOptions(epochs=1, lr=1.0, warmup=0.1))
    rates = [cosine(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] > 0
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    constant = rate_factor(100, FitOptions(epochs=1, lr=1.0, warmup=0.0, decay="constant"))
    assert {constant(step) for step in range(100)} == {1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_biases_tokens_and_positions_do_not_decay(make_model, optimizer):
    model = make_model("vit", labels=4)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {}
    for one in make_optimizers(model, FitOptions(epochs=1, lr=1e-3, optimizer=optimizer, weight_decay=0.1)):
        for group in one.param_groups:
            decays |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        free = name.endswith("bias") or "norm" in name or "token" in name or "position" in name
        assert decay == (0.0 if free else 0.1), name


def test_distillation_mixes_true_and_soft_labels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    labels = torch.arange(8) % 5
    options = FitOptions(epochs=1, lr=1, label_smoothing=0.0, distill=0.3, temperature=4.0)
    p, q = (teacher / 4).softmax(-1), (student / 4).softmax(-1)
    soft = (p * (p / q).log()).sum(-1).mean() * 16
    expected = 0.7 * F.cross_entropy(student, labels) + 0.3 * soft
    assert torch.allclose(classification_loss(student, labels, teacher, options), expected, atol=1e-6)
    assert torch.equal(classification_loss(student, labels, None, options), F.cross_entropy(student, labels))


def test_evaluate_equals_a_plain_loop_and_restores_the_training_mode(make_model, split, accelerator):
    model = make_model("vit", labels=4).train()
    score = evaluate({"m": model}, batches(split, batch_size=20), accelerator=accelerator)["m"]
    assert model.training
    model.eval()
    x = (split.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=one[None]).logits for one in x])
    assert score.accuracy == pytest.approx(float((logits.argmax(-1) == split.labels).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
