"""What can be removed from a model: the answer to `upop.analyze(model)`. Values and text only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from upop.costs import Cost, macs_cost, params_cost
from upop.errors import UpopError
from upop.families import find_family, find_structures
from upop.latency import LatencyTable, latency_cost
from upop.profiling import own_image_size
from upop.ranking import NO_ALIGNMENT, check_alignment, group_price, removable
from upop.structures import Structure, whole_layers
from upop.targets import amount, floor4


@dataclass(frozen=True)
class Row:
    """One kind: layers, range of units a layer, units that fall together, units that stay in each, and costs.

    `cost` is of what falls together in one layer, per currency, with all else in place.
    """

    kind: str
    layers: int
    units: str
    step: int
    floor: int
    cost: Mapping[str, float]


@dataclass(frozen=True)
class Analysis:
    """Structures of a model and the range of targets it can meet. `str()` is a table for people.

    Attributes:
        model: class name.
        family: name of its family.
        structures: in layer order.
        costs: per currency, `params`, `macs` where the model says how large its images are, `latency` where a table
            is given.
        align: kind -> multiples of which widths are.
    """

    model: str
    family: str
    structures: tuple[Structure, ...]
    costs: Mapping[str, Cost]
    align: Mapping[str, int]

    @property
    def params_cost(self) -> Cost:
        return self.costs["params"]

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return round(self.params_cost.dense)

    @property
    def prunable(self) -> int:
        """Parameters that belong to some unit."""
        return round(self.params_cost.prunable)

    @property
    def removable(self) -> int:
        """Parameters that can go while every structure keeps its floor."""
        return round(removable(self.params_cost, self.align))

    def rows(self) -> list[Row]:
        """One a kind, in the order of the structures, of the layers that units may go from."""
        result, whole = [], set(whole_layers(self.structures))
        for kind in dict.fromkeys(s.kind for s in self.structures):
            of_kind = [s for s in self.structures if s.kind == kind]
            own = [s for s in of_kind if s.layer not in whole] or of_kind
            low, high = min(s.width for s in own), max(s.width for s in own)
            each = self.align.get(kind, 1)
            costs = {currency: group_price(own[0], cost, self.align) for currency, cost in self.costs.items()}
            units = str(low) if low == high else f"{low} to {high}"
            result.append(Row(kind, len(own), units, each, each * -(-own[0].floor // each), costs))
        return result

    def __str__(self) -> str:
        heads = {"params": "params a step", "macs": "MMACs a step", "latency": "us a step"}
        scale = {"params": 1.0, "macs": 1e-6, "latency": 1e3}
        lines = [
            f"{self.model} ({self.family}): {self.params:,} parameters, {self.prunable:,} of them prunable",
            f"{'kind':<6}{'layers':>7}{'units a layer':>15}{'step':>6}{'floor':>7}"
            + "".join(f"{heads[currency]:>15}" for currency in self.costs),
        ]
        for row in self.rows():
            costs = [f"{row.cost[c] * scale[c]:>15,.{0 if c == 'params' else 3}f}" for c in self.costs]
            lines.append(f"{row.kind:<6}{row.layers:>7}{row.units:>15}{row.step:>6}{row.floor:>7}" + "".join(costs))
        if whole := whole_layers(self.structures):
            lines.append(f"layers that stay whole: {', '.join(map(str, whole))}")
        for currency, cost in self.costs.items():
            most = removable(cost, self.align)
            line = f"reachable: {currency}=0 to {currency}={floor4(most / cost.dense)}"
            line += f" ({amount(cost.dense, currency)} to {amount(cost.dense - most, currency)})"
            if currency == "params":
                line += f", prunable=0 to prunable={floor4(most / cost.prunable)}"
            lines.append(line)
        return "\n".join(lines)


def analyze(
    model: nn.Module,
    structures: Sequence[str] | None = None,
    *,
    ignored_layers: Sequence[int] | str = (),
    align: Mapping[str, int] = NO_ALIGNMENT,
    latency: LatencyTable | None = None,
) -> Analysis:
    """What upop can remove from `model`, as units of the kinds `structures` (upop.kinds), in all currencies.

    `ignored_layers`, as `(0, -1)` or `"0-2,-1"`, keep all of their units. Raises ModelError for unsupported models,
    UpopError for layers that there are not; the model is not touched.
    """
    family = find_family(model)
    found = find_structures(model, structures, ignored_layers)
    costs = {"params": params_cost(model, found)}
    if own_image_size(model) is not None:
        costs["macs"] = macs_cost(model, found)
    if latency is not None:
        costs["latency"] = latency_cost(found, latency)
    align = check_alignment(align)
    for kind in align:
        if kind not in {s.kind for s in found}:
            known = ", ".join(dict.fromkeys(s.kind for s in found))
            raise UpopError(f"align: expected kinds among {known}, got {kind!r}")
    return Analysis(type(model).__name__, family.name, found, costs, align)
