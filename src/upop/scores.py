"""Scores: what a search knows of its units, gathered from the gradients of their masks, step after step.

Must not decide how many units fall, nor set a mask.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from upop import processes
from upop.criteria import random_scores, weight_norms
from upop.errors import TrainingError, UpopError
from upop.masks import Masks
from upop.methods import Method
from upop.penalty import Penalty
from upop.ranking import normalise
from upop.structures import Structure, of_each

GradientOrder = Literal["paper", "authors"]

CHECK_EVERY = 20  # steps between two looks at whether gradients on an accelerator are finite
MOST_OVERFLOWS = 100  # steps in a row: a GradScaler halves its scale at each


class Scores:
    """Sums [U] per structure, float64, over steps; they stay where the masks are, so that no step waits for a device.

    Args:
        masks, penalty: of `structures`, whose gradients are gathered.
        method: by what it ranks decides what of a gradient counts (paper, Algorithm 1, lines 5 to 8, for `upop`).
        how: normalisation within a kind (see `upop.ranking`).
        order: `paper` normalises each step's gradients, then sums; `authors` sums raw gradients first.
        comparable: whether numbers must mean the same after any number of steps, as for a threshold.
        seed: of the method `random`.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        penalty: Penalty,
        structures: Sequence[Structure],
        method: Method,
        *,
        how: str,
        order: GradientOrder,
        comparable: bool,
        seed: int,
    ) -> None:
        self._model, self._masks, self._penalty, self._structures = model, masks, penalty, tuple(structures)
        self._by, self._how, self._order, self._comparable, self._seed = method.score, how, order, comparable, seed
        self.device = next(iter(masks.storage))
        zeros = torch.zeros(sum(s.units for s in structures), dtype=torch.float64, device=self.device)
        self.sums = {name: part.clone() for name, part in of_each(structures, zeros).items()}
        self._failed = torch.zeros((), dtype=torch.int64, device=self.device)  # steps, not yet complained of

    def take(self, step: int, *, scale: float | None, last: bool) -> None:
        """Add the gradients since the last call, those of step `step` >= 0.

        Where the loss was scaled, `scale` is taken out again, and gradients that are not finite add nothing. Raises
        UpopError where there are none, TrainingError where they are not finite (scaled: for MOST_OVERFLOWS steps).
        """
        found = self._masks.gradients()
        if found is None:
            unreached = self._masks.unreached()
            if len(unreached) < len(self._structures):
                raise UpopError(
                    f"Search.step(): no gradient has reached {unreached[0]} since the last step, though others have "
                    "got theirs; every layer must take part in the loss: none detached, none left out at random"
                )
            raise UpopError(
                "Search.step(): no gradient has reached the masks since the last step; call it once after "
                "loss.backward(), with the model in use being the one given to Search"
            )
        flat = torch.cat([found[s.name].to(self.device).reshape(-1) for s in self._structures])
        # DDP does not know masks.
        gradients = of_each(self._structures, processes.mean_(flat).double())
        if self._by == "gradient":
            gradients = self._penalty.add_gradients(gradients)
        else:  # effects on the loss are those on the task's
            self._penalty.clear()
        gradients = {name: g / (scale or 1.0) for name, g in gradients.items()}
        failed = ~torch.cat(list(gradients.values())).isfinite().all()
        # Not finite stays so in the sums, unless it is kept out of them.
        self._failed = torch.where(failed, self._failed + 1, self._failed if scale is None else 0)
        # Asking an accelerator waits for it: seldom is soon enough.
        if self.device.type == "cpu" or step % CHECK_EVERY == 0 or last:
            self._check_finite(step, 1 if scale is None else MOST_OVERFLOWS)
        for name, value in self._counted(gradients).items():
            self.sums[name] += value if scale is None else torch.where(failed, 0.0, value)

    def ranked(self, steps: int) -> dict[str, Tensor]:
        """Scores [U], float64, after `steps` >= 1 steps, by which units fall: the largest first."""
        if self._by == "gradient":
            if self._order == "paper" and not self._comparable:
                return self.sums
            # For a threshold once more: sums of z-scores widen with every step.
            mean = {name: total / steps for name, total in self.sums.items()}
            return normalise(self._structures, mean, self._how)
        small_first = {
            "taylor": lambda: self.sums,
            "magnitude": lambda: weight_norms(self._model, self._structures),
            "mask": lambda: {name: mask.detach().abs() for name, mask in self._masks.values.items()},
            "random": lambda: random_scores(self._structures, self._seed),
        }[self._by]()
        falls = {name: -score.to(self.device) for name, score in small_first.items()}
        return normalise(self._structures, falls, self._how)

    def _counted(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a step's gradients [U] goes into the sums."""
        if self._by == "taylor":
            values = {name: mask.detach().to(self.device) for name, mask in self._masks.values.items()}
            return {name: (values[name] * g).abs() for name, g in gradients.items()}
        return normalise(self._structures, gradients, self._how) if self._order == "paper" else gradients

    def _check_finite(self, step: int, most: int) -> None:
        if int(self._failed) >= most:
            self._failed.zero_()
            where = f"{'at' if self.device.type == 'cpu' else 'by'} step {step + 1}"
            lasting = f" for {most} steps, whatever the scale of the loss," if most > 1 else ""
            raise TrainingError(f"Search.step(): a mask gradient is NaN or infinite{lasting} {where}")
