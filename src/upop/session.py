"""What the stages of a run share and leave behind: its state, checkpoints of it, models and metrics in its folder.

Must not train, measure or decide; what comes after what is in `upop.stages`.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from upop import checkpoint, processes
from upop.config import STAGES
from upop.errors import StopError
from upop.folder import RunFolder
from upop.models import OPTIMIZER, save_image_processor
from upop.observer import Observer
from upop.plan import Plan, set_attention
from upop.pretrained import load, save_pretrained
from upop.reading import taking_over
from upop.tracking import Tracking
from upop.train import Progress

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass
class Session:
    """One run between its beginning and its end, over all processes that it is done and taken up in."""

    plan: Plan
    folder: RunFolder
    accelerator: Accelerator
    observer: Observer
    command: str
    searched: dict[str, Any] = field(default_factory=lambda: {"ratio": None, "trajectory": None, "checks": None})
    masked: dict[str, Any] = field(default_factory=dict)  # what was measured of the masked model
    notes: list[str] = field(default_factory=list)  # what a reader of the result must know
    seconds: dict[str, float] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)  # when what is not over would have begun
    training: dict[str, dict[str, int]] = field(default_factory=dict)  # what is to be said of each stage's
    restored: Mapping[str, Any] | None = None  # the checkpoint to go on from, until its stage has begun

    def __post_init__(self) -> None:
        self.keeper = checkpoint.Keeper(self.folder.path / CHECKPOINTS, self.plan.config.checkpoint_minutes)
        self.tracking = Tracking(self.accelerator, self.folder.path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        with taking_over(str(self.folder.path)):
            self.restored = state
            self.training = dict(state["training"])
            self.searched, self.masked = dict(state["searched"]), dict(state["masked"])
            self.seconds, self.notes = dict(state["seconds"]), list(state["notes"])
            size, stage, step = state["metrics_size"], state["stage"], state["fit"] and state["fit"]["tally"]["step"]
            [*STAGES, "evaluate"].index(stage)
            before, computed_in = int(state["processes"]), str(state["computed_in"])
        processes.same_as_first(f"{self.folder.path / CHECKPOINTS}: stage and step", [stage, step])
        self.folder.cut("metrics.jsonl", size)
        self.folder.sweep()
        if self.folder.main:
            checkpoint.forget_after(self.keeper.folder, state["kept_as"])
        log.info("going on: stage %s, step %s", stage, step)
        if before != processes.count():
            self.notes.append(
                f"{stage}: begun in {before} process(es), went on in {processes.count()}: the same batches, rounded "
                "in another way"
            )
        if computed_in != (now := self._computes_in):
            self.notes.append(f"{stage}: begun in {computed_in}, went on in {now}: rounded in another way")

    @property
    def _computes_in(self) -> str:
        return f"{self.plan.config.precision} on {self.plan.config.device}"

    def keep(self, stage: str, **more: Any) -> None:
        """Write a checkpoint of `stage`: before a step with `fit`, `model` and more, or before it begins."""
        if not self.plan.config.checkpoint_minutes or not self.folder.main:
            return
        state = {
            "stage": stage,
            "processes": processes.count(),
            "computed_in": self._computes_in,
            **self.plan.identity(),
            "config": self.plan.given.model_dump(),
            "command": self.command,
            "began_in": os.getcwd(),
            "searched": self.searched,
            "masked": self.masked,
            "notes": self.notes,
            "seconds": self.spent(),
            "training": self.training,
            "latency": self.plan.latency and self.plan.latency.to_dict(),
            "trackers": self.tracking.state(),
            "metrics_size": self.folder.size("metrics.jsonl"),
            "fit": None,
            **more,
        }
        path = self.keeper.save(state)
        log.info("checkpoint %s: stage %s", path.name, stage)

    def passed(self, stage: str) -> bool:
        """Whether the run goes on from a stage after this one."""
        order = [*STAGES, "evaluate"]
        return self.restored is not None and order.index(self.restored["stage"]) > order.index(stage)

    def stored(self, name: str) -> nn.Module:
        """A model that this run has left in its folder before it was stopped."""
        model = load(str(self.folder.path / name)).to(self.accelerator.device)
        set_attention(model, self.plan.config.attention)
        return model

    def begun(self, stage: str) -> Mapping[str, Any] | None:
        """The checkpoint to go on from, if it was taken in the middle of this stage."""
        state = self.restored
        return state if state is not None and state["stage"] == stage and state["fit"] is not None else None

    def how_to_go_on(self) -> str:
        """What to type after a stop."""
        if (self.folder.path / "result.json").exists():
            return f"the run is complete, in {self.folder.path}"
        if not self.folder.holds_checkpoints:
            return f"no checkpoint is kept of it; {self.last_good()}"
        return self.folder.way_on

    def last_good(self) -> str:
        """Where the weights of the last complete epoch are, and what is there to go on from."""
        kept = f"; the last checkpoint is in {self.keeper.folder}" if self.folder.holds_checkpoints else ""
        for name in ("last-good", "dense"):
            if (self.folder.path / name).exists():
                return f"the last good weights are in {self.folder.path / name}{kept}"
        return f"no epoch was complete before that{kept}"

    def metrics(self, stage: str, progress: Progress, **more: float) -> None:
        """A line of metrics.jsonl and, where there is one, the tracker's."""
        values = {
            "loss": progress.loss,
            "accuracy": progress.accuracy,
            "lr": progress.lr,
            "images_per_s": progress.images_per_s,
            **progress.extra,
            **more,
        }
        where = {"stage": stage, "epoch": progress.epoch, "step": progress.step}
        values = {k: v for k, v in values.items() if math.isfinite(v)}  # JSON has no others
        self.folder.add_line("metrics.jsonl", where | {k: _short(v) for k, v in values.items()})
        # Trackers want steps that only grow.
        earlier = list(self.plan.steps)[: list(self.plan.steps).index(stage)]
        step = progress.step + sum(self.plan.steps[name] for name in earlier)
        self.tracking.log(stage, values, step)

    def save(self, model: nn.Module, name: str) -> None:
        """`model` with its image processor as a sub-folder that loads like any Hugging Face model."""

        setattr(model.config, OPTIMIZER, self.plan.config.optimizer)

        def fill(folder: Path) -> None:
            save_pretrained(model, folder)
            # As these data were looked at, whatever the model came with.
            seen = dataclasses.replace(self.plan.loaded, shorter_side=self.plan.data.shorter_side)
            save_image_processor(folder, seen)

        self.folder.write_folder(name, fill)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count what is done meanwhile as seconds of `what`, on top of those of processes before this one."""
        self._began[what] = time.monotonic() - self.seconds.get(what, 0.0)
        yield
        self.seconds = self.spent()
        del self._began[what]

    def spent(self) -> dict[str, float]:
        """Seconds by now, those of what is not over among them."""
        return self.seconds | {what: time.monotonic() - began for what, began in self._began.items()}

    def stop_if_asked(self, stage: str) -> None:
        """Raise StopError where a signal has asked for an end, in this process or another."""
        (asked,) = processes.highest(self.keeper.asked)
        if asked:
            processes.wait()  # none must end, and take the others with it, before all is written
            raise StopError(f"{stage}: stopped by {signal.Signals(asked).name}; {self.how_to_go_on()}")


def _short(value: float) -> float:
    """To seven digits, whatever the magnitude: rates are small, parameters many."""
    return value if isinstance(value, int) else float(f"{value:.7g}")
