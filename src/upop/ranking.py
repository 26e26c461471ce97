"""Ranking: which units go, given scores, costs and a budget. Pure functions over tensors.

Must not know models, masks or time. The units with the LARGEST score are pruned: a large positive gradient of the
loss with respect to a mask value says that lowering it lowers the loss (paper, section 3.2).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from upop.structures import Structure, prunable_cost, removable_cost

Scores = Mapping[str, Tensor]


def normalise(structures: Sequence[Structure], scores: Scores, how: str = "zscore") -> dict[str, Tensor]:
    """Scores [U] made comparable between kinds, float64: `how` is one of NORMALISERS, over ALL units of each kind.

    In float64, since what is subtracted may be much larger than what is left: the constant gradient of a sparsity
    loss must vanish, not round the scores (paper, Algorithm 1, line 7).
    """
    result: dict[str, Tensor] = {}
    for kind in dict.fromkeys(s.kind for s in structures):
        names = [s.name for s in structures if s.kind == kind]
        pooled = NORMALISERS[how](torch.cat([scores[name].double() for name in names]))
        result.update(zip(names, torch.split(pooled, [scores[name].numel() for name in names]), strict=True))
    return result


def zscore(pooled: Tensor) -> Tensor:
    """Minus the mean, over the standard deviation: the paper's. All 0 where all scores are equal."""
    centred = pooled - pooled.mean()
    std = centred.square().mean().sqrt()
    # A spread at the level of rounding is no spread: dividing by it would rank noise.
    flat = std <= 1e-12 * pooled.abs().max()
    return torch.where(flat, torch.zeros_like(centred), centred / std.clamp_min(1e-300))


def minmax(pooled: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]. All 0 where all scores are equal."""
    low, high = pooled.min(), pooled.max()
    return torch.where(high > low, (pooled - low) / (high - low).clamp_min(1e-300), torch.zeros_like(pooled))


def rank(pooled: Tensor) -> Tensor:
    """Ranks from 0 to 1, equal scores sharing the mean of theirs. All 1/2 where all scores are equal."""
    ordered = pooled.sort().values
    first, after = torch.searchsorted(ordered, pooled), torch.searchsorted(ordered, pooled, right=True)
    return (first + after - 1) / 2 / (pooled.numel() - 1) if pooled.numel() > 1 else torch.full_like(pooled, 0.5)


def unchanged(pooled: Tensor) -> Tensor:
    """As they are: kinds with larger gradients dominate."""
    return pooled


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "zscore": zscore,
    "minmax": minmax,
    "rank": rank,
    "none": unchanged,
}


def select(structures: Sequence[Structure], scores: Scores, budget: float) -> dict[str, Tensor]:
    """Keep [U] bool per structure: units fall in order of decreasing score until their summed cost reaches `budget`.

    `budget` is in parameters, in [0, removable cost]. All structures and kinds compete in one ranking. Every
    structure keeps its `floor` units of lowest score. Ties fall in the order of `structures` and of units: the
    earlier goes first. Never removes more than needed: without the last unit, the budget is not reached.
    """
    flat, protected = _flat(structures, scores)
    costs = torch.cat([torch.full((s.units,), s.cost) for s in structures])
    order = torch.argsort(flat, descending=True, stable=True)
    order = order[~protected[order]]
    spent_before = costs[order].cumsum(0) - costs[order]
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    # Budgets are products of a float ratio and an integer cost: do not let rounding take one unit more.
    keep[order[spent_before.double() < budget - 1e-6 * max(1.0, budget * 1e-6)]] = False
    return _per_structure(structures, keep)


def select_uniform(structures: Sequence[Structure], scores: Scores, ratio: float) -> dict[str, Tensor]:
    """Keep [U] bool as `select`, but each kind by itself, giving up `ratio` in [0, 1] of its own prunable cost.

    What floors keep one kind from giving is left standing: see `uniform_limit` for what can be asked.
    """
    keep: dict[str, Tensor] = {}
    for kind in dict.fromkeys(s.kind for s in structures):
        own = [s for s in structures if s.kind == kind]
        keep |= select(own, scores, ratio * prunable_cost(own))
    return keep


def uniform_limit(structures: Sequence[Structure]) -> float:
    """The largest ratio that every kind can give by itself."""
    kinds = dict.fromkeys(s.kind for s in structures)
    owns = [[s for s in structures if s.kind == kind] for kind in kinds]
    return min(removable_cost(own) / prunable_cost(own) for own in owns)


def below(structures: Sequence[Structure], scores: Scores, threshold: float) -> dict[str, Tensor]:
    """Keep [U] bool per structure: every unit with a score above `threshold` falls, but for the floors."""
    flat, protected = _flat(structures, scores)
    return _per_structure(structures, (flat <= threshold) | protected)


def _flat(structures: Sequence[Structure], scores: Scores) -> tuple[Tensor, Tensor]:
    """All scores [all U] in float64, and which units floors protect: those that would fall last."""
    each = [scores[s.name].double().cpu() for s in structures]
    flat = torch.cat(each)
    assert not flat.isnan().any(), "scores must not be NaN"
    return flat, torch.cat([_floor_units(score, s.floor) for score, s in zip(each, structures, strict=True)])


def _per_structure(structures: Sequence[Structure], keep: Tensor) -> dict[str, Tensor]:
    parts = torch.split(keep, [s.units for s in structures])
    return {s.name: part.clone() for s, part in zip(structures, parts, strict=True)}


def _floor_units(scores_U: Tensor, floor: int) -> Tensor:
    """The `floor` units that would fall last, as bool [U]."""
    last = torch.argsort(scores_U, descending=True, stable=True)[scores_U.numel() - floor :]
    return torch.zeros(scores_U.numel(), dtype=torch.bool).index_fill_(0, last, True)
