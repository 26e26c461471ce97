"""What a run cuts without training: the one-shot ranking, compensation, and what the result says of what stays.

Must not train, and writes nothing.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from upop.compensate import input_moments, shift_, shifts
from upop.data import Augment
from upop.families import find_structures
from upop.methods import ONE_SHOT
from upop.oneshot import rank
from upop.plan import Plan, make_batches
from upop.ranking import normalise, select
from upop.structures import kept_widths, widths


def one_shot_keep(plan: Plan, accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """What stays of `model` at the plan's target, ranked on a few batches of training images."""
    c = plan.config
    assert plan.target is not None, "a one-shot ranking has a target"
    cost = plan.analysis.costs[plan.target.currency]
    budget = cost.dense - plan.left
    structures = find_structures(model, plan.kinds)
    scores = rank(model, structures, _calibration(plan, accelerator), score=ONE_SHOT[c.method], seed=c.seed)
    slack = plan.target.slack(cost, budget)
    scores = normalise(structures, scores, c.normalise or "zscore")
    return select(structures, scores, budget, cost=cost, align=plan.align, slack=slack)


def compensate_(
    small: nn.Module, model: nn.Module, keep: Mapping[str, Tensor], plan: Plan, accelerator: Accelerator
) -> None:
    """Make up in `small` for what was cut out of `model`, which has no masks on, where the plan says so. In place."""
    how = plan.config.how_to_compensate
    if how == "none":
        return
    structures = find_structures(model, plan.kinds)
    images = [batch for batch, _ in _calibration(plan, accelerator)]
    moments = input_moments(model, structures, images, covariance=how == "least-squares")
    shift_(small, shifts(model, structures, keep, moments, how=how))


def decided(plan: Plan, keep: Mapping[str, Tensor]) -> dict[str, Any]:
    """What result.json says of what stays: ratios removed, and widths per layer."""
    structures, size = plan.analysis.structures, plan.analysis.params_cost
    removed = size.removed(keep)
    ratio = {
        "target": plan.target and plan.target.value,
        "prunable": removed / size.prunable,
        "params": removed / size.dense,
    }
    if plan.target is not None:
        cost = plan.analysis.costs[plan.target.currency]
        ratio |= {cost.currency: cost.removed(keep) / cost.dense}
    return {"ratio": ratio, "widths": {"before": widths(structures), "after": kept_widths(structures, keep)}}


def _calibration(plan: Plan, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """A few batches of training images as they are, in an order of the seed's; the same ones in every process."""
    as_they_are = Augment(False, 0, 0.0, 0.0, 0.0, 0.0)
    batches = make_batches(
        plan.data.train,
        plan.config,
        plan.loaded,
        accelerator,
        classes=len(plan.data.classes),
        augment=as_they_are,
        everywhere=True,
    )
    return list(itertools.islice(batches.epoch(0), plan.config.rank_batches))
