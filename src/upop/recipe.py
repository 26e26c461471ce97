"""How one stage is trained: its options, the optimizers and learning rates that they mean.

Must not train: the loop is in `upop.train`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from upop.muon import Muon


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
        ema: decay, in [0, 1), of the running average of the weights that training ends with; 0 = its last weights.
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
    ema: float = 0.0
    seed: int = 0


def count_steps(epochs: float, per_epoch: int) -> int:
    """Optimizer steps of `epochs` epochs of `per_epoch` steps, at least one."""
    return max(1, round(epochs * per_epoch))


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
    muon = Muon(matrices, lr=options.lr, weight_decay=options.weight_decay)
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
