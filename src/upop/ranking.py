"""Ranking: which units go, given scores, costs and a budget. Pure functions over tensors.

Must not know models, masks or time. The units with the LARGEST score are pruned: a large positive gradient of the
loss with respect to a mask value says that lowering it lowers the loss (paper, section 3.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from types import MappingProxyType

import torch
from torch import Tensor

from upop.costs import Cost, unit_cost
from upop.devices import sent
from upop.errors import UpopError
from upop.structures import Structure

Scores = Mapping[str, Tensor]
NO_ALIGNMENT: Mapping[str, int] = MappingProxyType({})


def normalise(structures: Sequence[Structure], scores: Scores, how: str = "zscore") -> dict[str, Tensor]:
    """Scores [U] made comparable between kinds, float64: `how` is one of NORMALISERS, over ALL units of each kind.

    But for structures that may lose none of theirs: those compare with nothing, and their scores become 0.
    In float64, since what is subtracted may be much larger than what is left: the constant gradient of a sparsity
    loss must vanish, not round the scores (paper, Algorithm 1, line 7).
    """
    result = {s.name: torch.zeros_like(scores[s.name], dtype=torch.float64) for s in structures}
    competing = [s for s in structures if not s.fixed]
    for kind in dict.fromkeys(s.kind for s in competing):
        names = [s.name for s in competing if s.kind == kind]
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
    if pooled.numel() == 1:
        return torch.full_like(pooled, 0.5)
    return (first + after - 1).to(pooled.dtype) / 2 / (pooled.numel() - 1)


def unchanged(pooled: Tensor) -> Tensor:
    """As they are: kinds with larger gradients dominate."""
    return pooled


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "zscore": zscore,
    "minmax": minmax,
    "rank": rank,
    "none": unchanged,
}


def select(
    structures: Sequence[Structure],
    scores: Scores,
    budget: float,
    *,
    cost: Cost | None = None,
    align: Mapping[str, int] = NO_ALIGNMENT,
    slack: float = math.inf,
) -> dict[str, Tensor]:
    """Keep [U] bool per structure: units fall in order of decreasing score until what they cost reaches `budget`.

    All structures and kinds compete in one ranking. Where a structure has lanes, or widths are to be multiples of
    `align[kind]`, units fall in groups, ranked by their mean score: in each lane the `align` units of largest score,
    so that every group leaves an aligned width, and the best units. Every structure keeps its `floor` units of lowest
    score, and of whole blocks one stays. Ties fall in the order of `structures` and of units: the earlier goes first.
    Never removes more than needed: without the last group, the budget is not reached. A group that would overshoot it
    by more than `slack` (a block may) is passed over, and smaller ones fall instead; where there is no way round it,
    smaller ones stay for it.

    Args:
        budget: of what `cost` counts (default: the structures' own costs, in parameters), from 0 to what floors leave.
        align: kind -> number that widths must be multiples of, default 1. A width that is none at first may stay.

    Runs where the scores are; nothing waits for the device, but where groups are passed over.
    """
    cost = cost or unit_cost(structures)
    groups = _group(structures, scores, align)
    # Budgets are products of a float ratio and an integer cost: do not let rounding take one unit more.
    budget -= 1e-6 * max(1.0, budget * 1e-6)
    falls = _prefix(structures, groups, cost, budget)
    steps = [group_price(s, cost, align) for s in structures]
    if budget > 0 and max(steps) > slack:
        falls = _pass_over(structures, groups, cost, budget, slack, steps)
    return {s.name: ~falls[groups.of[s.name]] for s in structures}


@dataclass(frozen=True)
class _Groups:
    """Units that fall together, over all structures.

    scores [G], float64; structure [G], its index; share [G], of a structure's units; open [G], False where a floor
    protects the group; of: structure name -> the group of each unit [U].
    """

    scores: Tensor
    structure: Tensor
    share: Tensor
    open: Tensor
    of: dict[str, Tensor]


def _group(structures: Sequence[Structure], scores: Scores, align: Mapping[str, int]) -> _Groups:
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    of: dict[str, Tensor] = {}
    device = scores[structures[0].name].device
    count = 0
    for s in structures:
        values_LK = scores[s.name].to(device).double().view(s.lanes, s.width)
        each = align.get(s.kind, 1)
        number = -(-s.width // each)
        if number == s.units:
            own, group_LK = values_LK[0], torch.arange(s.units, device=device).unsqueeze(0)
            open_ = torch.ones(s.units, dtype=torch.bool, device=device)
            # Of equal scores the last stays, as ties fall earlier first. One is found faster than an order of all.
            falls_last = (
                s.units - 1 - own.flip(0).argmin().unsqueeze(0)
                if s.floor == 1
                else torch.argsort(own, descending=True, stable=True)[s.units - s.floor :]
            )
            open_.index_fill_(0, falls_last, False)  # without a copy to the device
            share = torch.full((number,), 1 / s.units, dtype=torch.float64, device=device)
        else:
            order_LK = torch.argsort(values_LK, dim=1, descending=True, stable=True)
            # Counted from the best unit, which falls last, so that what stays is a whole number of groups.
            place_K = number - 1 - torch.arange(s.width - 1, -1, -1, device=device) // each
            group_LK = torch.empty_like(order_LK).scatter_(1, order_LK, place_K.expand(s.lanes, -1))
            sizes = torch.zeros(number, dtype=torch.float64, device=device).index_add_(
                0, place_K, torch.full((s.width,), float(s.lanes), dtype=torch.float64, device=device)
            )
            sums = torch.zeros(number, dtype=torch.float64, device=device).index_add_(
                0, group_LK.flatten(), values_LK.flatten()
            )
            own, share = sums / sizes, sizes / s.units
            open_ = torch.arange(number, device=device) < number - -(-s.floor // each)
        parts.append((own, share, open_))
        of[s.name] = (group_LK + count).flatten()
        count += number
    sizes_S = torch.tensor([len(own) for own, _, _ in parts])
    flat, share, open_ = (torch.cat(column) for column in zip(*parts, strict=True))
    assert flat.device.type != "cpu" or not flat.isnan().any(), "scores must not be NaN"
    index = sent(torch.repeat_interleave(torch.arange(len(structures)), sizes_S), device)
    return _Groups(flat, index, share, open_ & ~_last_block(structures, flat, index), of)


def _last_block(structures: Sequence[Structure], scores: Tensor, index: Tensor) -> Tensor:
    """Whether each group is the one whole block that stays, bool [G]."""
    blocks = _one_of_these_stays(structures)
    if not blocks:
        return torch.zeros_like(index, dtype=torch.bool)
    is_block = torch.isin(index, sent(torch.tensor(blocks, dtype=index.dtype), index.device))
    # The last of equal scores, as ties fall earlier first.
    order = torch.argsort(torch.where(is_block, scores, torch.inf), descending=True, stable=True)
    return torch.zeros_like(is_block).index_fill_(0, order[-1:], True)


def _one_of_these_stays(structures: Sequence[Structure]) -> list[int]:
    """Indices of the whole blocks, where nothing else says that one of them must stay."""
    blocks = [n for n, s in enumerate(structures) if s.drops]
    return [] if any(structures[n].floor for n in blocks) else blocks


def _prefix(structures: Sequence[Structure], groups: _Groups, cost: Cost, budget: float) -> Tensor:
    """Which groups fall, bool [G]: the fewest, in order of score, whose cost reaches `budget`; else all that may."""
    if budget <= 0:
        return torch.zeros_like(groups.open)
    # Protected groups go to the end of the line, where they never fall.
    order = torch.argsort(
        torch.where(groups.open, groups.scores, torch.full_like(groups.scores, -torch.inf)),
        descending=True,
        stable=True,
    )
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    if cost.additive:
        prices = torch.tensor([cost.prices[s.name] * s.width for s in structures], dtype=torch.float64)
        spent = (sent(prices, order.device)[groups.structure] * groups.share)[order]
        return ((spent.cumsum(0) - spent) < budget)[place] & groups.open
    low, high = torch.zeros_like(place[0]), groups.open.sum()
    zeros_S = torch.zeros(len(structures), dtype=torch.float64, device=order.device)
    # Bisection with tensors, a fixed number of rounds: the device is never asked.
    for _ in range(len(order).bit_length()):
        middle = (low + high) // 2
        gone_S = zeros_S.index_add(0, groups.structure, groups.share * (place < middle))
        reached = cost.dense - cost.of(1 - gone_S) >= budget
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return (place < high) & groups.open


def _pass_over(
    structures: Sequence[Structure], groups: _Groups, cost: Cost, budget: float, most: float, steps: Sequence[float]
) -> Tensor:
    """As `_prefix`, but groups that would end it more than `most` above the budget stay, the next ones go instead.

    Where the budget cannot be reached without such a group, smaller ones stay in its place. `steps`: what a group of
    each structure costs at most. Waits for the device, once for every group that stays.
    """
    while True:
        falls = _prefix(structures, groups, cost, budget)
        zeros_S = torch.zeros(len(structures), dtype=torch.float64, device=falls.device)
        gone_S = zeros_S.index_add(0, groups.structure, groups.share * falls)
        last = torch.where(falls, groups.scores, torch.inf).flip(0).argmin()
        last = len(falls) - 1 - last
        over = cost.dense - float(cost.of(1 - gone_S)) - budget
        others = groups.open.clone()
        others[last] = False
        # What would be missed without it must be there to be had from others.
        rest_S = zeros_S.index_add(0, groups.structure, groups.share * others)
        if over <= most:
            return falls
        if cost.dense - float(cost.of(1 - rest_S)) < budget:
            large_S = sent(torch.tensor([step > most for step in steps]), falls.device)
            # All that is large first, but for what is infinitely far ahead: smaller ones then end it.
            first = groups.scores.clamp_min(torch.finfo(groups.scores.dtype).max)
            scores = torch.where(falls & large_S[groups.structure], first, groups.scores)
            return _prefix(structures, replace(groups, scores=scores), cost, budget)
        groups = replace(groups, open=others)


def is_whole(value: object) -> bool:
    """Whether a count is one: 3, 3.0 or a number of numpy, from 1 on."""
    return isinstance(value, Real) and float(value) >= 1 and float(value) % 1 == 0


def check_alignment(align: Mapping[str, int]) -> dict[str, int]:
    """Kind -> n >= 2, without what changes nothing. Raises UpopError for what is no whole number >= 1."""
    if not isinstance(align, Mapping):
        raise UpopError(f"align: expected multiples by kind, as {{'attn': 8, 'mlp': 64}}, got {align!r}")
    for kind, each in align.items():
        if not is_whole(each):
            raise UpopError(f"align: {kind}: expected a whole number of units, 1 or more, got {each!r}")
    return {kind: int(each) for kind, each in align.items() if each > 1}


def group_price(s: Structure, cost: Cost, align: Mapping[str, int] = NO_ALIGNMENT) -> float:
    """What the units of `s` that fall together cost at most, all else staying."""
    return cost.step(s, align.get(s.kind, 1))


def select_uniform(
    structures: Sequence[Structure],
    scores: Scores,
    ratio: float,
    *,
    cost: Cost | None = None,
    align: Mapping[str, int] = NO_ALIGNMENT,
) -> dict[str, Tensor]:
    """Keep [U] bool as `select`, but each kind by itself, giving up `ratio` in [0, 1] of its own prunable cost.

    What floors keep one kind from giving is left standing: see `uniform_limit` for what can be asked. `cost` must be
    additive.
    """
    cost = cost or unit_cost(structures)
    assert cost.additive, "kinds that share weights, and measured times, cannot be split up by kind"
    keep: dict[str, Tensor] = {}
    for kind in dict.fromkeys(s.kind for s in structures):
        own = [s for s in structures if s.kind == kind]
        part = cost.only(own)
        keep |= select(own, scores, ratio * part.prunable, cost=part, align=align)
    return keep


def uniform_limit(
    structures: Sequence[Structure], cost: Cost | None = None, align: Mapping[str, int] = NO_ALIGNMENT
) -> float:
    """The largest ratio that every kind can give by itself."""
    cost = cost or unit_cost(structures)
    owns = [cost.only(s for s in structures if s.kind == kind) for kind in dict.fromkeys(s.kind for s in structures)]
    return min(removable(own, align) / own.prunable for own in owns)


def removable(cost: Cost, align: Mapping[str, int] = NO_ALIGNMENT) -> float:
    """What can go of `cost` while every structure keeps its floor, in whole groups, and one whole block stays."""

    def stays(s: Structure) -> float:
        each = align.get(s.kind, 1)
        return min(s.width, each * -(-s.floor // each)) / s.width

    fractions = torch.tensor([stays(s) for s in cost.structures], dtype=torch.float64)
    blocks = _one_of_these_stays(cost.structures)
    # The cheapest block to keep, its own units at their floors.
    left = []
    for block in blocks:
        kept = fractions.clone()
        kept[block] = 1.0
        left.append(float(cost.of(kept)))
    return cost.dense - min(left, default=float(cost.of(fractions)))


def below(structures: Sequence[Structure], scores: Scores, threshold: float) -> dict[str, Tensor]:
    """Keep [U] bool per structure, without lanes: every unit with a score above `threshold` falls, but for floors."""
    groups = _group(structures, scores, NO_ALIGNMENT)
    falls = (groups.scores > threshold) & groups.open
    return {s.name: ~falls[groups.of[s.name]] for s in structures}
