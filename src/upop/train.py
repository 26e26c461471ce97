"""Training of any image classifier on Accelerate: one loop for every stage, in one process or several.

What a stage adds to the loop comes in as a hook; the loop itself must not know of pruning, files or terminals.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from upop import processes
from upop.average import Average
from upop.data import Batches
from upop.errors import TrainingError
from upop.losses import TrainingLoss, make_loss
from upop.memory import within_memory
from upop.reading import taking_over
from upop.recipe import FitOptions, count_steps, make_optimizers, rate_factor

# Steps whose loss or gradients are not finite are left out; so many of them in a row, or in all, end the training.
BAD_IN_A_ROW = 5
BAD_SHARE = 0.1


class Hook(Protocol):
    """What a stage adds to the training loop."""

    def penalty(self) -> Tensor | float:
        """A term for the loss of every micro-batch."""

    def finite(self) -> Tensor | bool:
        """Whether the gradients of its own, of this step, are numbers."""

    def step(self) -> None:
        """Called once after every optimizer step, before gradients are cleared."""

    def skip(self) -> None:
        """Called in place of `step` where there was no optimizer step: the gradients are no numbers."""

    def clear(self) -> None:
        """Forget the gradients of this step so far: its batch comes again."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of tensors that are trained beside the model's own, each with its peak rate."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers of its own for the progress report."""


class NoHook:
    """Plain training."""

    def penalty(self) -> float:
        return 0.0

    def finite(self) -> bool:
        return True

    def step(self) -> None: ...
    def skip(self) -> None: ...
    def clear(self) -> None: ...

    def groups(self) -> list[dict[str, Any]]:
        return []

    def metrics(self) -> Mapping[str, float]:
        return {}


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


@dataclass(frozen=True)
class Fitted:
    """What is to be said of a training.

    Attributes:
        skipped: optimizer steps left out, for a loss or gradients that were not finite.
        micro_batch: images that went through the model at once, in each process, in the end.
        memory: whether that is fewer than asked for, because memory had run out.
    """

    skipped: int
    micro_batch: int
    memory: bool


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
) -> Fitted:
    """Train `model` in place and leave it in eval mode; with `start`, a state that `keep` was given, go on from there.

    A state has optimizers, counters, random states and the running average. Weights and the hook's own state are the
    caller's to keep: `keep` sees the weights as they are trained, `epoch_end` their average where `options.ema` asks
    for one, which the model then ends with.

    A step whose loss or gradients are not finite is left out, in all processes. Where memory runs out, the step is
    done again in micro-batches of half the size; the batch of an optimizer step stays.

    Raises TrainingError, naming the step, when 5 steps in a row, or a tenth of all, are not finite, or the weights
    themselves; the caller then goes back to what it kept at the last `epoch_end(epochs done)`. Raises it too where
    memory does not suffice for a single image, and where features are to be distilled and student and teacher do not
    have the same.
    """
    hook = hook or NoHook()
    task = make_loss(model, teacher, options)
    set_seed(options.seed + processes.index())
    optimizers = make_optimizers(model, options)
    for group in hook.groups():
        optimizers[-1].add_param_group(group)
    own = set(vars(model))
    prepared, *ready = accelerator.prepare(model, *optimizers)
    steps = count_steps(options.epochs, len(batches))
    factor = rate_factor(steps, options)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in ready]
    tally = _Tally(steps, options, accelerator.device)
    average = Average(model, options.ema)
    prepared.train()
    if start is not None:
        with taking_over("--resume"):
            _load_state(start, ready, tally, average, accelerator.device)
    passes = _Passes(prepared, options, accelerator, hook, task, ready, tally)
    first, skip = divmod(tally.step, len(batches))
    with closing(task):
        for epoch in range(first, math.ceil(steps / len(batches))):
            tally.start(epoch, fresh=epoch > first or skip == 0)
            coming = itertools.islice(batches.epoch(epoch, skip), steps - tally.step)
            batch = next(coming, None)
            while batch is not None:
                images, labels = batch
                keep(lambda: _state(ready, tally, average, accelerator.device))
                _set_rates(ready, peaks, factor(tally.step))
                sums = processes.add_up_(passes.backward(images, labels, _in_all(images, batches)))
                # Made while the device is still at this one, which must be waited for to know whether it is finite.
                batch = next(coming, None)
                if _finite(model, sums, hook, options, accelerator):
                    for optimizer in ready:
                        optimizer.step()
                    average.step()
                    hook.step()
                    tally.add(sums)
                else:
                    hook.skip()
                    tally.skip(model)
                for optimizer in ready:
                    optimizer.zero_grad()
                seen = len(images) * processes.count()
                report(tally.progress(peaks[0][0] * factor(tally.step - 1), seen, hook))
            skip = 0
            with average.in_place():
                epoch_end(epoch + 1)
    average.give()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    # Accelerate leaves its marks on the model; copies of it would count as prepared, and train in the wrong precision.
    for name in set(vars(model)) - own:
        delattr(model, name)
    model.eval()
    return Fitted(tally.skipped, tally.micro, tally.memory)


def _in_all(images: Tensor, batches: Batches) -> int:
    """Images of this step in all processes: their shares may differ by one."""
    return len(images) if processes.count() == 1 else batches.batch_size


def _state(optimizers: Sequence[Any], tally: "_Tally", average: Average, device: torch.device) -> State:
    gpu = device.type == "cuda"
    return {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "tally": tally.state_dict(),
        "average": average.state_dict(),
        "random": processes.gather(torch.get_rng_state()),
        "random_device": processes.gather(torch.cuda.get_rng_state(device)) if gpu else None,
    }


def _load_state(
    state: State, optimizers: Sequence[Any], tally: "_Tally", average: Average, device: torch.device
) -> None:
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    tally.load_state_dict(state["tally"])
    average.load_state_dict(state["average"])
    # Dropout and the like, each process its own; with another number of processes there is nothing to go on with.
    if len(state["random"]) == processes.count():
        torch.set_rng_state(state["random"][processes.index()])
        if device.type == "cuda" and state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"][processes.index()], device)


def _finite(model: nn.Module, sums: Tensor, hook: Hook, options: FitOptions, accelerator: Accelerator) -> bool:
    """Whether loss and gradients of this step are numbers, in every process; clips the gradients on the way."""
    if options.clip:
        norm = accelerator.clip_grad_norm_(model.parameters(), options.clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # The one look at the device in a step: what it says decides whether there is one.
    finite = bool(norm.isfinite() & sums[0].isfinite() & hook.finite())
    return not processes.highest(not finite)[0]


class _Passes:
    """Forward and backward of batches, in micro-batches that fit into memory."""

    def __init__(
        self,
        model: nn.Module,
        options: FitOptions,
        accelerator: Accelerator,
        hook: Hook,
        task: TrainingLoss,
        optimizers: Sequence[Any],
        tally: "_Tally",
    ) -> None:
        self._model, self._accelerator, self._hook, self._task = model, accelerator, hook, task
        self._accumulate, self._optimizers, self._tally = options.accumulate, optimizers, tally

    def backward(self, images: Tensor, labels: Tensor, in_all: int) -> Tensor:
        """Gradients of this process's share of a batch of `in_all` images; the sums [3] of Progress."""
        tally = self._tally
        wanted = max(1, math.ceil(in_all / processes.count() / self._accumulate))
        before = min(wanted, tally.micro) if tally.memory else wanted
        sums, tally.micro = within_memory(
            before,
            lambda micro: self._whole(images, labels, in_all, micro),
            forget=self._forget,
            # Half-way through a backward the others are waiting for this process's gradients.
            retry=processes.count() == 1,
            where=f"step {tally.step + 1}",
            batch=len(images),
        )
        tally.memory = tally.memory or tally.micro < before
        return sums

    def _whole(self, images: Tensor, labels: Tensor, in_all: int, micro: int) -> Tensor:
        sums = torch.zeros(3, device=images.device)
        parts = self._parts(in_all, micro)
        for index, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
            # Gradients are averaged over processes: each weighs as much as it has images.
            share = len(x) * processes.count() / in_all
            with self._accelerator.no_sync(self._model) if index < parts - 1 else nullcontext():
                logits = self._model(pixel_values=x).logits.float()
                loss = self._task.loss(logits, x, y, self._accelerator)
                self._accelerator.backward((loss + self._hook.penalty()) * share)
            hard = y if y.ndim == 1 else y.argmax(-1)
            # Element by element: a tensor made from Python numbers would be a copy to the device in every step.
            sums[0] += loss.detach() * len(x)
            sums[1] += (logits.detach().argmax(-1) == hard).sum()
            sums[2] += len(x)
        return sums

    @staticmethod
    def _parts(in_all: int, micro: int) -> int:
        """Number of micro-batches of at most `micro` images: one for all processes, whose shares may differ by one.

        Masks that are trained are averaged over the processes at every backward, not at the last one of a step.
        """
        least, most = in_all // processes.count(), -(-in_all // processes.count())
        return max(1, min(-(-most // micro), least))

    def _forget(self) -> None:
        """What a pass that ran out of memory has left behind."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self._hook.clear()
        self._task.clear()


def _set_rates(optimizers: Sequence[Any], peaks: Sequence[Sequence[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


class _Tally:
    """Counts steps, sums and time for the progress report, and what went wrong."""

    def __init__(self, steps: int, options: FitOptions, device: torch.device) -> None:
        self.step, self.steps, self.epoch, self.epochs = 0, steps, 0, math.ceil(options.epochs)
        self.skipped, self._streak, self._bad_epoch = 0, 0, 0
        self.micro, self.memory = 0, False
        self._sums = torch.zeros(3, device=device)
        self._began = time.monotonic()

    def start(self, epoch: int, *, fresh: bool = True) -> None:
        self.epoch = epoch
        if fresh:
            self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "sums": self._sums,
            "skipped": [self.skipped, self._streak, self._bad_epoch],
            "micro": [self.micro, int(self.memory)],
            "seconds": time.monotonic() - self._began,
        }

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]
        self._sums = state["sums"].to(self._sums.device)
        self.skipped, self._streak, self._bad_epoch = state["skipped"]
        self.micro, self.memory = state["micro"][0], bool(state["micro"][1])
        self._began = time.monotonic() - state["seconds"]

    def add(self, sums: Tensor) -> None:
        self._sums = self._sums + sums
        self.step += 1
        self._streak = 0

    def skip(self, model: nn.Module) -> None:
        """Count a step that was left out. Raises TrainingError where there is no hope for the next."""
        self.step += 1
        self.skipped += 1
        self._streak += 1
        self._bad_epoch = self.epoch if self._streak == 1 else self._bad_epoch
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            why = ", since the weights are not"
        elif self._streak >= BAD_IN_A_ROW:
            why = f" and in the {self._streak - 1} steps after it"
        elif self.skipped > BAD_SHARE * self.steps:
            why = f", and {self.skipped} of {self.step} steps were left out for that"
        else:
            return
        where = f"step {self.step - self._streak + 1} of {self.steps} (epoch {self._bad_epoch + 1})"
        raise TrainingError(
            f"loss or gradients are no longer finite at {where}{why}; lower the learning rate or train in float32"
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
