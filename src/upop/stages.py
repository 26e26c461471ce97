"""The stages of one run, in order, with what they share: dense, search, slim, retrain, evaluate; checkpoints between.

Must not print: whoever watches does so through an Observer.
"""

import contextlib
import copy
import functools
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from upop import checkpoint, plots, processes
from upop.card import CARD, find_parent, model_card
from upop.config import STAGES
from upop.cutting import compensated, decided, one_shot
from upop.data import Augment, Batches
from upop.errors import StopError, TrainingError, UpopError
from upop.evaluation import evaluate
from upop.folder import RunFolder, provenance, spare, weights_hash
from upop.hook import SearchHook
from upop.measure import (
    measure_latency,
    measure_masked,
    measure_promise,
    measure_scores,
    origin,
    plain_batches,
    sizes,
)
from upop.models import save_image_processor
from upop.observer import Observer
from upop.penalty import equal_sparsity
from upop.plan import Plan, make_batches, set_attention
from upop.pretrained import load, save_pretrained
from upop.profiling import count_params
from upop.reading import taking_over
from upop.recipe import FitOptions
from upop.search import Search
from upop.trace import TraceRecorder
from upop.tracking import Tracking, final_numbers
from upop.train import Hook, NoHook, Progress, fit

log = logging.getLogger(__name__)

SCHEMA = 2
CHECKPOINTS = "checkpoints"
METRICS_EVERY = 50  # optimizer steps
PICTURES = {"widths.png": plots.widths, "stages.png": plots.stages}
Result = dict[str, Any]


