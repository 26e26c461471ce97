"""A search driven by the events of a training loop that is not ours: penalty, trained masks, slimming.

The callbacks for the Hugging Face Trainer and for Lightning translate their events into calls of `Drive`. Must not
know any trainer, data or files.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from upop.errors import UpopError, nearest
from upop.search import Search

log = logging.getLogger(__name__)


def rate_of(optimizer: Any) -> float:
    """The learning rate now as a fraction of its peak, of what a scheduler of torch has noted in the first group."""
    group = optimizer.param_groups[0]
    # `initial_lr` is where a schedule begins: the peak of most, and far below that of OneCycleLR and CyclicLR.
    peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
    return min(1.0, float(group["lr"] / peak)) if peak else 1.0


class Drive:
    """One call of `step` per optimizer step takes a search forward; the loss of the loop stays as it is.

    The penalty enters as its gradient, which is all that a loss would have made of it. Under the default method it
    changes no decision: a constant per kind is subtracted by the z-score.

    Trained masks (methods `mask` and `unified`) have an AdamW of their own, without decay, which follows the loop's
    learning rate schedule: a trainer restores its optimizer before any callback could add a group to it.

    Args:
        search: built on the loop's model.
        lr_mask: peak learning rate of trained masks; by default `2 / search.steps`, as in `upop prune`.
    """

    def __init__(self, search: Search, lr_mask: float | None = None) -> None:
        self.search = search
        self._lr_mask = 2 / search.steps if lr_mask is None else lr_mask
        masks = search.trained_masks()
        self._optimizer = torch.optim.AdamW(masks, lr=self._lr_mask, weight_decay=0.0) if masks else None

    def step(self, *, rate: float = 1.0, scale: float = 1.0, skipped: bool | None = False) -> None:
        """Take in the gradients of one optimizer step, then re-decide what is due.

        Args:
            rate: the loop's learning rate as a fraction of its peak; see `rate_of`.
            scale: by which the loop has multiplied its loss (a GradScaler's).
            skipped: the gradients overflowed and the loop took no step: it counts, and adds nothing to the scores.
                None where the loop does not tell: those of the masks then do.
        """
        if self.search.steps_done < self.search.steps:
            masks = self.search.masks.values.values()
            if skipped is None:
                skipped = not all(bool(mask.grad.isfinite().all()) for mask in masks if mask.grad is not None)
            for mask in masks:
                if mask.grad is not None and skipped:
                    mask.grad.zero_()
                elif mask.grad is not None and scale != 1:
                    mask.grad.div_(scale)
            if not skipped:
                self.search.penalty().backward()  # type: ignore[no-untyped-call]
                self._train_masks(self._lr_mask * rate)
        self.search.step()

    def _train_masks(self, lr: float) -> None:
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._optimizer.zero_grad()

    @property
    def saw_nothing(self) -> bool:
        """Whether no backward has reached the masks since the last step."""
        return len(self.search.masks.unreached()) == len(self.search.structures)

    def check(self, taken: int) -> None:
        """After `taken` optimizer steps of the loop: raise UpopError where the search did not see them all."""
        search = self.search
        if search.steps_done < min(taken, search.steps):
            raise UpopError(
                f"SearchCallback: optimizer steps taken: {taken}, seen by the search: {search.steps_done}; "
                "this trainer does not call its callbacks around optimizer.step(): call Search.step() in a loop of "
                "your own"
            )

    def end(self, taken: int) -> None:
        """At the end of a training of `taken` optimizer steps: as `check`, and say where the search is not over."""
        self.check(taken)
        search = self.search
        if not search.done:
            log.warning(
                "SearchCallback: training ended after %d of %d steps of the search; resume it, or call "
                "callback.search.finish() before slim()",
                search.steps_done,
                search.steps,
            )

    def slim(self) -> nn.Module:
        """The smaller model, in eval mode; see `Search.slim`."""
        return self.search.slim().eval()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and text in dicts and lists."""
        moments = {} if self._optimizer is None else self._optimizer.state_dict()["state"]
        return {"search": self.search.state_dict(), "moments": {str(k): dict(v) for k, v in moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UpopError where it belongs to a search with other settings."""
        self.search.load_state_dict(state["search"])
        if self._optimizer is not None:
            moments = {int(k): v for k, v in state["moments"].items()}
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def check_options(options: Iterable[str]) -> None:
    """Raise UpopError for names that are no options of a Search, before any training."""
    known = set(inspect.signature(Search).parameters) - {"model", "target", "steps"}
    for name in options:
        if name == "steps":
            raise UpopError("SearchCallback: steps are the trainer's (max_steps or epochs); leave steps out")
        if name not in known:
            raise UpopError(f"SearchCallback: unknown option {name!r}{nearest(name, known)}")
