"""What can be removed from a model: the answer to `upop.analyze(model)`. Values and text only."""

from dataclasses import dataclass

from torch import nn

from upop.families import find_family
from upop.structures import Structure, prunable_cost, reachable_ratio, removable_cost


@dataclass(frozen=True)
class Analysis:
    """Structures of a model and the range of targets it can meet. `str()` is a table for people.

    Attributes:
        model: class name; family: name of its family.
        structures: in layer order.
        params: parameters of the whole model; prunable: those that belong to some unit; removable: those that can
            go while every structure keeps its floor.
    """

    model: str
    family: str
    structures: tuple[Structure, ...]
    params: int
    prunable: int
    removable: int

    def rows(self) -> list[tuple[str, int, str, int, int]]:
        """Per kind: (kind, layers, units per layer, cost of one unit in parameters, prunable parameters)."""
        result = []
        for kind in dict.fromkeys(s.kind for s in self.structures):
            of_kind = [s for s in self.structures if s.kind == kind]
            low, high = min(s.units for s in of_kind), max(s.units for s in of_kind)
            units = str(low) if low == high else f"{low} to {high}"
            result.append((kind, len(of_kind), units, of_kind[0].cost, prunable_cost(of_kind)))
        return result

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.family}): {self.params:,} parameters, {self.prunable:,} of them prunable",
            f"{'kind':<6}{'layers':>7}{'units a layer':>15}{'params a unit':>15}{'params in all':>15}",
        ]
        lines += [f"{k:<6}{n:>7}{u:>15}{c:>15,}{p:>15,}" for k, n, u, c, p in self.rows()]
        lines.append(
            f"reachable: params=0 to params={reachable_ratio(self.structures, self.params):.4f}, "
            f"prunable=0 to prunable={reachable_ratio(self.structures, self.prunable):.4f}"
        )
        return "\n".join(lines)


def analyze(model: nn.Module) -> Analysis:
    """What upop can remove from `model`. Raises ModelError for unsupported models; the model is not touched."""
    family = find_family(model)
    structures = family.find(model)
    return Analysis(
        model=type(model).__name__,
        family=family.name,
        structures=structures,
        params=sum(p.numel() for p in model.parameters()),
        prunable=prunable_cost(structures),
        removable=removable_cost(structures),
    )
