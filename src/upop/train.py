"""Training and evaluation of any image classifier on Accelerate: one loop for every stage.

What a stage adds to the loop comes in as a hook; the loop itself must not know of pruning, files or terminals.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from upop.data import Batches
from upop.errors import TrainingError
from upop.reading import taking_over


class Hook(Protocol):
    """What a stage adds to the training loop."""

    def penalty(self) -> Tensor | float:
        """A term for the loss of every micro-batch."""

    def step(self) -> None:
        """Called once after every optimizer step, before gradients are cleared."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of tensors that are trained beside the model's own, each with its peak rate."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers of its own for the progress report."""


class NoHook:
    """Plain training."""

    def penalty(self) -> float:
        return 0.0

    def step(self) -> None:
        pass

    def groups(self) -> list[dict[str, Any]]:
        return []

    def metrics(self) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class FitOptions:
    """How one stage is trained.

    Attributes:
        epochs: passes over the training split; 0.5 stops in the middle of one.
        lr: peak learning rate of AdamW, or of Muon's matrices (the rest then gets AdamW at `lr * 0.075`).
        optimizer: `adamw`; or `muon` for the blocks' matrices, good for training from scratch.
        weight_decay: decoupled; never on norms, biases, embeddings and tokens.
        warmup: fraction of all steps over which the rate rises linearly.
        decay: after that, `cosine` to 0 or `constant`.
        label_smoothing: in [0, 1).
        distill: weight in [0, 1] of the teacher's soft labels against the true ones.
        temperature: softens teacher and student logits, > 0.
        distill_features: weight, >= 0, of `feature_loss` between the last hidden states of student and teacher.
        clip: largest gradient norm; 0 = off.
        accumulate: micro-batches per optimizer step; the batch is split, so that steps and results keep their meaning.
        seed: of dropout and the like.
    """

    epochs: float
    lr: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05
    warmup: float = 0.1
    decay: Literal["cosine", "constant"] = "cosine"
    label_smoothing: float = 0.1
    distill: float = 0.0
    temperature: float = 2.0
    distill_features: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0


@dataclass
class Progress:
    """Where a training loop is. Numbers are running means over the epoch; reading them waits for the device."""

    step: int
    steps: int
    epoch: int
    epochs: int
    images_per_s: float
    seconds_left: float
    lr: float
    extra: Mapping[str, float]
    sums: Tensor  # [3]: loss * images, correct, images

    @property
    def loss(self) -> float:
        return float(self.sums[0] / self.sums[2])

    @property
    def accuracy(self) -> float:
        """In [0, 1], on the augmented training images."""
        return float(self.sums[1] / self.sums[2])


Report = Callable[[Progress], None]
State = dict[str, Any]
# Called before every step with a function that gives the state of the loop at this moment.
Keep = Callable[[Callable[[], State]], None]

# A loss that is not finite is looked for every so many steps: each look waits for the device.
CHECK_EVERY = 20


def fit(
    model: nn.Module,
    batches: Batches,
    options: FitOptions,
    *,
    accelerator: Accelerator,
    hook: Hook | None = None,
    teacher: nn.Module | None = None,
    report: Report = lambda progress: None,
    epoch_end: Callable[[int], None] = lambda epoch: None,
    keep: Keep = lambda state: None,
    start: State | None = None,
) -> None:
    """Train `model` in place and leave it in eval mode; with `start`, a state that `keep` was given, go on from there.

    A state has optimizers, counters and random states. Weights and the hook's own state are the caller's to keep.

    Raises TrainingError, naming the step, when the loss is no longer finite; the weights are then useless, and the
    caller goes back to what it kept at the last `epoch_end(epochs done)`. Raises it too where features are to be
    distilled and student and teacher do not have the same.
    """
    hook = hook or NoHook()
    lesson = _make_lesson(model, teacher, options)
    set_seed(options.seed + accelerator.process_index)
    optimizers = make_optimizers(model, options)
    for group in hook.groups():
        optimizers[-1].add_param_group(group)
    own = set(vars(model))
    prepared, *ready = accelerator.prepare(model, *optimizers)
    steps = count_steps(options.epochs, len(batches))
    factor = rate_factor(steps, options)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in ready]
    tally = _Tally(steps, options, accelerator.device)
    prepared.train()
    if start is not None:
        with taking_over("--resume"):
            _load_state(start, ready, tally, accelerator.device)
    first, skip = divmod(tally.step, len(batches))
    with closing(lesson):
        for epoch in range(first, math.ceil(steps / len(batches))):
            tally.start(epoch, fresh=epoch > first or skip == 0)
            for images, labels in itertools.islice(batches.epoch(epoch, skip), steps - tally.step):
                keep(lambda: _state(ready, tally, accelerator.device))
                _set_rates(ready, peaks, factor(tally.step))
                tally.add(_backward(prepared, images, labels, options, accelerator, hook, lesson))
                if options.clip:
                    accelerator.clip_grad_norm_(model.parameters(), options.clip)
                for optimizer in ready:
                    optimizer.step()
                hook.step()
                for optimizer in ready:
                    optimizer.zero_grad()
                seen = len(images) * accelerator.num_processes
                report(tally.progress(peaks[0][0] * factor(tally.step - 1), seen, hook))
            skip = 0
            tally.check()
            epoch_end(epoch + 1)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    # Accelerate leaves its marks on the model; copies of it would count as prepared, and train in the wrong precision.
    for name in set(vars(model)) - own:
        delattr(model, name)
    model.eval()


def _state(optimizers: Sequence[Any], tally: "_Tally", device: torch.device) -> State:
    return {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "tally": tally.state_dict(),
        "random": torch.get_rng_state(),
        "random_device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _load_state(state: State, optimizers: Sequence[Any], tally: "_Tally", device: torch.device) -> None:
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    tally.load_state_dict(state["tally"])
    torch.set_rng_state(state["random"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random_device"], device)


def count_steps(epochs: float, per_epoch: int) -> int:
    """Optimizer steps of `epochs` epochs of `per_epoch` steps, at least one."""
    return max(1, round(epochs * per_epoch))


def _backward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: FitOptions,
    accelerator: Accelerator,
    hook: Hook,
    lesson: "_Lesson",
) -> Tensor:
    """Forward and backward of one batch in micro-batches; returns the sums [3] of Progress."""
    sums = torch.zeros(3, device=images.device)
    micro = max(1, math.ceil(len(images) / options.accumulate))
    chunks = [(images[i : i + micro], labels[i : i + micro]) for i in range(0, len(images), micro)]
    for index, (x, y) in enumerate(chunks):
        share = len(x) / len(images)
        with accelerator.no_sync(model) if index < len(chunks) - 1 else nullcontext():
            logits = model(pixel_values=x).logits.float()
            loss = lesson.loss(logits, x, y, accelerator)
            accelerator.backward((loss + hook.penalty()) * share)
        hard = y if y.ndim == 1 else y.argmax(-1)
        # Element by element: a tensor made from Python numbers would be a copy to the device in every step.
        sums[0] += loss.detach() * len(x)
        sums[1] += (logits.detach().argmax(-1) == hard).sum()
        sums[2] += len(x)
    return sums


def classification_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, options: FitOptions) -> Tensor:
    """Cross-entropy with label smoothing, mixed with distillation from teacher logits (Hinton et al., 2015).

    logits, teacher [B, C]; labels int64 [B] or probabilities [B, C].
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
    if teacher is None or options.distill == 0:
        return loss
    t = options.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, -1), F.log_softmax(teacher / t, -1), log_target=True, reduction="batchmean"
    )
    return (1 - options.distill) * loss + options.distill * t * t * soft


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of hidden states [B, N, D], over the variance that each of the teacher's tokens has over D.

    1 where the student gives every token's mean: the same weight means the same for every model. As FitNets (Romero
    et al., 2015) without a projection: pruning leaves the width of the embedding alone.
    """
    error = (student - teacher).square().mean(-1)
    # A token that is the same in all D says nothing of a scale; it must not divide by 0.
    return (error / teacher.var(-1, correction=0).clamp_min(1e-6)).mean()


class _Lesson:
    """The loss of a micro-batch: against the true labels and, with a teacher, its soft labels for the same images."""

    def __init__(self, teacher: nn.Module | None, options: FitOptions) -> None:
        self._teacher, self._options = teacher, options
        if teacher is not None:
            teacher.eval()

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Tensor:
        """logits float32 [B, C] of the student, which has just seen `images` [B, 3, H, W]."""
        with torch.no_grad(), accelerator.autocast():
            soft = None if self._teacher is None else self._teacher(pixel_values=images).logits.float()
        return classification_loss(logits, labels, soft, self._options)

    def close(self) -> None:
        pass


class _FeatureLesson(_Lesson):
    """The same, and against the teacher's last hidden states."""

    def __init__(self, model: nn.Module, teacher: nn.Module, options: FitOptions) -> None:
        super().__init__(teacher, options)
        self._taps = [_Tap(model), _Tap(teacher)]

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Tensor:
        loss = super().loss(logits, images, labels, accelerator)
        student, teacher = (tap.take() for tap in self._taps)
        if student.shape != teacher.shape:
            raise TrainingError(
                f"distill_features: expected a teacher with hidden states {list(student.shape)} (batch, tokens, "
                f"width) as the student's, got {list(teacher.shape)}; distil from the dense model, or its logits alone"
            )
        return loss + self._options.distill_features * feature_loss(student, teacher)

    def close(self) -> None:
        for tap in self._taps:
            tap.close()


