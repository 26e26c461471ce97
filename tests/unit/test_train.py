"""The training loop: what it promises about steps, rates, losses and broken numbers."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from upop.data import Batches, MemorySplit
from upop.errors import TrainingError
from upop.evaluation import evaluate
from upop.losses import classification_loss, feature_loss
from upop.recipe import FitOptions, make_optimizers, rate_factor
from upop.train import NoHook, fit


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
    return Accelerator(cpu=True, mixed_precision=getattr(request, "param", "no"))


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

    class Hook(NoHook):
        def penalty(self):
            return extra.sum()

        def step(self):
            calls.append(extra.grad.clone())

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


def last_hidden(model, split):
    """Hidden states after the last block, before the final norm, of the whole split."""
    seen = []
    handle = model.vit.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for x, _ in batches(split):
            model(pixel_values=x)
    handle.remove()
    return torch.cat(seen)


def test_the_feature_loss_is_the_error_in_units_of_each_tokens_variance():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    tokens = [(student[b, n], teacher[b, n]) for b in range(2) for n in range(3)]
    expected = sum(((s - t) ** 2).mean() / ((t - t.mean()) ** 2).mean() for s, t in tokens) / 6
    assert torch.allclose(feature_loss(student, teacher), expected)
    assert feature_loss(teacher, teacher) == 0
    mean = teacher.mean(-1, keepdim=True).expand_as(teacher)
    assert torch.allclose(feature_loss(mean, teacher), torch.tensor(1.0)), "1: no better than each token's mean"
    assert torch.allclose(feature_loss(100 * student, 100 * teacher), expected), "whatever the scale"
    assert feature_loss(student, torch.ones(2, 3, 8)).isfinite()


@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
def test_features_bring_the_hidden_states_to_the_teachers_and_leave_no_hook(make_model, split, accelerator):
    teacher, student = make_model("vit", labels=4, seed=1), make_model("vit", labels=4, seed=2)
    wanted = last_hidden(teacher, split)
    before, weights = float(feature_loss(last_hidden(student, split), wanted)), copy.deepcopy(teacher.state_dict())
    options = FitOptions(epochs=4, lr=2e-3, distill_features=1.0, accumulate=2)
    fit(student, batches(split, train=True), options, accelerator=accelerator, teacher=teacher)
    assert float(feature_loss(last_hidden(student, split), wanted)) < 0.8 * before
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    for model in (student, teacher):
        assert not any(module._forward_hooks for module in model.modules())


def test_without_features_a_teacher_changes_nothing_more_than_before(make_model, split, accelerator):
    teacher, plain = make_model("vit", labels=4, seed=1), make_model("vit", labels=4)
    silent = copy.deepcopy(plain)
    hooked = []
    for model, given in ((plain, None), (silent, teacher)):
        options = FitOptions(epochs=1, lr=1e-3)
        modules = [m for each in (model, teacher) for m in each.modules()]
        look = lambda progress, modules=modules: hooked.extend(m for m in modules if m._forward_hooks)  # noqa: E731
        fit(model, batches(split, train=True), options, accelerator=accelerator, teacher=given, report=look)
    assert hooked == []
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), silent.parameters(), strict=True))


def test_training_on_features_that_is_resumed_ends_with_the_same_bits(make_model, split, accelerator):
    teacher, whole = make_model("vit", labels=4, seed=1), make_model("vit", labels=4)
    resumed = copy.deepcopy(whole)
    options = FitOptions(epochs=2, lr=1e-3, distill=0.5, distill_features=0.5)
    kept = []

    def keep(state):
        kept.append(copy.deepcopy((state(), whole.state_dict())))

    common = {"accelerator": accelerator, "teacher": teacher}
    fit(whole, batches(split, train=True), options, keep=keep, **common)
    state, weights = kept[4]
    resumed.load_state_dict(weights)
    fit(resumed, batches(split, train=True), options, start=state, **common)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def averaged(trajectory, start, decay):
    """The slow way, in float64: after step t, the average forgets by (1 + t) / (10 + t) at most."""
    mean = [p.double() for p in start]
    for t, weights in enumerate(trajectory, 1):
        keep = min(decay, (1 + t) / (10 + t))
        mean = [keep * m + (1 - keep) * w.double() for m, w in zip(mean, weights, strict=True)]
    return mean


def test_with_ema_training_is_the_same_and_ends_with_the_average_of_its_weights(make_model, split, accelerator):
    class Watch(NoHook):
        def __init__(self, model):
            self.model, self.seen = model, []

        def step(self):
            self.seen.append([p.detach().clone() for p in self.model.parameters()])

    plain = make_model("vit", labels=4)
    mean = copy.deepcopy(plain)
    start = [p.detach().clone() for p in plain.parameters()]
    watches, shown = [Watch(plain), Watch(mean)], []
    for watch, ema in zip(watches, (0.0, 0.6), strict=True):
        fit(
            watch.model,
            batches(split, train=True),
            FitOptions(epochs=4, lr=2e-3, ema=ema),
            accelerator=accelerator,
            hook=watch,
            epoch_end=lambda epoch, watch=watch: shown.append([p.detach().clone() for p in watch.model.parameters()]),
        )
    for a, b in zip(watches[0].seen, watches[1].seen, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert all(torch.equal(p, last) for p, last in zip(plain.parameters(), watches[0].seen[-1], strict=True))
    for epoch in range(4):
        expected = averaged(watches[1].seen[: 3 * (epoch + 1)], start, 0.6)
        for found, value in zip(shown[4 + epoch], expected, strict=True):
            torch.testing.assert_close(found.double(), value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(p, value) for p, value in zip(mean.parameters(), shown[-1], strict=True))
    assert not torch.equal(next(mean.parameters()), next(plain.parameters()))


def test_training_with_ema_that_is_resumed_ends_with_the_same_bits(make_model, split, accelerator):
    whole = make_model("vit", labels=4)
    resumed = copy.deepcopy(whole)
    options = FitOptions(epochs=2, lr=1e-3, ema=0.9)
    kept = []
    keep = lambda state: kept.append(copy.deepcopy((state(), whole.state_dict())))  # noqa: E731
    fit(whole, batches(split, train=True), options, keep=keep, accelerator=accelerator)
    state, weights = kept[4]
    resumed.load_state_dict(weights)
    fit(resumed, batches(split, train=True), options, start=state, accelerator=accelerator)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_features_are_taken_from_a_compiled_model_that_was_not_used_before(make_model, split, accelerator):
    teacher, plain = make_model("vit", labels=4, seed=1), make_model("vit", labels=4)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager")
    options = FitOptions(epochs=1, lr=1e-3, distill_features=1.0)
    for model in (plain, compiled):
        fit(model, batches(split, train=True), options, accelerator=accelerator, teacher=teacher)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    used = copy.deepcopy(plain)
    used.compile(backend="eager")
    fit(used, batches(split, train=True), FitOptions(epochs=1, lr=1e-3), accelerator=accelerator)
    with pytest.raises(TrainingError, match=r"ViTForImageClassification: no hidden states .* leave out compile"):
        fit(used, batches(split, train=True), options, accelerator=accelerator, teacher=teacher)
    torch.compiler.reset()


def test_features_say_what_they_need(make_model, split, accelerator):
    options = FitOptions(epochs=1, lr=1e-3, distill_features=1.0)
    train = batches(split, train=True)
    with pytest.raises(TrainingError, match="distill_features: expected a teacher, got none"):
        fit(make_model("vit", labels=4), train, options, accelerator=accelerator)
    wide = make_model("vit", labels=4, width=96)
    match = r"hidden states \[32, 17, 64\] .* as the student's, got \[32, 17, 96\]; distil from the dense model"
    with pytest.raises(TrainingError, match=match):
        fit(make_model("vit", labels=4), train, options, accelerator=accelerator, teacher=wide)
    with pytest.raises(TrainingError, match=r"Sequential: .* blocks in a ModuleList, found none"):
        fit(torch.nn.Sequential(torch.nn.Linear(2, 2)), train, options, accelerator=accelerator, teacher=wide)


# ---------------------------------------------------------------- numbers that are none, memory that is short


def broken_at(model, steps, *, value=math.nan, where="loss"):
    """Make loss or gradients of some forward passes (counted from 1) `value`."""
    count = iter(range(1, 1000))

    def spoil(module, inputs, output):
        if next(count) in steps:
            if where == "loss":
                output.logits = output.logits * value
            else:
                output.logits.register_hook(lambda gradient: torch.full_like(gradient, value))

    return model.register_forward_hook(spoil)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradients"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_counted(make_model, split, accelerator, value, where, clip):
    model, calls, seen = make_model("vit", labels=4), [], []

    class Hook(NoHook):
        def step(self):
            calls.append("step")

        def skip(self):
            calls.append("skip")

    weights = []
    handle = broken_at(model, {2, 8}, value=value, where=where)

    def look(progress):
        weights.append(model.classifier.weight.detach().clone())
        seen.append(progress.loss)

    options = FitOptions(epochs=7, lr=1e-3, clip=clip)
    fitted = fit(model, batches(split, train=True), options, accelerator=accelerator, hook=Hook(), report=look)
    handle.remove()
    assert fitted.skipped == 2
    assert calls == ["skip" if step in (2, 8) else "step" for step in range(1, 22)]
    assert torch.equal(weights[1], weights[0]), "weights stay as they are"
    assert not torch.equal(weights[2], weights[1])
    assert all(math.isfinite(loss) for loss in seen)


def test_five_steps_in_a_row_or_a_tenth_of_all_end_the_training(make_model, split, accelerator):
    train = batches(split, train=True)
    model = make_model("vit", labels=4)
    broken_at(model, range(9, 100))
    with pytest.raises(TrainingError, match=r"at step 9 of 60 \(epoch 3\) and in the 4 steps after it; lower the"):
        fit(model, train, FitOptions(epochs=20, lr=1e-4), accelerator=accelerator)
    model = make_model("vit", labels=4)
    broken_at(model, range(2, 100, 2))
    with pytest.raises(TrainingError, match=r"at step 8 of 30 \(epoch 3\), and 4 of 8 steps were left out for that"):
        fit(model, train, FitOptions(epochs=10, lr=1e-4), accelerator=accelerator)


def test_what_was_left_out_and_what_chance_draws_are_kept_over_an_interruption(make_model, split, accelerator):
    whole, kept = make_model("vit", labels=4, hidden_dropout_prob=0.1), []
    resumed = copy.deepcopy(whole)
    options = FitOptions(epochs=7, lr=1e-3)
    handle = broken_at(whole, {2})
    common = {"accelerator": accelerator}
    keep = lambda state: kept.append(copy.deepcopy((state(), whole.state_dict())))  # noqa: E731
    fit(whole, batches(split, train=True), options, keep=keep, **common)
    handle.remove()
    resumed.load_state_dict(kept[4][1])
    assert fit(resumed, batches(split, train=True), options, start=kept[4][0], **common).skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def short_of_memory(model, images, error):
    """Let forward passes of more than `images` images run out of memory."""

    def refuse(module, arguments, keywords):
        if len(keywords["pixel_values"]) > images:
            raise error

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


NO_MEMORY = [
    MemoryError("Unable to allocate 8.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_makes_micro_batches_smaller_and_no_step_other(
    make_model, split, accelerator, error, caplog
):
    plain, short = make_model("vit", labels=4), make_model("vit", labels=4)
    short_of_memory(short, 9, error)
    options = FitOptions(epochs=2, lr=1e-3)
    train = batches(split, train=True)
    eights = FitOptions(epochs=2, lr=1e-3, accumulate=4)
    assert not fit(plain, train, eights, accelerator=accelerator).memory
    calls = []

    class Hook(NoHook):
        def step(self):
            calls.append("step")

        def clear(self):
            calls.append("clear")

    fitted = fit(short, train, options, accelerator=accelerator, hook=Hook())
    assert (fitted.micro_batch, fitted.memory) == (8, True)
    assert calls == ["clear"] * 2 + ["step"] * 6, "the first step is done again, no other"
    said = [record.message for record in caplog.records if record.name == "upop.memory"]
    assert said == [
        f"step 1: out of memory with {n} images at a time; going on with {n // 2}, same batch" for n in (32, 16)
    ]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), short.parameters(), strict=True))


def test_memory_that_runs_out_half_way_through_a_batch_leaves_no_gradient(make_model, split, accelerator):
    plain, short = make_model("vit", labels=4), make_model("vit", labels=4)
    count = iter(range(1, 1000))

    def refuse(module, arguments, keywords):
        if next(count) == 2:
            raise MemoryError

    short.register_forward_pre_hook(refuse, with_kwargs=True)
    for model, accumulate in ((plain, 4), (short, 2)):
        options = FitOptions(epochs=1 / 3, lr=1e-3, accumulate=accumulate)
        fit(model, batches(split, train=True), options, accelerator=accelerator)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), short.parameters(), strict=True))


def test_too_little_memory_for_one_image_is_one_line(make_model, split, accelerator):
    model = make_model("vit", labels=4)
    short_of_memory(model, 0, MemoryError())
    with pytest.raises(TrainingError, match="step 1: out of memory with a single image at a time; use a smaller"):
        fit(model, batches(split, train=True), OPTIONS, accelerator=accelerator)


def test_other_errors_are_no_lack_of_memory(make_model, split, accelerator):
    model = make_model("vit", labels=4)
    short_of_memory(model, 4, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(model, batches(split, train=True), OPTIONS, accelerator=accelerator)


def test_evaluation_that_runs_out_of_memory_counts_every_image_once(make_model, split, accelerator):
    model = make_model("vit", labels=4)
    data = batches(split, batch_size=40)
    whole = evaluate({"m": model}, data, accelerator=accelerator)["m"]
    short_of_memory(model, 7, NO_MEMORY[2])
    parts = evaluate({"m": model}, data, accelerator=accelerator)["m"]
    assert (parts.images, parts.accuracy) == (96, whole.accuracy)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
