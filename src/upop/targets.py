"""Targets: how much is to go, in the user's units, checked against what a model can give.

Must not know searches, masks or scores.
"""

from dataclasses import dataclass

from upop.errors import TargetError, nearest
from upop.structures import Structure, prunable_cost, reachable_ratio, removable_cost


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
