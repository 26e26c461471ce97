"""Costs: what a model costs in parameters, multiply-accumulates or milliseconds, for whatever units stay.

`Cost` is plain numbers; those in parameters and MACs are derived from a model's own shapes, never from a formula of
its family. Must not know scores, masks or targets.

Units of different structures share weights (a head dim is gone with its head, a neuron with its block), so that costs
do not simply add up. With f_s the fraction of structure s that stays,

    cost = fixed + sum over terms of amount * product over the term's structures of curve_s(f_s)

where curve_s(f) = f, but for measured times. Shape suffixes: S structures, T terms, P points of a curve.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from upop.devices import sent
from upop.profiling import activation_macs
from upop.structures import Structure, is_within

CURRENCIES = ("params", "macs", "latency")


@dataclass(frozen=True)
class Term:
    """Something that costs `amount` while all units of the structures `names` stay."""

    amount: float
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Cost:
    """What a model costs, by the fraction of units that stays in each of `structures`.

    Attributes:
        currency: `params`, `macs` (of one image) or `latency` (ms).
        fixed: what no unit can remove.
        curves: structure name -> points (fraction kept, share of the amount), rising, from 0 to 1, in between linear.
    """

    currency: str
    structures: tuple[Structure, ...]
    fixed: float
    terms: tuple[Term, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    @property
    def dense(self) -> float:
        """Cost of the model as it is."""
        return self.fixed + self.prunable

    @property
    def prunable(self) -> float:
        """What belongs to units, all in all."""
        return sum(term.amount for term in self.terms)

    @property
    def additive(self) -> bool:
        """Whether each unit has a price of its own, whatever else stays."""
        return not self.curves and all(len(term.names) == 1 for term in self.terms)

    @cached_property
    def prices(self) -> dict[str, float]:
        """Structure name -> what the first unit of each lane costs together, all else staying."""
        return {
            s.name: self._amounts[s.name] * (1 - self._curve(s.name, [1 - 1 / s.width])[0]) for s in self.structures
        }

    def step(self, s: Structure, each: int = 1) -> float:
        """What `each` units of every lane of `s` cost at most where they fall together, all else staying.

        A measured curve may be flat where `s` is whole, and steep below: all its steps count, not the first alone.
        """
        if s.name not in self.curves:
            return self.prices[s.name] * min(s.width, each)
        if (s.name, each) not in self._steps:
            left = [s.width, *range((s.width - 1) // each * each, -1, -each)]
            shares = self._curve(s.name, [width / s.width for width in left])
            most = max(more - less for more, less in pairwise(shares))
            self._steps[s.name, each] = self._amounts[s.name] * most
        return self._steps[s.name, each]

    def of(self, fractions_S: Tensor) -> Tensor:
        """Cost (scalar, float64) where the fraction `fractions_S` in [0, 1] of each structure's units stays."""
        shares_S = fractions_S.double()
        if self.curves:
            x_SP, y_SP = (sent(points, shares_S.device) for points in self._points)
            shares_S = _interpolate(shares_S, x_SP, y_SP)
        touched_TS, amounts_T = (sent(each, shares_S.device) for each in self._matrix)
        products_T = torch.where(touched_TS, shares_S, torch.ones_like(shares_S)).prod(1)
        return self.fixed + (amounts_T * products_T).sum()

    def removed(self, keep: Mapping[str, Tensor]) -> float:
        """What slimming by `keep` removes."""
        fractions = [float(keep[s.name].sum()) / s.units for s in self.structures]
        return self.dense - float(self.of(torch.tensor(fractions, dtype=torch.float64)))

    def only(self, structures: Iterable[Structure]) -> "Cost":
        """The part of an additive cost that belongs to some of the structures; all else is fixed."""
        own = tuple(structures)
        names = {s.name for s in own}
        terms = tuple(term for term in self.terms if names.issuperset(term.names))
        rest = self.dense - sum(term.amount for term in terms)
        return Cost(self.currency, own, rest, terms, {n: c for n, c in self.curves.items() if n in names})

    @cached_property
    def _matrix(self) -> tuple[Tensor, Tensor]:
        """Which structures each term has, bool [T, S], and the amounts [T]."""
        touched = [[s.name in term.names for s in self.structures] for term in self.terms]
        amounts = torch.tensor([term.amount for term in self.terms], dtype=torch.float64)
        return torch.tensor(touched, dtype=torch.bool).view(len(self.terms), len(self.structures)), amounts

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor]:
        """Abscissae and ordinates [S, P] of all curves, the last point repeated where one has fewer."""
        curves = [self.curves.get(s.name, ((0.0, 0.0), (1.0, 1.0))) for s in self.structures]
        most = max(len(curve) for curve in curves)
        padded = [[*curve, *[curve[-1]] * (most - len(curve))] for curve in curves]
        x_SP, y_SP = torch.tensor(padded, dtype=torch.float64).unbind(-1)
        return x_SP.contiguous(), y_SP.contiguous()

    @cached_property
    def _amounts(self) -> dict[str, float]:
        """Structure name -> what goes with the last of its units, all else staying."""
        amounts = {s.name: 0.0 for s in self.structures}
        for term in self.terms:
            for name in term.names:
                amounts[name] += term.amount
        return amounts

    @cached_property
    def _steps(self) -> dict[tuple[str, int], float]:
        """What `step` has found: a search asks in every step."""
        return {}

    def _curve(self, name: str, fractions: Sequence[float]) -> list[float]:
        x, y = zip(*self.curves.get(name, ((0.0, 0.0), (1.0, 1.0))), strict=True)
        return [float(share) for share in np.interp(fractions, x, y)]


