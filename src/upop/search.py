"""The search: UPop's Algorithm 1 as an object that a training loop calls once per optimizer step.

Owns scores, masks and the decision which units stay. Must not know data, optimizers, devices of others, or files.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from upop.errors import TargetError, TrainingError, UpopError, nearest
from upop.families import find_structures
from upop.masks import Masks
from upop.ranking import select, zscore_per_kind
from upop.schedules import SCHEDULES
from upop.slim import slim
from upop.structures import Structure, prunable_cost, reachable_ratio, removable_cost

log = logging.getLogger(__name__)

GradientOrder = Literal["paper", "authors"]

# The authors' weights for DeiT. Under the progressive rule they change nothing (a constant gradient per kind is
# subtracted by the z-score); they matter where masks are trained by an optimizer.
DEFAULT_SPARSITY: Mapping[str, float] = {"attn": 4.8e-3, "mlp": 2e-4}


@dataclass(frozen=True)
class Target:
    """How much to remove, as a fraction in [0, 1): of ALL parameters (`params`) or of the prunable ones (`prunable`).

    Exactly one is given. The achieved removal is within 1 % of all parameters, or the target is refused.
    """

    params: float | None = None
    prunable: float | None = None

    def __post_init__(self) -> None:
        if (self.params is None) == (self.prunable is None):
            raise TargetError("target: expected exactly one of params=, prunable=")
        if not 0 <= self.value < 1:
            raise TargetError(
                f"target {self}: expected a fraction removed, 0 <= x < 1, got {self.value}; params=0.5 removes half"
            )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`params=0.5` or `prunable=0.5`, as typed on a command line. Raises TargetError for anything else."""
        unit, _, number = text.partition("=")
        if unit.strip() not in ("params", "prunable"):
            raise TargetError(
                f"target {text!r}: expected params=FRACTION or prunable=FRACTION, got unit {unit.strip()!r}"
                + nearest(unit.strip(), ["params", "prunable"])
            )
        try:
            value = float(number)
        except ValueError:
            raise TargetError(f"target {text!r}: expected a number after '=', got {number!r}") from None
        return cls(**{unit.strip(): value})

    @property
    def unit(self) -> str:
        return "params" if self.params is not None else "prunable"

    @property
    def value(self) -> float:
        value = self.params if self.params is not None else self.prunable
        assert value is not None
        return value

    def __str__(self) -> str:
        return f"{self.unit}={self.value}"

    def budget(self, structures: tuple[Structure, ...], params: int) -> float:
        """Parameters to remove from a model of `params` parameters.

        Raises TargetError, with the reachable range, where floors forbid the target or one unit is too large a step.
        """
        base = params if self.unit == "params" else prunable_cost(structures)
        most = removable_cost(structures)
        budget = self.value * base
        if budget > most:
            raise TargetError(
                f"target {self}: cannot be met; reachable here is {self.unit}=0 to "
                f"{self.unit}={reachable_ratio(structures, base):.4f} ({most:,} of {base:,} parameters), "
                "since every layer keeps at least one unit of each kind"
            )
        step = max(structures, key=lambda s: s.cost)
        if budget > 0 and step.cost > 0.01 * params:
            raise TargetError(
                f"target {self}: cannot be met within 1 %: one unit of {step.name} alone holds {step.cost:,} of the "
                f"model's {params:,} parameters; the model is too small or too narrow for structured pruning"
            )
        return budget


