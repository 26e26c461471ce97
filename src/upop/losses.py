"""What a model learns from a micro-batch: the true labels and, from a teacher, soft labels and hidden states.

Must not know optimizers, stages or processes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from upop.errors import TrainingError
from upop.recipe import FitOptions


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


class TrainingLoss:
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

    def clear(self) -> None:
        """Forget what the last forward passes have left."""

    def close(self) -> None: ...


class _FeatureLoss(TrainingLoss):
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

    def clear(self) -> None:
        for tap in self._taps:
            tap.clear()

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

    def clear(self) -> None:
        self._output = None

    def close(self) -> None:
        self.clear()
        self._handle.remove()


def make_loss(model: nn.Module, teacher: nn.Module | None, options: FitOptions) -> TrainingLoss:
    if options.distill_features == 0:
        return TrainingLoss(teacher, options)
    if teacher is None:
        raise TrainingError("distill_features: expected a teacher, got none; set it to 0 or give fit() one")
    return _FeatureLoss(model, teacher, options)
