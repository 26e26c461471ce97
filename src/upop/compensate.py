"""Compensation: what cut units gave to the layers that read them, put back into what stays of these layers.

One pass over a few images, then closed form, no training. Must not decide which units go, and must not know families.

Shapes: I inputs of a consumer, O its outputs, K of its inputs those that stay, R those that go.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from upop import processes
from upop.errors import ModelError, UpopError
from upop.structures import Structure, linear
from upop.surgery import staying

log = logging.getLogger(__name__)

How = Literal["mean", "least-squares"]


@dataclass(frozen=True)
class Moments:
    """What the inputs of a Linear are like over images and tokens: float64, on the CPU.

    Attributes:
        mean: [I].
        variance: [I].
        covariance: [I, I], or None where it was not asked for.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None


def input_moments(
    model: nn.Module, structures: Sequence[Structure], batches: Iterable[Tensor], *, covariance: bool = False
) -> dict[str, Moments]:
    """Path of every consumer of `structures` -> Moments of its input over `batches` of images [B, 3, H, W].

    `model` is run as it is, in eval mode and without gradients: with the masks on that it has. A consumer's input is
    the hidden neurons after their activation, or the values that attention has mixed. The `covariance` takes
    8 * I * I bytes a consumer. In several processes (torch.distributed) the moments are those over all their batches.
    Raises UpopError without batches, ModelError for a consumer that no image reaches.
    """
    sums = {port.path: _Sums(covariance) for s in structures for port in s.consumers}
    handles = [linear(model, path).register_forward_pre_hook(each.add) for path, each in sums.items()]
    try:
        with torch.no_grad(), evaluating(model):
            count = sum(1 for images in batches if model(images) is not None)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise UpopError("compensation: expected one batch of images or more, got none")
    return {path: each.moments(path) for path, each in sums.items()}


