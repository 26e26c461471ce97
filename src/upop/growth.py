"""Growth by feedback: an open-ended search decides its own final ratio from validation accuracies.

Pure state: it is told accuracies and says ratios. Must not know models, masks or data.
"""

import copy
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

FASTER, SLOWER = 1.25, 0.5  # factors of the rate after an accepted and a refused ratio


@dataclass
class Growth:
    """How far the ratio may go, decided at `checks` evenly spaced checks of the validation accuracy.

    Between two checks the ratio grows linearly, at first by `limit / checks`. At a check it is accepted or refused.
    Accepted: it grows on, 1.25 times as fast. Refused: back to the last accepted ratio, then half as fast. The last
    check must be passed as well: the search goes back, check by check, until a ratio is accepted again.

    Attributes:
        limit: largest ratio, fraction of the prunable cost.
        steps: of the search.
        checks: how many, spread over the steps.
        max_drop: accept while the accuracy is at most this far below the dense model's.
        tolerance: accept while it is at most this far below that of the last accepted ratio.
            Exactly one of the two is given; both are fractions, .01 = one point.
        history: what was seen, as {step, ratio, accuracy, accepted}; the dense model first.
    """

    limit: float
    steps: int
    checks: int
    max_drop: float | None = None
    tolerance: float | None = None
    rate: float = 0.0
    start: float = 0.0
    end: float = 0.0
    accepted: list[tuple[float, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """After how many steps the checks are, evenly spread and rounded: from 0, the dense model, to `steps`."""
        return [(2 * k * self.steps + self.checks) // (2 * self.checks) for k in range(self.checks + 1)]

    def due(self, step: int) -> bool:
        """Whether an accuracy must be observed after `step` steps before the search goes on or ends."""
        if not self.history:
            return True
        if step < self.steps:
            return step > 0 and step in self.places and self.history[-1]["step"] != step
        last = self.history[-1]
        return last["step"] != step or not last["accepted"]

    def ratio(self, step: int) -> float:
        """The ratio in force during step `step` (counted from 0)."""
        if step >= self.steps - 1:
            return self.end
        after = bisect_right(self.places, step)
        last, following = self.places[after - 1], self.places[after]
        return self.start + (self.end - self.start) * (step - last + 1) / (following - last)

    @property
    def cost_of_training(self) -> float:
        """Accuracy lost at a check with nothing removed: what the search costs by its learning rate alone."""
        dense = self.history[0]["accuracy"] if self.history else 0.0
        return max([0.0, *(dense - seen["accuracy"] for seen in self.history if seen["ratio"] == 0)])

    def observe(self, accuracy: float, step: int) -> None:
        """Take in the accuracy after `step` steps, at the ratio now in force; decides the next ratio."""
        good = not self.accepted or self.end == 0 or accuracy >= self._least()
        self.history.append({"step": step, "ratio": self.end, "accuracy": accuracy, "accepted": float(good)})
        if not self.accepted:
            self.accepted.append((0.0, accuracy))
            self.rate = self.limit / self.checks
            self.end = self.rate
        elif good:
            self.accepted.append((self.end, accuracy))
            self.start = self.end
            if step < self.steps:
                self.end = min(self.limit, self.end + self.rate)
                self.rate *= FASTER
        else:
            while len(self.accepted) > 1 and self.accepted[-1][0] >= self.end:
                self.accepted.pop()
            self.start = self.end = self.accepted[-1][0]
            self.rate *= SLOWER

    def give_up(self) -> None:
        """Back to the last accepted ratio, from where it no longer grows: what has not been checked is not kept."""
        self.start = self.end = self.accepted[-1][0] if self.accepted else 0.0

    def _least(self) -> float:
        """The lowest accuracy that is still accepted."""
        if self.max_drop is not None:
            return self.accepted[0][1] - self.max_drop
        assert self.tolerance is not None, "one of max_drop and tolerance is given"
        return self.accepted[-1][1] - self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, [tuple(v) for v in value] if name == "accepted" else copy.deepcopy(value))