@dataclass
class Stages:
    """The stages of one run, in order, over what they share."""

    plan: Plan
    folder: RunFolder
    accelerator: Accelerator
    observer: Observer
    command: str
    searched: dict[str, Any] = field(default_factory=lambda: {"ratio": None, "trajectory": None, "checks": None})
    masked: dict[str, Any] = field(default_factory=dict)  # what was measured of the masked model
    notes: list[str] = field(default_factory=list)  # what a reader of the result must know
    seconds: dict[str, float] = field(default_factory=dict)
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
            before = int(state["processes"])
        processes.same_as_first(f"{self.folder.path / CHECKPOINTS}: stage and step", [stage, step])
        self.folder.cut("metrics.jsonl", size)
        self.folder.sweep()
        log.info("going on: stage %s, step %s", stage, step)
        if before != processes.count():
            self.notes.append(
                f"{stage}: begun in {before} process(es), went on in {processes.count()}: the same batches, rounded "
                "in another way"
            )

    def keep(self, stage: str, **more: Any) -> None:
        """Write a checkpoint of `stage`: before a step with `fit`, `model` and more, or before it begins."""
        if not self.plan.config.checkpoint_minutes or not self.folder.main:
            return
        state = {
            "stage": stage,
            "processes": processes.count(),
            **self.plan.identity(),
            "config": self.plan.given.model_dump(),
            "command": self.command,
            "searched": self.searched,
            "masked": self.masked,
            "notes": self.notes,
            "seconds": self.seconds,
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

    def all(self) -> Result:
        """Train, measure and write; result.json comes last: a folder that has one is a run that is complete."""
        began = time.monotonic() - self.seconds.get("all", 0.0)
        models = self.train()
        final = list(models.values())[-1]
        if not self.passed("retrain"):
            self.save(final, "model")
            self.keep("evaluate")
        result = self.measure(models, final)
        processes.wait()
        self.seconds["all"] = time.monotonic() - began
        result |= {"seconds": {k: round(v, 3) for k, v in self.seconds.items()}}
        for name, draw in PICTURES.items():
            if self.folder.main:
                with spare(self.folder.path / name, result["warnings"]):
                    draw(result, self.folder.path / name)
        self.track(result)
        with spare(self.folder.path / "model" / CARD, result["warnings"]):
            parent = find_parent(self.plan.config.model, self.plan.loaded.folder)
            card = model_card(result, parent, name=self.folder.path.resolve().name)
            self.folder.write_text(f"model/{CARD}", card)
        try:
            self.folder.write_text("result.json", json.dumps(result, indent=1) + "\n")
        except UpopError as error:
            where = self.folder.path / "model"
            raise UpopError(f"{error}; the model itself is whole, in {where}; {self.how_to_go_on()}") from error
        self.folder.tidy()
        return result

    def track(self, result: Result) -> None:
        """Tell the trackers what came out; what they then fail at is the last that the result can say of them."""
        end = sum(self.plan.steps.values())
        self.tracking.log("result", final_numbers(result), end)
        self.tracking.pictures([self.folder.path / name for name in PICTURES], end)
        self.tracking.close()
        result["warnings"] += self.tracking.warnings

    def train(self) -> dict[str, nn.Module]:
        """Run the configured stages; the models as they are after each, on the device."""
        c, plan = self.plan.config, self.plan
        model = plan.loaded.model.to(self.accelerator.device)
        set_attention(model, c.attention)
        if c.has("dense") and self.passed("dense"):
            model = self.stored("dense")
        elif c.has("dense"):
            about = "fine-tune the dense model" if plan.loaded.trained else "train the dense model from scratch"
            self.fit("dense", about, model, epochs=c.epochs_dense, lr=c.lr)
            self.save(model, "dense")
            self.keep("search" if c.has("search") else "evaluate")
        models = {"dense": model}
        if c.has("search") and self.passed("search"):
            models["slim"] = self.stored("slim")
        elif c.has("search"):
            models["dense"] = copy.deepcopy(model)
            models["slim"] = self.one_shot(model) if c.one_shot else self.search(model, teacher=models["dense"])
            self.save(models["slim"], "slim")
            self.keep("retrain" if c.has("retrain") else "evaluate")
        if c.has("retrain") and self.passed("retrain"):
            models["retrain"] = self.stored("model")
        elif c.has("retrain"):
            models["retrain"] = copy.deepcopy(list(models.values())[-1])
            about = f"retrain the slimmed model, {count_params(models['retrain']):,} parameters"
            self.fit(
                "retrain",
                about,
                models["retrain"],
                epochs=c.epochs_retrain,
                lr=c.lr_retrain,
                teacher=models["dense"],
            )
        return models

    def search(self, model: nn.Module, *, teacher: nn.Module) -> nn.Module:
        """Search on `model`; returns its slimmed twin, once both are measured."""
        c = self.plan.config
        search = Search(
            model,
            target=self.plan.target,
            steps=self.plan.steps["search"],
            structures=self.plan.kinds,
            align=self.plan.align,
            latency=self.plan.latency,
            method=c.method,
            shrink=c.shrink,
            schedule=c.schedule,
            interval=c.interval,
            normalise=c.normalise or "zscore",
            gradient_order=c.gradient_order,
            sparsity=equal_sparsity(self.plan.analysis.structures, c.sparsity_attn)
            | ({"mlp": c.sparsity_mlp or 0.0} if "mlp" in self.plan.kinds else {}),
            threshold=c.threshold,
            max_drop=c.max_drop,
            tolerance=c.tolerance,
            checks=c.checks,
            seed=c.seed,
        )
        validation = plain_batches(self.plan, self.plan.data.validation, self.accelerator)

        def accuracy() -> float:
            found = evaluate({"search": model}, validation, accelerator=self.accelerator, autocast=True)["search"]
            log.info("search: step %d, ratio %.4f, accuracy %.4f", search.steps_done, search.ratio, found.accuracy)
            return found.accuracy

        about = f"{c.method}, {c.target}: search what can go"
        trace = TraceRecorder(search.structures, search.steps)
        if state := self.begun("search"):
            with taking_over(str(self.folder.path)):
                search.load_state_dict(state["search"])
                trace.load_state_dict(state["trace"])
        hook = SearchHook(search, accuracy, c.lr_mask or 0.0, trace)
        self.fit(
            "search",
            about,
            model,
            epochs=c.epochs_search,
            lr=c.lr_search,
            hook=hook,
            teacher=teacher,
            more=lambda: {"search": search.state_dict(), "trace": trace.state_dict()},
            params=lambda: search.params_left,
        )
        assert search.done, "a search must take all its steps"
        if self.folder.main:
            with spare(self.folder.path / "trace.npz", self.notes):
                trace.save(self.folder.path / "trace.npz")
        keep = search.keep()
        lost, allowed = search.growth.cost_of_training if search.growth else 0.0, c.max_drop or c.tolerance or 0.0
        if lost > allowed:
            self.notes.append(
                f"search: with nothing removed, training alone cost {100 * lost:.1f} points of validation accuracy, "
                f"more than the {100 * allowed:.1f} allowed: lower lr_search ({c.lr_search})"
            )
        self.searched = decided(self.plan, keep) | {
            "trajectory": trace.summary(),
            "checks": search.growth and search.growth.history,
        }
        small = search.slim()
        with self.timed("evaluate"):
            self.masked = measure_masked(self.plan, self.accelerator, model, small)
        if search.method.shrink == "once" and c.how_to_compensate != "none":
            # What is cut is cut off the bare weights: those are what has to be made up for.
            search.detach()
            small = compensated(self.plan, self.accelerator, model, keep)
        return small

    def one_shot(self, model: nn.Module) -> nn.Module:
        """Rank on a few batches, without training, and slim; returns the slimmed twin of `model`."""
        c = self.plan.config
        about = f"one-shot, {c.target}: rank on {c.rank_batches} batches, {c.rank_rounds} times, then slim"
        self.observer.stage("search", about)
        log.info("search: %s", about)
        with self.timed("search"):
            keep, small = one_shot(self.plan, self.accelerator, model)
        self.searched |= decided(self.plan, keep)
        return small

    def begun(self, stage: str) -> Mapping[str, Any] | None:
        """The checkpoint to go on from, if it was taken in the middle of this stage."""
        state = self.restored
        return state if state is not None and state["stage"] == stage and state["fit"] is not None else None

    def fit(
        self,
        stage: str,
        about: str,
        model: nn.Module,
        *,
        epochs: float | None,
        lr: float | None,
        hook: Hook | None = None,
        teacher: nn.Module | None = None,
        more: Callable[[], Mapping[str, Any]] = dict,
        params: Callable[[], int] | None = None,
    ) -> None:
        """Train one stage, with its metrics, progress, checkpoints (`more` goes into them) and last good weights.

        `params` tells how many parameters are left, where the model's own do not.
        """
        c, hook = self.plan.config, hook or NoHook()
        assert epochs is not None and lr is not None, "the configuration is resolved"  # noqa: PT018
        options = FitOptions(
            epochs=epochs,
            lr=lr,
            optimizer=c.optimizer or "adamw",
            weight_decay=c.weight_decay,
            warmup=c.warmup,
            decay="constant" if stage == "search" else "cosine",
            label_smoothing=c.label_smoothing,
            distill=c.distill if teacher is not None else 0.0,
            distill_features=c.distill_features if teacher is not None else 0.0,
            temperature=c.temperature,
            clip=c.clip,
            accumulate=c.accumulate,
            seed=c.seed,
        )
        self.observer.stage(stage, about)
        log.info("%s: %s; %s", stage, about, options)
        validation = plain_batches(self.plan, self.plan.data.validation, self.accelerator)
        last: list[Progress] = []
        left = params or functools.partial(count_params, model)

        def report(progress: Progress) -> None:
            last[:] = [progress]
            self.observer.progress(progress)
            if progress.step % METRICS_EVERY == 0:
                self.metrics(stage, progress, params=left())

        def epoch_end(number: int) -> None:
            score = evaluate({stage: model}, validation, accelerator=self.accelerator, autocast=True)[stage]
            if not math.isfinite(score.loss):
                raise TrainingError(f"the validation loss is not finite after epoch {number}; lower the learning rate")
            found = {"validation_accuracy": score.accuracy, "validation_loss": score.loss}
            self.metrics(stage, last[0], params=left(), **found)
            self.observer.epoch(number, score.accuracy)
            log.info("%s: epoch %d of %s, validation accuracy %.4f", stage, number, epochs, score.accuracy)
            # During the search the weights mean nothing without their masks: what was good is the dense model.
            if stage != "search":
                self.save(model, "last-good")

        def keep(state: Callable[[], dict[str, Any]]) -> None:
            # One clock, but a signal to any process is a signal to all.
            asked, due = processes.highest(self.keeper.asked, self.folder.main and self.keeper.due)
            if asked or due:
                weights = model.state_dict()
                if not all(bool(value.isfinite().all()) for value in weights.values()):
                    raise TrainingError("weights are no longer finite; lower the learning rate or train in float32")
                self.keep(stage, fit=state(), model=weights, **more())
            if asked:
                processes.wait()  # none must end, and take the others with it, before it is written
                raise StopError(f"{stage}: stopped by {signal.Signals(asked).name}; {self.how_to_go_on()}")

        begun = self.begun(stage)
        if begun is not None:
            with taking_over(str(self.folder.path)):
                model.load_state_dict(begun["model"])
        if c.compile:
            model.compile()
        with self.timed(stage):
            try:
                done = fit(
                    model,
                    self.training_batches(STAGES.index(stage)),
                    options,
                    accelerator=self.accelerator,
                    hook=hook,
                    teacher=teacher if c.distill or c.distill_features else None,
                    report=report,
                    epoch_end=epoch_end,
                    keep=keep,
                    start=begun["fit"] if begun is not None else None,
                )
            except TrainingError as error:
                raise TrainingError(f"{stage}: {error}; {self.last_good()}") from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"{stage}: out of memory on {self.accelerator.device}, outside of the passes over images; use a "
                    f"smaller model; {self.last_good()}"
                ) from error
        self.training[stage] = {"skipped_steps": done.skipped, "micro_batch": done.micro_batch}
        if done.skipped:
            self.notes.append(f"{stage}: {done.skipped} steps were left out: loss or gradients were not finite")
        if done.memory:
            self.notes.append(f"{stage}: memory ran out; micro-batches of {done.micro_batch} images, the same steps")

    def how_to_go_on(self) -> str:
        """What to type after a stop."""
        if not self.folder.holds_checkpoints:
            return f"no checkpoint is kept of it; {self.last_good()}"
        return f"go on with --resume {self.folder.path}"

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
        self.folder.add_line("metrics.jsonl", where | {k: round(v, 6) for k, v in values.items()})
        # Trackers want steps that only grow.
        earlier = list(self.plan.steps)[: list(self.plan.steps).index(stage)]
        step = progress.step + sum(self.plan.steps[name] for name in earlier)
        self.tracking.log(stage, values, step)

    def measure(self, models: dict[str, nn.Module], final: nn.Module) -> Result:
        """Everything that result.json says but the seconds."""
        plan = self.plan
        self.observer.stage("evaluate", "all models on validation and test, in float32; latency")
        with self.timed("evaluate"):
            scores = measure_scores(plan, self.accelerator, models, masked=self.masked)
        with self.timed("latency"):
            latency = measure_latency(plan, self.accelerator.device, models["dense"], final)
            promised = measure_promise(plan, models["dense"], final)
        return {
            "schema": SCHEMA,
            "status": "complete",
            **provenance(self.accelerator.device, self.command),
            **origin(plan),
            "weights": weights_hash(self.folder.path / "model"),
            **scores,
            "warnings": [*scores["warnings"], *self.notes, *promised.get("warnings", [])],
            "gap": self.masked.get("gap"),
            **sizes(models["dense"], final),
            **self.searched,
            "training": self.training,
            "latency": latency,
            "latency_target": promised or None,
        }

    def training_batches(self, stage: int) -> Batches:
        """Each stage draws its own order and augmentations: else every stage would begin with the same batches."""
        plan, c = self.plan, self.plan.config
        return make_batches(
            plan.data.train,
            c.model_copy(update={"seed": c.seed + 1_000_003 * stage}),
            plan.loaded,
            self.accelerator,
            classes=len(plan.data.classes),
            augment=Augment(c.flip, c.crop, c.mixup, c.cutmix, c.erasing, c.color),
        )

    def save(self, model: nn.Module, name: str) -> None:
        """`model` with its image processor as a sub-folder that loads like any Hugging Face model."""

        def fill(folder: Path) -> None:
            save_pretrained(model, folder)
            save_image_processor(folder, self.plan.loaded)

        self.folder.write_folder(name, fill)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic() - self.seconds.get(stage, 0.0)
        yield
        self.seconds[stage] = time.monotonic() - began