class _Sums:
    """Running sums over the rows that reach one Linear, less the mean of the first batch: small numbers to square."""

    def __init__(self, covariance: bool) -> None:
        self._covariance, self._count = covariance, 0
        self._first: list[Tensor] = []  # the first batch's mean, float32 [I]
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Squares in bfloat16, or in the narrow type that autocast picks, would be off by up to 0.4 %.
        with torch.autocast(inputs[0].device.type, enabled=False):
            rows = inputs[0].flatten(0, -2).float()
            self._first = self._first or [rows.mean(0)]
            rows = rows - self._first[0]
            self._sum = self._sum + rows.sum(0, dtype=torch.float64)
            squares = rows.T @ rows if self._covariance else rows.square().sum(0, dtype=torch.float64)
            self._squares = self._squares + squares.double()
        self._count += len(rows)

    def moments(self, path: str) -> Moments:
        if not isinstance(self._sum, Tensor) or not isinstance(self._squares, Tensor):
            raise ModelError(
                f"{path}: no image has reached it; give compensation the model as it was before torch.compile"
            )
        off, squares = self._sum.cpu() / self._count, self._squares.cpu() / self._count
        mean = self._first[0].double().cpu() + off
        spread = squares - (torch.outer(off, off) if self._covariance else off.square())
        if processes.count() > 1:
            mean, spread = self._of_all(mean, spread)
        if not self._covariance:
            return Moments(mean, spread.clamp_min(0))
        return Moments(mean, spread.diagonal().clamp_min(0), spread)

    def _of_all(self, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (co)variance over the rows of all processes, from those of this one."""
        total = int(processes.add_up_(torch.tensor(self._count, device=self._first[0].device)))
        weight = self._count / total
        common = self._add_up(mean * weight)
        off = mean - common
        between = torch.outer(off, off) if self._covariance else off.square()
        return common, self._add_up((spread + between) * weight)

    def _add_up(self, values: Tensor) -> Tensor:
        # Processes on accelerators talk through these.
        return processes.add_up_(values.to(self._first[0].device)).cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def cut_and_compensate_(
    model: nn.Module,
    structures: Sequence[Structure],
    keep: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None = None,
    *,
    how: How = "least-squares",
    ridge: float = 1e-3,
) -> None:
    """Set the units that go to 0, in place, and let the layers that read them make up for it, given `moments`.

    The model keeps its size: `slim` of it by the same `keep` then has the same outputs. Once more with fewer units,
    and what is 0 by now has nothing left to give.

    `mean`: the removed inputs' mean, through their columns, goes into the bias: of all biases the one with the least
    squared error of the consumer's output, at the images that `moments` are of (Variance-Based Pruning, ICCV 2025).
    Exact for units that are constant. A consumer without bias is left out, and the log says so.

    `least-squares`: bias and kept columns together have the least squared error (He et al., 2017, section 3.1); needs
    covariances. `ridge` pulls the columns to those that were there: it is added to the covariance of the kept
    inputs, in units of their mean variance.

    Each consumer by itself, with the inputs that it has in `model`: the errors of several layers still add up. What
    head dims gave to the logits of attention (q and k), and what a dropped block gave, goes through no consumer and
    is not put back. Nothing is added where `moments` are of a model with the removed units masked to 0: a progressive
    search leaves nothing to repair.

    Raises UpopError for an unknown `how`, and where the covariances it needs are missing.
    """
    if how not in get_args(How):
        raise UpopError(f"compensation: expected {' or '.join(get_args(How))}, got {how!r}")
    # Of blocks that go nothing reads anything any more.
    for path, kept_I in _stays(staying(structures, keep), keep).items():
        module = linear(model, path)
        if not bool(kept_I.all()):
            if moments is not None:
                _shift_(module, path, kept_I, moments[path], how, ridge)
            module.weight[:, ~kept_I.to(module.weight.device)] = 0.0
    for s in structures:
        for port in s.producers:
            module, gone = linear(model, port.path), ~port.expand(keep[s.name].cpu())
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter[gone.to(parameter.device)] = 0.0


def _shift_(module: nn.Linear, path: str, kept_I: Tensor, moments: Moments, how: How, ridge: float) -> None:
    """Add to bias and kept columns; summed in float64, rounded once."""
    weight_OI = module.weight.double().cpu()
    lost_OR = weight_OI[:, ~kept_I]
    if how == "mean":
        if not _has_bias(module):
            log.warning("%s: has no bias to take up the mean of what is removed; left as it is", path)
            return
        shift_O = lost_OR @ moments.mean[~kept_I]
    else:
        if moments.covariance is None:
            raise UpopError(f"compensation: {path}: least-squares needs moments with covariance=True")
        second_II = moments.covariance
        if not _has_bias(module):
            # Nothing else takes up the means, so that columns have to: moments about 0.
            second_II = second_II + torch.outer(moments.mean, moments.mean)
        change_OK = lost_OR @ _regression(second_II, kept_I, ridge)
        weight_OI[:, kept_I] += change_OK
        module.weight.copy_(weight_OI)
        shift_O = lost_OR @ moments.mean[~kept_I] - change_OK @ moments.mean[kept_I]
    if _has_bias(module):
        module.bias.copy_(module.bias.double().cpu() + shift_O)


def _has_bias(module: nn.Linear) -> bool:
    return module.bias is not None


def _regression(second_II: Tensor, kept_I: Tensor, ridge: float) -> Tensor:
    """Coefficients [R, K] of the kept inputs that come nearest to the removed ones, given second moments."""
    kept_KK = second_II[kept_I][:, kept_I]
    # Never 0: inputs that are all 0 have nothing to give, and must not make this singular.
    scale = (ridge * kept_KK.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    ridged_KK = kept_KK + scale * torch.eye(len(kept_KK), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(ridged_KK, second_II[kept_I][:, ~kept_I])
    return solved.T


def _stays(structures: Sequence[Structure], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Path of a consumer -> which of its columns stay, bool."""
    found: dict[str, Tensor] = {}
    for s in structures:
        for port in s.consumers:
            wanted = port.expand(keep[s.name].cpu())
            found[port.path] = found[port.path] & wanted if port.path in found else wanted
    return found
