"""The running average of a model's weights over its training, which is often better than where the training ends.

Must not train, nor know files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Average:
    """The exponential moving average of a model's trained parameters over optimizer steps (Polyak and Juditsky, 1992).

    It forgets faster while it is young: after step t by (1 + t) / (10 + t) at most, so that a short training is not an
    average of its beginning. With a decay of 0 it is the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._weights = [p for p in model.parameters() if p.requires_grad] if decay else []
        self._mean = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def step(self) -> None:
        """Called after every optimizer step."""
        self._steps += 1
        if self._weights:
            decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._mean, [p.detach() for p in self._weights], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights, until the context ends."""
        kept = [p.detach().clone() for p in self._weights]
        self.give()
        try:
            yield
        finally:
            _copy(self._weights, kept)

    def give(self) -> None:
        """Leave the model with the average for its weights."""
        _copy(self._weights, self._mean)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on."""
        return {"steps": self._steps, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        _copy(self._mean, state["mean"])


@torch.no_grad()
def _copy(places: list[Any], values: list[Any]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
