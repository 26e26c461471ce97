"""The sparsity loss: sum over kinds of weight * sum |mask|, with its gradient kept apart from the task's.

Must not decide anything. Under the progressive rule the gradient is one constant per kind, which the z-score takes
away again: next to it a mask's own gradient would be rounded, and the penalty would not be the inert term that it is
in exact arithmetic.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upop.masks import Masks
from upop.structures import Structure

# The authors' weights for DeiT-Small: equal terms at the start. Under the progressive rule they change nothing (a
# constant gradient per kind is subtracted by the z-score); they matter where masks are trained by an optimizer.
DEFAULT_SPARSITY: Mapping[str, float] = {"attn": 4.8e-3, "mlp": 2e-4}


def equal_sparsity(structures: Sequence[Structure], attn: float) -> dict[str, float]:
    """The authors' rule: weights per kind such that all terms of the penalty are equal while all masks are 1.

    `attn` is the weight of the kind `attn`, or of the first where there is none; the others follow from the numbers
    of units.
    """
    units: dict[str, int] = {}
    for s in structures:
        units[s.kind] = units.get(s.kind, 0) + s.units
    first = units.get("attn", next(iter(units.values())))
    return {kind: attn * first / count for kind, count in units.items()}


class Penalty:
    """The sparsity loss of some masks. Its gradient arrives at the masks where `trained`, else at twins of them."""

    def __init__(
        self, masks: Masks, structures: Sequence[Structure], sparsity: Mapping[str, float], *, trained: bool
    ) -> None:
        self._masks, self._structures, self._trained = masks, tuple(structures), trained
        self._sparsity = dict(sparsity)
        self._twins = {device: numbers.detach().requires_grad_() for device, numbers in masks.storage.items()}
        self._weights = {
            device: torch.cat([self._weight(s).expand(s.units) for s in self._on(device)]).to(device)
            for device in masks.storage
        }

    def value(self) -> Tensor:
        """Scalar, differentiable."""
        if self._trained:
            terms = [self._weight(s).item() * self._masks.values[s.name].abs().sum() for s in self._structures]
        else:
            # These masks are never negative. At 0, where losers of an open-ended search are, |mask| has no one slope:
            # by another than that of survivors, the penalty would tell the two apart.
            terms = [(self._weights[device] * twin).sum() for device, twin in self._twins.items()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`gradients` [U], float64, plus what has arrived at the twins since the last call; clears it."""
        result = dict(gradients)
        for device, twin in self._twins.items():
            if twin.grad is not None:
                own = self._on(device)
                for s, part in zip(own, torch.split(twin.grad, [s.units for s in own]), strict=True):
                    result[s.name] = result[s.name] + part.to(result[s.name])
                twin.grad = None
        return result

    def clear(self) -> None:
        """Forget what has arrived at the twins."""
        for twin in self._twins.values():
            twin.grad = None

    def _weight(self, s: Structure) -> Tensor:
        return torch.tensor(self._sparsity.get(s.kind, 0.0))

    def _on(self, device: torch.device) -> list[Structure]:
        """The structures whose masks are on `device`, in the order of its storage."""
        return [s for s in self._structures if self._masks.values[s.name].device == device]
