"""One-shot scores: what a few batches say of every unit of a model that is left as it is, without a search.

Must not change weights, gradients or masks, and must not select: see `upop.ranking` for that.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop import processes
from upop.compensate import Moments, evaluating, input_moments
from upop.criteria import random_scores, weight_norms
from upop.errors import TrainingError, UpopError, nearest
from upop.masks import Masks
from upop.memory import in_parts
from upop.structures import Structure, linear

Score = Literal["taylor", "gradient", "variance", "magnitude", "random"]
Labelled = Iterable[tuple[Tensor, Tensor]]

SCORES: tuple[Score, ...] = get_args(Score)


def rank(
    model: nn.Module, structures: Sequence[Structure], batches: Labelled, *, score: Score = "taylor", seed: int = 0
) -> dict[str, Tensor]:
    """Scores [U], float64 on the CPU, per structure: the LARGEST goes first, as in `upop.ranking`.

    `batches` are (images [B, 3, H, W], labels [B] or probabilities [B, C]); each is read once, in eval mode. Of
    several processes (torch.distributed) each is given its part of every batch, and gets the scores of the whole.

    `taylor`: minus the sum over batches of |mask * gradient|, the loss's first-order change (Molchanov et al., 2017).
    `gradient`: the sum over batches of the mask's signed gradient, as the search of the paper accumulates it.
    `variance`: minus `lost_variance`, of the images alone.
    `magnitude`: minus the norm of a unit's weights; `random`: of `seed`. Both without reading any batch.

    Scores are those of a single unit each; that of a whole set is not their sum. Raises UpopError for an unknown
    score, TrainingError for a gradient that is not finite.
    """
    if score not in SCORES:
        raise UpopError(f"score: expected one of {', '.join(SCORES)}, got {score!r}{nearest(score, SCORES)}")
    if score == "magnitude":
        return _minus(weight_norms(model, structures))
    if score == "random":
        return random_scores(structures, seed)
    if score == "variance":
        return _minus(lost_variance(model, structures, input_moments(model, structures, (x for x, _ in batches))))
    return _by_gradient(model, structures, batches, absolute=score == "taylor")


def lost_variance(
    model: nn.Module, structures: Sequence[Structure], moments: Mapping[str, Moments]
) -> dict[str, Tensor]:
    """What removing each unit alone costs at least [U], float64: the squared error that no bias can put back.

    The variance of the unit's inputs to its consumers, each times the squared norm of its column, summed
    (Variance-Based Pruning, ICCV 2025). Of head dims it sees the values, not what q and k give to attention's logits.
    Raises UpopError for structures without consumers.
    """
    result = {}
    for s in structures:
        if not s.consumers:
            raise UpopError(f"score variance: {s.name}: no layer reads these units by themselves; use taylor")
        lost = torch.zeros(s.units, dtype=torch.float64)
        for port in s.consumers:
            norms = linear(model, port.path).weight.detach().double().cpu().square().sum(0)
            lost += (norms * moments[port.path].variance).view(port.outer, s.units, port.inner).sum((0, 2))
        result[s.name] = lost
    return result


def _by_gradient(
    model: nn.Module, structures: Sequence[Structure], batches: Labelled, *, absolute: bool
) -> dict[str, Tensor]:
    masks = Masks(model, structures)
    names, values = list(masks.values), list(masks.values.values())
    total: list[Tensor] = []
    try:
        with evaluating(model), torch.enable_grad():
            for images, labels in batches:
                slopes = functools.partial(_slopes, model, values, images, labels, _weight(labels))
                gradients = [processes.mean_(g) for g in in_parts(len(images), slopes, where="score")]
                # Masks are 1, so that mask * gradient is the gradient.
                terms = [-g.abs() if absolute else g for g in gradients]
                total = [a + b for a, b in zip(total, terms, strict=True)] if total else terms
    finally:
        masks.detach()
    if not total:
        raise UpopError("score: expected one batch of images and labels or more, got none")
    scores = {name: value.cpu() for name, value in zip(names, total, strict=True)}
    if bad := [name for name, value in scores.items() if not bool(value.isfinite().all())]:
        raise TrainingError(f"score: {bad[0]}: a mask gradient is NaN or infinite; rank in float32")
    return scores


def _slopes(
    model: nn.Module, masks: Sequence[Tensor], images: Tensor, labels: Tensor, weight: float, micro: int
) -> list[Tensor]:
    """Gradients, float64, of the mean loss over a batch times `weight`, `micro` images at a time."""
    total: list[Tensor] = []
    for x, y in zip(torch.split(images, micro), torch.split(labels, micro), strict=True):
        output: Any = model(x)
        loss = F.cross_entropy(getattr(output, "logits", output).float(), y) * (weight * len(x) / len(images))
        # Of the masks alone: weights need no gradient, and one that they have stays as it is.
        found = [g.double() for g in torch.autograd.grad(loss, masks)]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


def _weight(labels: Tensor) -> float:
    """What this process's part of a batch weighs in the mean over processes: 1 where all parts are as large."""
    if processes.count() == 1:
        return 1.0
    total = processes.add_up_(torch.tensor(len(labels), device=labels.device))
    return len(labels) * processes.count() / int(total)


def _minus(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -value for name, value in scores.items()}
