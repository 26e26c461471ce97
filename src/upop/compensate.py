"""Compensation: what cut units gave to the layers that read them, put back into what stays of these layers.

One pass over a few images, then closed form, no training. Must not decide which units go, and must not know families.

Shapes: I inputs of a consumer, O its outputs, K of its inputs those that stay, R those that go.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from upop.errors import ModelError, UpopError
from upop.structures import Structure, dropped_blocks, linear
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


@dataclass(frozen=True)
class Shift:
    """What is added to a Linear of the slimmed model: float64, on the CPU.

    Attributes:
        weight: [O, K], or None.
        bias: [O], or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


def input_moments(
    model: nn.Module, structures: Sequence[Structure], batches: Iterable[Tensor], *, covariance: bool = False
) -> dict[str, Moments]:
    """Path of every consumer of `structures` -> Moments of its input over `batches` of images [B, 3, H, W].

    `model` is run as it is, in eval mode and without gradients: with the masks on that it has. A consumer's input is
    the hidden neurons after their activation, or the values that attention has mixed. The `covariance` takes
    8 * I * I bytes a consumer.
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
        if not self._covariance:
            return Moments(mean, (squares - off.square()).clamp_min(0))
        covariance = squares - torch.outer(off, off)
        return Moments(mean, covariance.diagonal().clamp_min(0), covariance)


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


def shifts(
    model: nn.Module,
    structures: Sequence[Structure],
    keep: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    *,
    how: How = "least-squares",
    ridge: float = 1e-3,
) -> dict[str, Shift]:
    """Path of a consumer in the SLIMMED model -> what to add to it, for `model` cut by `keep`. `model` stays.

    `mean`: the removed inputs' mean, through their columns, goes into the bias: of all biases the one with the least
    squared error of the consumer's output, at the images that `moments` are of (Variance-Based Pruning, ICCV 2025).
    Exact for units that are constant. A consumer without bias is left out, and the log says so.

    `least-squares`: bias and kept columns together have the least squared error (He et al., 2017, section 3.1); needs
    covariances. `ridge` pulls the columns to those that slimming left: it is added to the covariance of the kept
    inputs, in units of their mean variance.

    Each consumer by itself, with the inputs that it has in `model`: the errors of several layers still add up. What
    head dims gave to the logits of attention (q and k), and what a dropped block gave, goes through no consumer and
    is not put back. Shifts are 0 where `moments` are of a model with the removed units masked to 0: a progressive
    search leaves nothing to repair.

    Raises UpopError for an unknown `how`, and where the covariances it needs are missing.
    """
    if how not in ("mean", "least-squares"):
        raise UpopError(f"compensation: expected mean or least-squares, got {how!r}")
    cut = staying(structures, keep)
    dropped = dropped_blocks(structures, keep)
    rows, columns = (_stays(cut, keep, side) for side in ("producers", "consumers"))
    found: dict[str, Shift] = {}
    for path, kept in columns.items():
        module = linear(model, path)
        if how == "mean" and not _has_bias(module):
            log.warning("%s: has no bias to take up the mean of what is removed; left as it is", path)
        elif not bool(kept.all()):
            shift = _shift(module, path, kept, moments[path], how, ridge)
            found[_moved(path, dropped)] = _rows_of(shift, rows.get(path))
    return found


@torch.no_grad()
def shift_(small: nn.Module, found: Mapping[str, Shift]) -> None:
    """Add what `shifts` found to the slimmed model, in place; summed in float64, rounded once."""
    for path, shift in found.items():
        module = linear(small, path)
        for parameter, change in ((module.weight, shift.weight), (module.bias, shift.bias)):
            if change is not None:
                parameter.copy_(parameter.double().cpu() + change)


def _shift(module: nn.Linear, path: str, kept_I: Tensor, moments: Moments, how: How, ridge: float) -> Shift:
    weight_OI = module.weight.detach().double().cpu()
    if how == "mean":
        return Shift(bias=weight_OI[:, ~kept_I] @ moments.mean[~kept_I])
    if moments.covariance is None:
        raise UpopError(f"compensation: {path}: least-squares needs moments with covariance=True")
    if _has_bias(module):
        change_OK = weight_OI[:, ~kept_I] @ _regression(moments.covariance, kept_I, ridge)
        return Shift(change_OK, weight_OI[:, ~kept_I] @ moments.mean[~kept_I] - change_OK @ moments.mean[kept_I])
    # No bias to take up the means, so that columns have to: moments about 0.
    second = moments.covariance + torch.outer(moments.mean, moments.mean)
    return Shift(weight_OI[:, ~kept_I] @ _regression(second, kept_I, ridge))


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


def _stays(
    structures: Sequence[Structure], keep: Mapping[str, Tensor], side: Literal["producers", "consumers"]
) -> dict[str, Tensor]:
    """Path of a Linear -> which of its rows (producers) or columns (consumers) stay, bool."""
    found: dict[str, Tensor] = {}
    for s in structures:
        for port in s.producers if side == "producers" else s.consumers:
            wanted = port.expand(keep[s.name].cpu())
            found[port.path] = found[port.path] & wanted if port.path in found else wanted
    return found


def _rows_of(shift: Shift, rows_O: Tensor | None) -> Shift:
    """The rows of a shift that are left in a consumer whose own rows are units as well."""
    if rows_O is None:
        return shift
    return Shift(*(None if change is None else change[rows_O] for change in (shift.weight, shift.bias)))


def _moved(path: str, dropped: Sequence[str]) -> str:
    """Where the module at `path` is once the blocks `dropped` are out of the lists they were in."""
    parts = path.split(".")
    for holder, _, index in (block.rpartition(".") for block in dropped):
        depth = holder.count(".") + 1 if holder else 0
        if parts[:depth] == holder.split(".")[:depth] and int(path.split(".")[depth]) > int(index):
            parts[depth] = str(int(parts[depth]) - 1)
    return ".".join(parts)
