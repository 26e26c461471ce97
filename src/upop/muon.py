"""Muon (Jordan et al., 2024) with matrices in batches.

torch.optim.Muon orthogonalises one matrix after another: some twenty small kernels for each, more than the rest of a
step where the model is small and the device fast.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upop.devices import has_bf16

TOGETHER = 2**25  # elements of a batch, padding included: 64 MiB


class Muon(torch.optim.Muon):
    """torch.optim.Muon: its arguments, its state and, but for rounding, its steps.

    On accelerators a step of a small model takes some thirty kernels, elsewhere so many for each shape.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            for matrices in _batches(found):
                self._step(matrices, group)
        return loss

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices [r, c] of any shapes."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        rates = [-group["lr"] * _scale(matrix.shape, group["adjust_lr_fn"]) for matrix in matrices]
        torch._foreach_add_(matrices, list(torch._foreach_mul(updates, rates)))


def orthogonalised(
    matrices: Sequence[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Of each matrix [r, c] U S V^T with S near 1, by so many Newton-Schulz iterations of degree five.

    In bfloat16 where the hardware has it: a CPU that has not takes ten times as long for it as for float32. In one
    batch: smaller ones are padded by rows and columns of zeros, which stay zero and change nothing else.
    """
    a, b, c = coefficients
    wide = [matrix.mT if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    rows, columns = (max(matrix.size(axis) for matrix in wide) for axis in (0, 1))
    dtype = torch.bfloat16 if has_bf16(wide[0].device.type) else torch.float32
    batch = wide[0].new_zeros(len(wide), rows, columns, dtype=dtype)
    torch._foreach_copy_([place[: m.size(0), : m.size(1)] for place, m in zip(batch, wide, strict=True)], wide)
    # No singular value above 1, where the iteration would diverge.
    batch = batch / batch.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = batch @ batch.mT
        batch = torch.baddbmm(batch, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), batch, beta=a)
    whole = batch.to(matrices[0].dtype)
    cut = [place[: m.size(0), : m.size(1)] for place, m in zip(whole, wide, strict=True)]
    return [update.mT if m.size(0) > m.size(1) else update for update, m in zip(cut, matrices, strict=True)]


def _batches(matrices: list[Tensor]) -> list[list[Tensor]]:
    """All together where launches are what costs, whatever their shapes; elsewhere those of a shape."""
    sides = [sorted(matrix.shape) for matrix in matrices]
    padded = len(sides) * max((a for a, _ in sides), default=0) * max((b for _, b in sides), default=0)
    if matrices and matrices[0].device.type != "cpu" and padded <= TOGETHER:
        return [matrices]
    same: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        same[matrix.shape].append(matrix)
    return list(same.values())


def _scale(shape: torch.Size, how: str | None) -> float:
    """What the rate is multiplied by, as in torch: for updates of like size whatever the shape [r, c]."""
    rows, columns = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
