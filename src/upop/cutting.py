"""What a run cuts without training: the one-shot ranking, compensation, and what the result says of what stays.

Must not train, and writes nothing.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop import processes
from upop.compensate import cut_and_compensate_, input_moments
from upop.data import Augment
from upop.methods import ONE_SHOT
from upop.oneshot import rank
from upop.plan import Plan, make_batches
from upop.ranking import normalise, select
from upop.slim import slim
from upop.structures import Structure, dropped_blocks, is_within, kept_widths, widths

Labelled = Sequence[tuple[Tensor, Tensor]]


def one_shot(plan: Plan, accelerator: Accelerator, model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
    """What stays of `model` at the plan's target, ranked on a few batches of training images; and its slimmed twin.

    In rounds, each of which takes the same share of what is left: what a unit is worth depends on which others are
    there, so each round ranks anew, the model as the rounds before have left and compensated it. `model` stays.
    """
    c = plan.config
    assert plan.target is not None, "a one-shot ranking has a target"
    cost = plan.analysis.costs[plan.target.currency]
    goal = cost.dense - plan.left
    structures, images = plan.analysis.structures, _calibration(plan, accelerator)
    work = copy.deepcopy(model)
    keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    for number in range(1, c.rank_rounds + 1):
        budget = cost.dense * (1 - (plan.left / cost.dense) ** (number / c.rank_rounds))
        if cost.removed(keep) >= budget:
            continue  # the round before went that far: to select for less would bring back units that are cut
        # What is too large for a round, such as a whole block, may be taken where it fits into all of them.
        slack = goal - budget + plan.target.slack(cost, goal)
        scores = rank(work, structures, images, score=ONE_SHOT[c.method], seed=c.seed)
        scores = _first_the_gone(structures, scores, keep, c.normalise or "zscore")
        keep = select(structures, scores, budget, cost=cost, align=plan.align, slack=slack)
        keep = {name: processes.keep_of_first(k.to(accelerator.device)).cpu() for name, k in keep.items()}
        _compensate_(work, structures, keep, plan, images)
    return keep, slim(work, keep)


def compensated(plan: Plan, accelerator: Accelerator, model: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """The slimmed twin of `model`, which has no masks on, made up for what was cut where the plan says so."""
    work = copy.deepcopy(model)
    _compensate_(work, plan.analysis.structures, keep, plan, _calibration(plan, accelerator))
    return slim(work, keep)


def _compensate_(
    work: nn.Module, structures: Sequence[Structure], keep: Mapping[str, Tensor], plan: Plan, images: Labelled
) -> None:
    how = plan.config.how_to_compensate
    if how == "none":
        cut_and_compensate_(work, structures, keep)
        return
    moments = input_moments(work, structures, (batch for batch, _ in images), covariance=how == "least-squares")
    cut_and_compensate_(work, structures, keep, moments, how=how)


def _first_the_gone(
    structures: Sequence[Structure], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], how: str
) -> dict[str, Tensor]:
    """Scores, normalised over the units that are left; those that are gone, also with their block, come first."""
    dropped = dropped_blocks(structures, keep)
    stays = {s.name: keep[s.name] & (not is_within(s.block, dropped)) for s in structures}
    left = normalise(structures, {name: values[stays[name]] for name, values in scores.items()}, how)
    return {
        name: torch.full_like(values, torch.inf).masked_scatter_(stays[name], left[name])
        for name, values in scores.items()
    }


def decided(plan: Plan, keep: Mapping[str, Tensor]) -> dict[str, Any]:
    """What result.json says of what stays: ratios removed, and widths per layer."""
    structures, size = plan.analysis.structures, plan.analysis.params_cost
    removed = size.removed(keep)
    ratio = {
        "target": plan.target and plan.target.value,
        "prunable": removed / size.prunable,
        "params": removed / size.dense,
    }
    if plan.target is not None and (cost := plan.analysis.costs.get(plan.target.currency)) is not None:
        ratio |= {cost.currency: cost.removed(keep) / cost.dense}
    return {"ratio": ratio, "widths": {"before": widths(structures), "after": kept_widths(structures, keep)}}


def _calibration(plan: Plan, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """A few batches of training images as they are, in an order of the seed's; this process's share of each."""
    as_they_are = Augment(False, 0, 0.0, 0.0, 0.0, 0.0)
    batches = make_batches(
        plan.data.train,
        plan.config,
        plan.loaded,
        accelerator,
        classes=len(plan.data.classes),
        augment=as_they_are,
    )
    return list(itertools.islice(batches.epoch(0), plan.config.rank_batches))