class _Tap:
    """What the last of a model's blocks gave in the last forward pass: all tokens, before the final norm.

    A hook, since asking transformers for hidden states would keep, and under autocast copy, those of all blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise TrainingError(
                f"distill_features: {self._name}: expected a model with its blocks in a ModuleList, found none; "
                "distil its logits alone"
            )
        self._output: Tensor | None = None
        self._handle = max(lists, key=len)[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else output[0]

    def take(self) -> Tensor:
        """Hidden states, float32 [B, N, D], once: the graph behind them is not to outlive its step."""
        output, self._output = self._output, None
        if output is None:
            raise TrainingError(
                f"distill_features: {self._name}: no hidden states came out of its last block; a model that was "
                "compiled and used before does not give them: leave out compile"
            )
        return output.float()

    def close(self) -> None:
        self._output = None
        self._handle.remove()


def _make_lesson(model: nn.Module, teacher: nn.Module | None, options: FitOptions) -> _Lesson:
    if options.distill_features == 0:
        return _Lesson(teacher, options)
    if teacher is None:
        raise TrainingError("distill_features: expected a teacher, got none; set it to 0 or give fit() one")
    return _FeatureLesson(model, teacher, options)


def make_optimizers(model: nn.Module, options: FitOptions) -> list[torch.optim.Optimizer]:
    """AdamW with no decay on norms, biases, embeddings and tokens; with `muon`, Muon on the blocks' matrices first."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    linears = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = linears.get(id(parameter))
        if name is None:
            # Convolutional patch embeddings decay too; tokens, positions, norms and biases do not.
            (decayed if parameter.ndim == 4 else plain).append(parameter)
        elif options.optimizer == "muon" and "classifier" not in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    lr = options.lr * (0.075 if matrices else 1.0)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=lr, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=options.lr, weight_decay=options.weight_decay)
    return [muon, adamw]