def _interpolate(values_S: Tensor, x_SP: Tensor, y_SP: Tensor) -> Tensor:
    """Each value on its own piecewise linear curve through the points (x, y); nothing waits for the device."""
    right_S1 = torch.searchsorted(x_SP, values_S.unsqueeze(1)).clamp(1, x_SP.shape[1] - 1)
    x0, x1 = x_SP.gather(1, right_S1 - 1), x_SP.gather(1, right_S1)
    y0, y1 = y_SP.gather(1, right_S1 - 1), y_SP.gather(1, right_S1)
    slope = (y1 - y0) / (x1 - x0).clamp_min(1e-12)
    return (y0 + slope * (values_S.unsqueeze(1) - x0)).squeeze(1)


def unit_cost(structures: Sequence[Structure]) -> Cost:
    """Parameters, by what each structure says of its own units; right where no two structures share weights."""
    return Cost("params", tuple(structures), 0.0, tuple(Term(float(s.units * s.cost), (s.name,)) for s in structures))


def params_cost(model: nn.Module, structures: Sequence[Structure]) -> Cost:
    """Parameters of `model`, all of them, by which units own their rows, columns or whole block."""
    owners = _Owners(structures)
    amounts: dict[tuple[str, ...], float] = {(): 0.0}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        path, _, kind = name.rpartition(".")
        owned = owners.of(path, rows=True, columns=kind == "weight")
        amounts[owned] = amounts.get(owned, 0.0) + parameter.numel()
    return _cost("params", structures, amounts)


def macs_cost(model: nn.Module, structures: Sequence[Structure], *, image_size: int | None = None) -> Cost:
    """Multiply-accumulates of one image, by which units own the rows and columns of each product.

    `image_size` in pixels; None = the model's own. Products of activations with each other (attention's logits and
    mixtures) belong to the structures that own the rows of their module's Linears, shared by width.
    """
    owners = _Owners(structures)
    linears, others, total = activation_macs(model, image_size=image_size)
    amounts: dict[tuple[str, ...], float] = {(): 0.0}

    def add(owned: tuple[str, ...], amount: float) -> None:
        amounts[owned] = amounts.get(owned, 0.0) + amount

    for path, amount in linears.items():
        add(owners.of(path, rows=True, columns=True), amount)
    for path, amount in others.items():
        # q and k have the same owners and are one side of the logits; v, the mixture, may have others.
        sides = {owners.of(name, rows=True): width for name, width in _children(model, path, owners)}
        for owned, width in (sides or {owners.of(path): 1}).items():
            add(owned, amount * width / (sum(sides.values()) or 1))
    add((), total - sum(amounts.values()))
    return _cost("macs", structures, amounts)


def _children(model: nn.Module, path: str, owners: "_Owners") -> list[tuple[str, int]]:
    """The Linears directly in the module at `path` whose rows some unit owns, with their number of rows."""
    return [
        (f"{path}.{name}", module.out_features)
        for name, module in model.get_submodule(path).named_children()
        if isinstance(module, nn.Linear) and f"{path}.{name}" in owners.rows
    ]


def _cost(currency: str, structures: Sequence[Structure], amounts: Mapping[tuple[str, ...], float]) -> Cost:
    terms = tuple(Term(amount, names) for names, amount in amounts.items() if names and amount)
    return Cost(currency, tuple(structures), amounts[()], terms)


class _Owners:
    """Which structures own what of which module."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self.rows: dict[str, list[str]] = {}
        self.columns: dict[str, list[str]] = {}
        self.blocks = {s.block: s.name for s in structures if s.drops}
        for s in structures:
            for ports, found in ((s.producers, self.rows), (s.consumers, self.columns)):
                for port in () if s.drops else ports:
                    found.setdefault(port.path, []).append(s.name)

    def of(self, path: str, *, rows: bool = False, columns: bool = False) -> tuple[str, ...]:
        """Names of all structures without which the rows (or columns) of the module at `path` are not there."""
        names = [name for block, name in self.blocks.items() if is_within(path, [block])]
        names += self.rows.get(path, []) if rows else []
        names += self.columns.get(path, []) if columns else []
        return tuple(names)
