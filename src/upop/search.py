"""The search: UPop's Algorithm 1, and the baselines, as an object that a training loop calls once per optimizer step.

Owns masks, scores and the decision which units stay. Must not know data, optimizers, devices of others, or files.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from upop import processes
from upop.costs import params_cost
from upop.errors import TargetError, UpopError, nearest
from upop.families import find_structures
from upop.growth import Growth
from upop.latency import LatencyTable
from upop.masks import Masks
from upop.methods import METHODS, Shrink
from upop.penalty import DEFAULT_SPARSITY, Penalty
from upop.ranking import (
    NO_ALIGNMENT,
    NORMALISERS,
    below,
    check_alignment,
    is_whole,
    removable,
    select,
    select_uniform,
    uniform_limit,
)
from upop.schedules import SCHEDULES
from upop.scores import GradientOrder, Scores
from upop.slim import refuse_closures, slim
from upop.structures import of_each, whole_layers
from upop.targets import ROUNDING, Target, check_goal, find_cost, floor4, what_stays

log = logging.getLogger(__name__)

# Steps by which an optimizer has moved the masks that it trains, whatever its warm-up or overflows at the start; in a
# long search, whose first updates are rounded away beside 1, this share of all.
TRAINED_BY, TRAINED_BY_SHARE = 20, 0.02
# No open-ended search goes further than this fraction of the prunable cost.
OPEN_LIMIT = 0.95


class Scaler(Protocol):
    """What a search wants of a torch.amp.GradScaler."""

    def get_scale(self) -> float: ...


class Search:
    """Unified and progressive search (paper, Algorithm 1) over all prunable units of `model`.

    In a training loop of `steps` optimizer steps::

        (loss + search.penalty()).backward()
        optimizer.step(); search.step(); optimizer.zero_grad()

    `search.step()` may stand on either side of `optimizer.step()`: mask gradients are collected during backward, with
    the weights of that moment. Under float16 a GradScaler multiplies them: `search.step(scaler)`, before
    `scaler.update()`. At the end of a progressive search every mask is exactly 0 or 1, and `slim()` changes no output.
    Methods that cut `once` have no such end: what `slim()` returns is then another function.

    Args:
        model: any model of a known family; its parameters, names and, at the start, outputs are untouched.
        target: what to remove, or its text, as `params=0.5`. None for an open-ended search: `threshold`, `max_drop` or
            `tolerance` then decides.
        steps: optimizer steps that the search lasts, T >= 1.
        structures: the kinds that compete in the ranking (see `upop.kinds`); the paper's are `attn` and `mlp`.
        ignored_layers: layers that keep all of their units, as `(0, -1)` or `"0-2,-1"`.
        align: kind -> number that widths become multiples of, as hardware likes them; part of the ranking.
        latency: a table measured by `upop.measure_latency_table`, for a target in latency.
        method: name of a method (see `upop.methods`). With `mask` and `unified`, the optimizer also trains
            `trained_masks()`.
        shrink: `progressive` or `once` in place of the method's own, for methods that do not train masks.
        schedule: name of a schedule (see `upop.schedules`); the paper's is `sine`.
        interval: masks are re-decided every `interval` steps and at the last one; the paper's is 1.
        normalise: how scores of a kind are made comparable (see `upop.ranking`); the paper's is `zscore`.
        gradient_order: `paper` normalises each step's gradients, then sums; `authors` sums raw gradients first.
        sparsity: weight of `sum |mask|` in `penalty()` per kind; None = the authors' for `attn` and `mlp`.
        threshold: prune every unit whose normalised accumulated score is above it, whatever that comes to.
        max_drop: the largest ratio whose accuracy, told by `observe`, is at most this far below the first one.
        tolerance: the ratio grows while the accuracy falls by at most this from one check to the next.
        checks: accuracies asked for during the search, for `max_drop` and `tolerance`; masks are then hard, 0 or 1.
        seed: of the method `random`.

    Raises UpopError for unknown families, unreachable targets and bad options, before the model is touched.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: Target | str | None,
        steps: int,
        structures: Sequence[str] | str | None = None,
        ignored_layers: Sequence[int] | str = (),
        align: Mapping[str, int] = NO_ALIGNMENT,
        latency: LatencyTable | None = None,
        method: str = "upop",
        shrink: Shrink | None = None,
        schedule: str = "sine",
        interval: int = 1,
        normalise: str = "zscore",
        gradient_order: GradientOrder = "paper",
        sparsity: Mapping[str, float] | None = None,
        threshold: float | None = None,
        max_drop: float | None = None,
        tolerance: float | None = None,
        checks: int = 20,
        seed: int = 0,
    ) -> None:
        if not all(map(is_whole, (steps, interval, checks))):
            raise UpopError(
                "Search: expected steps, interval and checks >= 1, whole numbers, got "
                f"{steps=}, {interval=}, {checks=}; round them, or use //"
            )
        steps, interval, checks = int(steps), int(interval), int(checks)
        target = Target.parse(target) if isinstance(target, str) else target
        if not isinstance(target, Target | None):
            raise TargetError(
                f"target: expected upop.Target(params=0.5), its text 'params=0.5', or None, got {target!r}"
            )
        _one_of("method", method, METHODS)
        _one_of("shrink", shrink or "once", ("progressive", "once"))
        _one_of("schedule", schedule, SCHEDULES)
        _one_of("normalise", normalise, NORMALISERS)
        _one_of("gradient_order", gradient_order, ("paper", "authors"))
        self.model, self._name = model, method
        self.structures = find_structures(model, structures, ignored_layers)
        refuse_closures(model)
        self.method = dataclasses.replace(METHODS[method], shrink=shrink or METHODS[method].shrink)
        self.target, self.steps, self.interval = target, steps, interval
        self.schedule, self.normalise, self.gradient_order = schedule, normalise, gradient_order
        kinds = list(dict.fromkeys(s.kind for s in self.structures))
        self.align = check_alignment(align)
        for what, values in (("sparsity", sparsity or {}), ("align", align)):
            for kind in values:
                _one_of(what, kind, kinds)
        _check_weights(sparsity or {})
        # Plain numbers, whatever type was given: a state is to be saved without code that unpacks it.
        self.threshold, self.seed = None if threshold is None else float(threshold), int(seed)
        self.sparsity = (
            {k: v for k, v in DEFAULT_SPARSITY.items() if k in kinds}
            if sparsity is None
            else {kind: float(weight) for kind, weight in sparsity.items()}
        )
        # The control removes nothing, so that no table is needed to say how much.
        currency = "params" if target is None or self.method.score == "none" else target.currency
        self.cost = find_cost(model, self.structures, currency, latency)
        self._params = params_cost(model, self.structures)
        check_goal(target, self.method, threshold=threshold, max_drop=max_drop, tolerance=tolerance)
        if not self.method.unified and not self.cost.additive:
            raise TargetError(
                f"method {method}: gives every kind the same ratio, which a target in latency, or units within heads "
                "and blocks, do not have; use a unified method"
            )
        if threshold is not None and (self.align or any(s.lanes > 1 for s in self.structures)):
            raise TargetError("threshold: decides on each unit by itself; leave out align and the kinds dims, qk, v")
        # As a fraction of what the units cost, whatever the target's own unit is.
        self.target_ratio = float(self._target_ratio())
        budget = self.target_ratio * self.cost.prunable
        self._slack = math.inf if target is None else target.slack(self.cost, budget)
        self._rules: tuple[float, int, float | None, float | None] | None = None
        if max_drop is not None or tolerance is not None:
            limit = self.target_ratio if target is not None else min(OPEN_LIMIT, self._most())
            drop, fall = (None if value is None else float(value) for value in (max_drop, tolerance))
            self._rules = (limit, min(checks, steps), drop, fall)
        self.growth = self._new_growth()
        self._latency = latency.digest if latency is not None and self.cost.currency == "latency" else None
        self.ratio = 0.0
        self.steps_done = 0
        self.masks = Masks(model, self.structures)
        try:
            self._prepare()
        except BaseException:
            self.masks.detach()
            raise

    def _prepare(self) -> None:
        """What the attached masks are gathered and trained with."""
        self._penalty = Penalty(self.masks, self.structures, self.sparsity, trained=self.trains_masks)
        self._scores = Scores(
            self.model,
            self.masks,
            self._penalty,
            self.structures,
            self.method,
            how=self.normalise,
            order=self.gradient_order,
            comparable=self.threshold is not None,
            seed=self.seed,
        )
        everything = torch.ones(sum(s.units for s in self.structures), dtype=torch.bool, device=self._scores.device)
        self._keep = of_each(self.structures, everything)
        if self.trains_masks:
            for s in self.structures:
                # Gradients of what is in no optimizer would pile up: none clears them.
                self.masks.values[s.name].requires_grad_(not s.fixed)
            for mask in self.trained_masks():
                mask.register_post_accumulate_grad_hook(_average_gradient_)  # type: ignore[no-untyped-call]

    @property
    def done(self) -> bool:
        """True once all `steps` are taken and no accuracy is asked for any more: what stays is decided."""
        return self.steps_done >= self.steps and not self.needs_accuracy

    @property
    def trains_masks(self) -> bool:
        """Whether the masks are to be trained by the ordinary optimizer (methods `mask` and `unified`)."""
        return self.method.score == "mask"

    @property
    def needs_accuracy(self) -> bool:
        """Whether `observe` must be called before the next `step`: at the start and at every check."""
        return self.growth is not None and self.growth.due(self.steps_done)

    @property
    def params_left(self) -> int:
        """Parameters of the model without the units that are out of favour now; reading it waits for the device."""
        kept = torch.stack([self._keep[s.name].double().mean() for s in self.structures])
        return round(float(self._params.of(kept)))

    def trained_masks(self) -> list[Tensor]:
        """Mask values [U] that belong into the optimizer, without weight decay; empty for most methods."""
        return [self.masks.values[s.name] for s in self.structures if not s.fixed] if self.trains_masks else []

    def penalty(self) -> Tensor:
        """Sparsity loss: `weight * sum |mask|`, summed over kinds (scalar, differentiable)."""
        return self._penalty.value()

    def step(self, scaler: Scaler | None = None) -> None:
        """Take in the mask gradients of the last backward(s) and, when due, re-decide all masks.

        Call once per optimizer step. Steps after the last one change nothing. With the GradScaler that has scaled the
        loss, its scale is taken out again, and a step whose gradients overflowed counts and adds nothing.
        Raises UpopError when no backward has run or an accuracy is due, TrainingError when a gradient is not finite;
        with a scaler, when none has been for MOST_OVERFLOWS steps.
        """
        if self.steps_done >= self.steps:
            self.clear()
            return
        self._refuse_early("step")
        if self.steps_done == 0:
            self.masks.check()
        if not self.trains_masks:
            scale = None if scaler is None else float(scaler.get_scale())
            self._scores.take(self.steps_done, scale=scale, last=self.steps_done == self.steps - 1)
        elif self.steps_done == min(max(TRAINED_BY, int(TRAINED_BY_SHARE * self.steps)), self.steps - 1) > 0:
            self._refuse_untrained("step")
        self._go_on()

    def skip(self) -> None:
        """Count a step whose gradients are not to be used: an overflow, say, for which the optimizer took none either.

        They are cleared and add nothing to the scores; masks that are due are re-decided by what is known.
        """
        self.clear()
        if self.steps_done < self.steps:
            self._refuse_early("skip")
            self._go_on()

    def clear(self) -> None:
        """Forget the gradients since the last step, as if there had been no backward."""
        for mask in self.masks.values.values():
            mask.grad = None
        self._penalty.clear()

    def finite(self) -> Tensor:
        """Whether all gradients that the masks have now are numbers: bool scalar, on the device of the masks."""
        gradients = [mask.grad for mask in self.masks.values.values() if mask.grad is not None]
        device = self._scores.device
        true = torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([true, *(g.isfinite().all().to(device) for g in gradients)]).all()

    def _refuse_early(self, what: str) -> None:
        if self.needs_accuracy:
            raise UpopError(
                f"Search.{what}(): an accuracy is due after {self.steps_done} steps; call observe(accuracy) whenever "
                "needs_accuracy is True"
            )

    def _refuse_untrained(self, what: str) -> None:
        """Raise UpopError where masks that the optimizer was to train are all still what they began as."""
        if not bool(torch.stack([(mask != 1).any().to(self._scores.device) for mask in self.trained_masks()]).any()):
            raise UpopError(
                f"Search.{what}(): after {self.steps_done} steps no mask has moved, and method {self._name} ranks by "
                "trained masks; give search.trained_masks() to the optimizer, without weight decay"
            )

    def _go_on(self) -> None:
        """Decide where that is due, and count the step."""
        last = self.steps_done == self.steps - 1
        checked = self.growth is not None and self.growth.due(self.steps_done + 1)
        due = checked or self.steps_done % self.interval == 0
        if last or (due and self.method.shrink == "progressive"):
            progress = self.steps_done / (self.steps - 1) if self.steps > 1 else 1.0
            self._decide(1.0 if progress == 1.0 else SCHEDULES[self.schedule](progress), self.steps_done + 1)
        self.steps_done += 1

    def observe(self, accuracy: float) -> None:
        """Tell the validation accuracy, in [0, 1], of the model as it is now; only when `needs_accuracy`.

        Raises UpopError where none was asked for, or where it is no fraction.
        """
        if self.growth is None or not self.needs_accuracy:
            raise UpopError(f"Search.observe(): no accuracy is due after {self.steps_done} steps")
        if not 0 <= accuracy <= 1:
            raise UpopError(f"Search.observe(): expected an accuracy from 0 to 1, got {accuracy}")
        self.growth.observe(float(accuracy), self.steps_done)
        if self.steps_done >= self.steps and self.needs_accuracy:
            self._decide(1.0, self.steps_done)

    def finish(self) -> None:
        """End the search now, with the scores gathered so far: at the full target, open-ended or with an accuracy to
        keep at the last ratio that was accepted.

        Raises UpopError before any step, or where the masks to be trained have not moved.
        """
        if self.steps_done == 0:
            raise UpopError("Search.finish(): no step has been taken, so nothing is known about any unit")
        if not self.done:
            if self.trains_masks:
                self._refuse_untrained("finish")
            if self.growth is not None:
                self.growth.give_up()
            self._decide(1.0, self.steps_done)
            self.steps_done, self.growth = self.steps, None

    def keep(self) -> dict[str, Tensor]:
        """Structure name -> bool [U], True = stays; as decided at the last update (all True before the first)."""
        return {name: value.cpu().clone() for name, value in self._keep.items()}

    def hard_masks(self) -> dict[str, Tensor]:
        """Structure name -> [U], 1 for what stays and 0 for what goes, as `keep`, but where the masks are."""
        return {name: value.float() for name, value in self._keep.items()}

    def slim(self) -> nn.Module:
        """A new, smaller model; after a progressive search with the outputs of the masked one. Ours stays as it is.

        Raises UpopError before the last step: masks in between 0 and 1 cannot be cut without changing outputs; and
        where another search masks other kinds of units of the model, whose masks would stay on.
        """
        if self.steps_done >= self.steps and self.needs_accuracy:
            raise UpopError("Search.slim(): an accuracy is due before the search is done; call observe(accuracy)")
        if not self.done:
            raise UpopError(
                f"Search.slim(): {self.steps_done} of {self.steps} steps are done and masks are not yet 0 or 1; "
                "run the remaining steps, or call finish() to end at the target now"
            )
        self.masks.refuse_others(self.model)
        return slim(self.model, self.keep())

    def detach(self) -> None:
        """Take the masks off the model; its weights are then used unmasked, as if there had been no search."""
        self.masks.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on; tensors and plain numbers only."""
        return {
            "steps_done": self.steps_done,
            "ratio": self.ratio,
            "settings": self._settings(),
            "scores": {k: v.cpu().clone() for k, v in self._scores.sums.items()},
            "keep": self.keep(),
            "masks": {k: v.detach().cpu().clone() for k, v in self.masks.values.items()},
            "growth": None if self.growth is None else self.growth.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UpopError where it belongs to a search with other settings."""
        if not isinstance(state, Mapping) or "settings" not in state:
            raise UpopError("Search.load_state_dict(): expected what Search.state_dict() gives, got something else")
        theirs, ours = state["settings"], self._settings()
        if different := [key for key in ours if theirs.get(key) != ours[key]]:
            key = different[0]
            raise UpopError(
                f"Search.load_state_dict(): saved with {key}={theirs.get(key)}, this search has {ours[key]}; "
                "build the search with the saved settings"
            )
        self.steps_done, self.ratio = state["steps_done"], state["ratio"]
        device = self._scores.device
        self._scores.sums = {k: v.to(device, copy=True) for k, v in state["scores"].items()}
        self._keep = {k: v.to(device, copy=True) for k, v in state["keep"].items()}
        self.masks.set_(state["masks"])
        # None where the search was ended by finish(), which no accuracy can make go on.
        self.growth = None if state["growth"] is None else self._new_growth()
        if self.growth is not None:
            self.growth.load_state_dict(state["growth"])

    def _new_growth(self) -> Growth | None:
        """As at the start of a search; None where accuracies decide nothing."""
        if self._rules is None:
            return None
        limit, checks, max_drop, tolerance = self._rules
        return Growth(limit, self.steps, checks, max_drop, tolerance)

    def _settings(self) -> dict[str, Any]:
        return {
            "units": {s.name: s.units for s in self.structures},
            "ignored_layers": whole_layers(self.structures),
            "align": self.align,
            "target": str(self.target),
            "steps": self.steps,
            "method": self._name,
            "shrink": self.method.shrink,
            "schedule": self.schedule,
            "interval": self.interval,
            "normalise": self.normalise,
            "gradient_order": self.gradient_order,
            "sparsity": self.sparsity,
            "threshold": self.threshold,
            "growth": self._rules and list(self._rules),
            "latency": self._latency,
            "seed": self.seed,
        }

    def _target_ratio(self) -> float:
        if self.target is None or self.method.score == "none":
            return 0.0
        budget = self.target.budget(self.cost, self.align, unified=self.method.unified)
        if budget == 0:  # of a table, say, by which nothing that can go saves any time
            return 0.0
        ratio = budget / self.cost.prunable
        most = self._most()
        if ratio > most * (1 + ROUNDING):
            share = 1.0 if self.target.unit == "prunable" else self.cost.prunable / self.cost.dense
            raise TargetError(
                f"target {self.target}: cannot be met with the same ratio in every kind; reachable is "
                f"{self.target.unit}={floor4(most * share)}, since {what_stays(self.structures, self.align)}"
            )
        return min(ratio, most)

    def _most(self) -> float:
        """The largest ratio of the prunable cost that this method can remove."""
        if self.method.unified:
            return removable(self.cost, self.align) / self.cost.prunable
        return uniform_limit(self.structures, self.cost, self.align)

    def _decide(self, fraction: float, steps: int) -> None:
        """Prune `fraction` in [0, 1] of the target: re-select from all units, then set every mask (lines 9 to 14).

        By what `steps` >= 1 steps have gathered.
        """
        if self.method.score == "none":
            return
        self.ratio = self.target_ratio * fraction if self.growth is None else self.growth.ratio(self.steps_done)
        scores = self._scores.ranked(steps)
        if self.threshold is not None:
            self._keep = below(self.structures, scores, self.threshold)
            self.ratio = self.cost.removed(self._keep) / self.cost.prunable
        elif self.method.unified:
            self._keep = select(
                self.structures,
                scores,
                self.ratio * self.cost.prunable,
                cost=self.cost,
                align=self.align,
                slack=self._slack,
            )
        else:
            self._keep = select_uniform(self.structures, scores, self.ratio, cost=self.cost, align=self.align)
        together = torch.cat([self._keep[s.name] for s in self.structures])
        self._keep = of_each(self.structures, processes.keep_of_first(together))
        if self.method.shrink == "progressive":
            # Open-ended searches may end at any check, so that their losers are at 0 at once.
            value = 0.0 if self.growth is not None else 1.0 - fraction
            # Exactly 0 at the end, and never by comparing floats: `keep` carries the decision.
            self.masks.set_({name: torch.where(k, 1.0, value) for name, k in self._keep.items()})


def _one_of(what: str, value: str, known: Any) -> None:
    if value not in known:
        raise UpopError(f"{what}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


def _check_weights(sparsity: Mapping[str, object]) -> None:
    for kind, weight in sparsity.items():
        if not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
            raise UpopError(f"sparsity: {kind}: expected a finite number >= 0, got {weight!r}")


def _average_gradient_(mask: Tensor) -> None:
    """Give a trained mask the same gradient in all processes: masks are not known to DDP."""
    if mask.grad is not None:
        processes.mean_(mask.grad)