class Search:
    """Unified and progressive search (paper, Algorithm 1) over all prunable units of `model`.

    In a training loop of `steps` optimizer steps::

        (loss + search.penalty()).backward()
        optimizer.step(); search.step(); optimizer.zero_grad()

    `search.step()` may stand on either side of `optimizer.step()`: mask gradients are collected during backward, with
    the weights of that moment. At the end every mask is exactly 0 or 1 and `slim()` changes no output.

    Args:
        model: any model of a known family; its parameters, names and, at the start, outputs are untouched.
        target: what to remove.
        steps: optimizer steps that the search lasts, T >= 1.
        schedule: name of a schedule (see `upop.schedules`); the paper's is `sine`.
        interval: masks are re-decided every `interval` steps and at the last one; the paper's is 1.
        gradient_order: `paper` z-scores each step's gradients, then sums; `authors` sums raw gradients, then z-scores.
        sparsity: weight of `sum |mask|` in `penalty()` per kind.

    Raises UpopError for unknown families, unreachable targets and bad options, before the model is touched.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: Target,
        steps: int,
        schedule: str = "sine",
        interval: int = 1,
        gradient_order: GradientOrder = "paper",
        sparsity: Mapping[str, float] = DEFAULT_SPARSITY,
    ) -> None:
        if steps < 1 or interval < 1:
            raise UpopError(f"Search: expected steps >= 1 and interval >= 1, got {steps=}, {interval=}")
        if schedule not in SCHEDULES:
            raise UpopError(
                f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}"
            )
        if gradient_order not in ("paper", "authors"):
            raise UpopError(f"gradient_order: expected 'paper' or 'authors', got {gradient_order!r}")
        self.model = model
        self.structures = find_structures(model)
        self.target, self.steps, self.interval = target, steps, interval
        self.schedule, self.gradient_order, self.sparsity = schedule, gradient_order, dict(sparsity)
        kinds = {s.kind for s in self.structures}
        if unknown := sorted(set(sparsity) - kinds):
            raise UpopError(
                f"sparsity: expected weights for {', '.join(sorted(kinds))}, got {unknown[0]!r}"
                + nearest(unknown[0], kinds)
            )
        params = sum(p.numel() for p in model.parameters())
        # As a fraction of the prunable parameters, whatever the target's own unit is.
        self.target_ratio = target.budget(self.structures, params) / prunable_cost(self.structures)
        self.ratio = 0.0
        self.steps_done = 0
        self._scores = {s.name: torch.zeros(s.units) for s in self.structures}
        self._keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in self.structures}
        self.masks = Masks(model, self.structures)

    @property
    def done(self) -> bool:
        """True once all `steps` are taken: masks are exactly 0 or 1."""
        return self.steps_done >= self.steps

    def penalty(self) -> Tensor:
        """Sparsity loss: sum over kinds of weight * sum |mask| (scalar, differentiable)."""
        terms = [self.sparsity.get(s.kind, 0.0) * self.masks.values[s.name].abs().sum() for s in self.structures]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def step(self) -> None:
        """Take in the mask gradients of the last backward(s) and, when due, re-decide all masks.

        Call once per optimizer step. Steps after the last one change nothing.
        Raises UpopError when no backward has run, TrainingError when a gradient is not finite.
        """
        gradients = self.masks.gradients()
        if self.done:
            return
        if gradients is None:
            raise UpopError(
                "Search.step(): no gradient has reached the masks since the last step; call it once after "
                "loss.backward(), with the model in use being the one given to Search"
            )
        self._accumulate(_mean_over_processes(gradients))
        if self.steps_done % self.interval == 0 or self.steps_done == self.steps - 1:
            progress = self.steps_done / (self.steps - 1) if self.steps > 1 else 1.0
            self._decide(1.0 if progress == 1.0 else SCHEDULES[self.schedule](progress))
        self.steps_done += 1

    def finish(self) -> None:
        """End the search now at the full target, with the scores gathered so far. Raises UpopError before any step."""
        if self.steps_done == 0:
            raise UpopError("Search.finish(): no step has been taken, so nothing is known about any unit")
        if not self.done:
            self._decide(1.0)
            self.steps_done = self.steps

    def keep(self) -> dict[str, Tensor]:
        """Structure name -> bool [U], True = stays; as decided at the last update (all True before the first)."""
        return {name: value.clone() for name, value in self._keep.items()}

    def slim(self) -> nn.Module:
        """A new, smaller model with the outputs of the masked one. The search's own model stays as it is.

        Raises UpopError before the last step: masks in between 0 and 1 cannot be cut without changing outputs.
        """
        if not self.done:
            raise UpopError(
                f"Search.slim(): {self.steps_done} of {self.steps} steps are done and masks are not yet 0 or 1; "
                "run the remaining steps, or call finish() to end at the target now"
            )
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
            "scores": {k: v.clone() for k, v in self._scores.items()},
            "keep": self.keep(),
            "masks": {k: v.detach().cpu().clone() for k, v in self.masks.values.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UpopError where it belongs to a search with other settings."""
        theirs, ours = state["settings"], self._settings()
        if different := [key for key in ours if theirs.get(key) != ours[key]]:
            key = different[0]
            raise UpopError(
                f"Search.load_state_dict(): saved with {key}={theirs.get(key)}, this search has {ours[key]}; "
                "build the search with the saved settings"
            )
        self.steps_done, self.ratio = state["steps_done"], state["ratio"]
        self._scores = {k: v.clone() for k, v in state["scores"].items()}
        self._keep = {k: v.clone() for k, v in state["keep"].items()}
        self.masks.set_(state["masks"])

    def _settings(self) -> dict[str, Any]:
        return {
            "units": {s.name: s.units for s in self.structures},
            "target": str(self.target),
            "steps": self.steps,
            "schedule": self.schedule,
            "interval": self.interval,
            "gradient_order": self.gradient_order,
            "sparsity": self.sparsity,
        }

    def _accumulate(self, gradients: dict[str, Tensor]) -> None:
        if not all(bool(g.isfinite().all()) for g in gradients.values()):
            raise TrainingError(f"Search.step(): a mask gradient is NaN or infinite at step {self.steps_done + 1}")
        if self.gradient_order == "paper":
            gradients = zscore_per_kind(self.structures, gradients)
        for name, value in gradients.items():
            self._scores[name] += value

    def _decide(self, fraction: float) -> None:
        """Prune `fraction` in [0, 1] of the target: re-select from all units, then set every mask (lines 9 to 14)."""
        scores = self._scores
        if self.gradient_order == "authors":
            scores = zscore_per_kind(self.structures, scores)
        self.ratio = self.target_ratio * fraction
        self._keep = select(self.structures, scores, self.ratio * prunable_cost(self.structures))
        # Exactly 0 at the end, and never by comparing floats: `keep` carries the decision.
        self.masks.set_({name: torch.where(k, 1.0, 1.0 - fraction) for name, k in self._keep.items()})


def _mean_over_processes(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients on the CPU, averaged over processes where there are several: masks are not known to DDP."""
    sizes = [g.numel() for g in gradients.values()]
    flat = torch.cat([g.reshape(-1) for g in gradients.values()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
    # One transfer for all structures: the only host synchronisation of a search step.
    return dict(zip(gradients, torch.split(flat.cpu(), sizes), strict=True))
