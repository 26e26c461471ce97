"""Muon (Jordan et al., 2024) with all matrices of a shape in one batch.

torch.optim.Muon orthogonalises one matrix after another: some twenty small kernels for each, more than the rest of a
step where the model is small and the device fast.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon: its arguments, its state and, but for rounding, its steps.

    A shape takes some twenty-five kernels, however many matrices have it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same[parameter.shape].append(parameter)
            for matrices in same.values():
                self._step(matrices, group)
        return loss

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices [r, c], all of a shape."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalised(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * _scale(matrices[0].shape, group["adjust_lr_fn"])
        torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-rate)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """bfloat16 [n, r, c]: U S V^T of each with S near 1, by so many Newton-Schulz iterations of degree five."""
    a, b, c = coefficients
    wide = matrices.bfloat16()
    wide = wide.mT if matrices.size(1) > matrices.size(2) else wide
    # No singular value above 1, where the iteration would diverge.
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrices.size(1) > matrices.size(2) else wide


def _scale(shape: torch.Size, how: str | None) -> float:
    """What the rate is multiplied by, as in torch: for updates of like size whatever the shape [r, c]."""
    rows, columns = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
