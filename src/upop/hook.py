"""The search as a hook of the training loop; the two know each other through this alone."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from upop.search import Search
from upop.trace import TraceRecorder


class SearchHook:
    """A search in a training loop, with its masks recorded and its questions for an accuracy answered."""

    def __init__(self, search: Search, accuracy: Callable[[], float], lr_mask: float, recorder: TraceRecorder) -> None:
        self._search, self._accuracy, self._lr_mask, self._recorder = search, accuracy, lr_mask, recorder
        self._answer()

    def penalty(self) -> Tensor:
        return self._search.penalty()

    def finite(self) -> Tensor:
        return self._search.finite()

    def step(self) -> None:
        self._search.step()
        self._stepped()

    def skip(self) -> None:
        self._search.skip()
        self._stepped()

    def clear(self) -> None:
        self._search.clear()

    def groups(self) -> list[dict[str, Any]]:
        masks = self._search.trained_masks()
        return [{"params": masks, "lr": self._lr_mask, "weight_decay": 0.0}] if masks else []

    def _stepped(self) -> None:
        search = self._search
        self._answer()
        masks: Mapping[str, Tensor] = search.masks.values
        if search.done and search.method.shrink == "once":
            # Nothing has sunk to zero: the last frame is the cut itself, whatever the masks were before it.
            masks = search.hard_masks()
        self._recorder.record(search.steps_done, search.ratio, masks)

    def _answer(self) -> None:
        while self._search.needs_accuracy:
            self._search.observe(self._accuracy())

    def metrics(self) -> Mapping[str, float]:
        return {"ratio": self._search.ratio}