def rate_factor(steps: int, options: FitOptions) -> Callable[[int], float]:
    """Fraction of the peak learning rate at a step in [0, steps)."""
    warm = options.warmup * steps

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if options.decay == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))

    return factor


def _set_rates(optimizers: Sequence[Any], peaks: Sequence[Sequence[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


class _Tally:
    """Counts steps, sums and time for the progress report."""

    def __init__(self, steps: int, options: FitOptions, device: torch.device) -> None:
        self.step, self.steps, self.epoch, self.epochs = 0, steps, 0, math.ceil(options.epochs)
        self._sums = torch.zeros(3, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._began = time.monotonic()

    def start(self, epoch: int, *, fresh: bool = True) -> None:
        self.epoch = epoch
        if fresh:
            self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> State:
        seconds = time.monotonic() - self._began
        return {"step": self.step, "sums": self._sums, "first_bad": self._first_bad, "seconds": seconds}

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]
        self._sums = state["sums"].to(self._sums.device)
        self._first_bad = state["first_bad"].to(self._first_bad.device)
        self._began = time.monotonic() - state["seconds"]

    def add(self, sums: Tensor) -> None:
        self._sums = self._sums + sums
        self.step += 1
        bad = ~sums[0].isfinite() & (self._first_bad == 0)
        self._first_bad = torch.where(bad, self.step, self._first_bad)
        if self.step % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        if step := int(self._first_bad):
            raise TrainingError(
                f"the loss is no longer finite at step {step} of {self.steps} (epoch {self.epoch + 1}); "
                "lower the learning rate or train in float32"
            )

    def progress(self, lr: float, images: int, hook: Hook) -> Progress:
        seconds = (time.monotonic() - self._began) / self.step
        return Progress(
            step=self.step,
            steps=self.steps,
            epoch=self.epoch,
            epochs=self.epochs,
            images_per_s=images / seconds,
            seconds_left=seconds * (self.steps - self.step),
            lr=lr,
            extra=hook.metrics(),
            sums=self._sums,
        )


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and mean cross-entropy over `images` images."""

    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module], batches: Batches, *, accelerator: Accelerator, autocast: bool = False
) -> dict[str, Score]:
    """Score of each model in one pass over the split.

    Without `autocast` in the models' own precision, for results: a masked model and its slimmed twin must not differ
    by rounding. With it as in training, for a quick look.
    """
    sums = {name: torch.zeros(3, device=accelerator.device, dtype=torch.float64) for name in models}
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    for images, labels in batches:
        for name, model in models.items():
            with accelerator.autocast() if autocast else nullcontext():
                logits = model(pixel_values=images).logits.float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(-1) == labels).sum()
            sums[name] += torch.stack([correct, loss, torch.tensor(len(labels), device=loss.device)])
    for name, model in models.items():
        model.train(training[name])
    result = {}
    for name, counts in sums.items():
        right, total, seen = (float(v) for v in accelerator.reduce(counts, reduction="sum"))
        result[name] = Score(right / seen, total / seen, int(seen))
    return result
