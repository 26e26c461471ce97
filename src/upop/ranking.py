"""Ranking: which units go, given scores, costs and a budget. Pure functions over tensors.

Must not know models, masks or time. The units with the LARGEST score are pruned: a large positive gradient of the
loss with respect to a mask value says that lowering it lowers the loss (paper, section 3.2).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upop.structures import Structure

Scores = Mapping[str, Tensor]


def zscore_per_kind(structures: Sequence[Structure], scores: Scores) -> dict[str, Tensor]:
    """Scores [U] minus the mean, over the standard deviation, of ALL units of their kind (all layers together).

    A kind whose scores are all equal says nothing about its units: its z-scores are 0. Paper, Algorithm 1, line 7.
    """
    result: dict[str, Tensor] = {}
    for kind in dict.fromkeys(s.kind for s in structures):
        names = [s.name for s in structures if s.kind == kind]
        pooled = torch.cat([scores[name].float() for name in names])
        centred = pooled - pooled.mean()
        std = centred.square().mean().sqrt()
        # A spread at the level of float32 rounding is no spread: dividing by it would rank noise.
        flat = std <= 1e-6 * pooled.abs().max()
        normed = torch.where(flat, torch.zeros_like(centred), centred / std.clamp_min(1e-38))
        result.update(zip(names, torch.split(normed, [scores[name].numel() for name in names]), strict=True))
    return result


def select(structures: Sequence[Structure], scores: Scores, budget: float) -> dict[str, Tensor]:
    """Keep [U] bool per structure: units fall in order of decreasing score until their summed cost reaches `budget`.

    `budget` is in parameters, in [0, removable cost]. All structures and kinds compete in one ranking. Every
    structure keeps its `floor` units of lowest score. Ties fall in the order of `structures` and of units: the
    earlier goes first. Never removes more than needed: without the last unit, the budget is not reached.
    """
    flat = torch.cat([scores[s.name].float().cpu() for s in structures])
    assert not flat.isnan().any(), "scores must not be NaN"
    costs = torch.cat([torch.full((s.units,), s.cost) for s in structures])
    protected = torch.cat([_floor_units(scores[s.name].float().cpu(), s.floor) for s in structures])
    order = torch.argsort(flat, descending=True, stable=True)
    order = order[~protected[order]]
    spent_before = costs[order].cumsum(0) - costs[order]
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    # Budgets are products of a float ratio and an integer cost: do not let rounding take one unit more.
    keep[order[spent_before.double() < budget - 1e-6 * max(1.0, budget * 1e-6)]] = False
    parts = torch.split(keep, [s.units for s in structures])
    return {s.name: part.clone() for s, part in zip(structures, parts, strict=True)}


def _floor_units(scores_U: Tensor, floor: int) -> Tensor:
    """The `floor` units that would fall last, as bool [U]."""
    last = torch.argsort(scores_U, descending=True, stable=True)[scores_U.numel() - floor :]
    return torch.zeros(scores_U.numel(), dtype=torch.bool).index_fill_(0, last, True)
