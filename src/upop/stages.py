"""The stages of one run, in order, with what they share: dense, search, slim, retrain, evaluate; checkpoints between.

Must not print: whoever watches does so through an Observer.
"""

import copy
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upop import plots, processes
from upop.card import CARD, find_parent, model_card
from upop.config import STAGES
from upop.cutting import compensated, decided, one_shot
from upop.data import Batches
from upop.disk import spare
from upop.errors import TrainingError, UpopError
from upop.evaluation import evaluate
from upop.folder import provenance, weights_hash
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
from upop.memory import left_out
from upop.plan import make_augment, make_batches, make_search, set_attention
from upop.profiling import count_params
from upop.reading import taking_over
from upop.recipe import FitOptions
from upop.session import Session
from upop.trace import TraceRecorder
from upop.tracking import final_numbers
from upop.train import Hook, NoHook, Progress, fit

log = logging.getLogger(__name__)

SCHEMA = 2
METRICS_EVERY = 50  # optimizer steps
PICTURES = {"widths.png": plots.widths, "stages.png": plots.stages}
Result = dict[str, Any]


@dataclass
class Stages:
    """The stages of one run, in order, over what they share."""

    run: Session

    def all(self) -> Result:
        """Train, measure and write; result.json comes last: a folder that has one is a run that is complete."""
        with self.run.timed("all"):
            models = self.train()
            final = list(models.values())[-1]
            if not self.run.passed("retrain"):
                self.run.save(final, "model")
                self.run.keep("evaluate")
            result = self.measure(models, final)
            processes.wait()
        result |= {"seconds": {k: round(v, 3) for k, v in self.run.seconds.items()}}
        self.write(result)
        self.run.stop_if_asked("evaluate")
        return result

    def write(self, result: Result) -> None:
        """Leave pictures, card and the result itself, which then names what could not be written of the others."""
        for name, draw in PICTURES.items():
            if self.run.folder.main:
                with spare(self.run.folder.path / name, result["warnings"]):
                    draw(result, self.run.folder.path / name)
        self.track(result)
        with spare(self.run.folder.path / "model" / CARD, result["warnings"]):
            parent = find_parent(self.run.plan.config.model, self.run.plan.loaded.folder)
            card = model_card(result, parent, name=self.run.folder.path.resolve().name)
            self.run.folder.write_text(f"model/{CARD}", card)
        try:
            self.run.folder.write_text("result.json", json.dumps(result, indent=1) + "\n")
        except UpopError as error:
            where = self.run.folder.path / "model"
            raise UpopError(f"{error}; the model itself is whole, in {where}; {self.run.how_to_go_on()}") from error
        self.run.folder.tidy()

    def track(self, result: Result) -> None:
        """Tell the trackers what came out; what they then fail at is the last that the result can say of them."""
        end = sum(self.run.plan.steps.values())
        self.run.tracking.log("result", final_numbers(result), end)
        self.run.tracking.pictures([self.run.folder.path / name for name in PICTURES], end)
        self.run.tracking.close()
        result["warnings"] += self.run.tracking.warnings

    def train(self) -> dict[str, nn.Module]:
        """Run the configured stages; the models as they are after each, on the device."""
        c, plan = self.run.plan.config, self.run.plan
        model = plan.loaded.model.to(self.run.accelerator.device)
        set_attention(model, c.attention)
        if c.has("dense") and self.run.passed("dense"):
            model = self.run.stored("dense")
        elif c.has("dense"):
            about = "fine-tune the dense model" if plan.loaded.trained else "train the dense model from scratch"
            self.fit("dense", about, model, epochs=c.epochs_dense, lr=c.lr)
            self.run.save(model, "dense")
            self.run.keep("search")
        models = {"dense": model}
        if c.has("search") and self.run.passed("search"):
            models["slim"] = self.run.stored("slim")
        elif c.has("search"):
            models["dense"] = copy.deepcopy(model)
            models["slim"] = self.one_shot(model) if c.one_shot else self.search(model, teacher=models["dense"])
            self.run.save(models["slim"], "slim")
            self.run.keep("retrain")
        if c.has("retrain") and self.run.passed("retrain"):
            models["retrain"] = self.run.stored("model")
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
        c = self.run.plan.config
        search = make_search(self.run.plan, model)
        validation = plain_batches(self.run.plan, self.run.plan.data.validation, self.run.accelerator)

        def accuracy() -> float:
            found = evaluate({"search": model}, validation, accelerator=self.run.accelerator, autocast=True)["search"]
            log.info("search: step %d, ratio %.4f, accuracy %.4f", search.steps_done, search.ratio, found.accuracy)
            return found.accuracy

        about = f"{c.method}, {c.target}: search what can go"
        trace = TraceRecorder(search.structures, search.steps)
        if state := self.run.begun("search"):
            with taking_over(str(self.run.folder.path)):
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
        if self.run.folder.main:
            with spare(self.run.folder.path / "trace.npz", self.run.notes):
                trace.save(self.run.folder.path / "trace.npz")
        keep = search.keep()
        lost, allowed = search.growth.cost_of_training if search.growth else 0.0, c.max_drop or c.tolerance or 0.0
        if lost > allowed:
            self.run.notes.append(
                f"search: with nothing removed, training alone cost {100 * lost:.1f} points of validation accuracy, "
                f"more than the {100 * allowed:.1f} allowed: lower lr_search ({c.lr_search})"
            )
        self.run.searched = decided(self.run.plan, keep) | {
            "trajectory": trace.summary(),
            "checks": search.growth and search.growth.history,
        }
        small = search.slim()
        with self.run.timed("evaluate"):
            self.run.masked = measure_masked(self.run.plan, self.run.accelerator, model, small)
        if search.method.shrink == "once" and c.how_to_compensate != "none":
            # What is cut is cut off the bare weights: those are what has to be made up for.
            search.detach()
            small = compensated(self.run.plan, self.run.accelerator, model, keep)
        elif c.how_to_compensate != "none":
            self.run.notes.append(
                f"compensate = {c.how_to_compensate} changed nothing: what has shrunk to zero is not to be made up for"
            )
        return small

    def one_shot(self, model: nn.Module) -> nn.Module:
        """Rank on a few batches, without training, and slim; returns the slimmed twin of `model`."""
        c = self.run.plan.config
        about = f"one-shot, {c.target}: rank on {c.rank_batches} batches in {c.rank_rounds} rounds, then slim"
        self.run.observer.stage("search", about)
        log.info("search: %s", about)
        with self.run.timed("search"):
            keep, small = one_shot(self.run.plan, self.run.accelerator, model)
        self.run.searched |= decided(self.run.plan, keep)
        return small

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
        c, hook = self.run.plan.config, hook or NoHook()
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
            ema=c.ema if stage != "search" else 0.0,
            seed=c.seed,
        )
        self.run.observer.stage(stage, about)
        log.info("%s: %s; %s", stage, about, options)
        validation = plain_batches(self.run.plan, self.run.plan.data.validation, self.run.accelerator)
        last: list[Progress] = []
        left = params or functools.partial(count_params, model)

        def report(progress: Progress) -> None:
            last[:] = [progress]
            self.run.observer.progress(progress)
            if progress.step % METRICS_EVERY == 0:
                self.run.metrics(stage, progress, params=left())

        def epoch_end(number: int) -> None:
            score = evaluate({stage: model}, validation, accelerator=self.run.accelerator, autocast=True)[stage]
            if not math.isfinite(score.loss):
                raise TrainingError(f"the validation loss is not finite after epoch {number}; lower the learning rate")
            found = {"validation_accuracy": score.accuracy, "validation_loss": score.loss}
            self.run.metrics(stage, last[0], params=left(), **found)
            self.run.observer.epoch(number, score.accuracy)
            log.info("%s: epoch %d of %s, validation accuracy %.4f", stage, number, epochs, score.accuracy)
            # During the search the weights mean nothing without their masks: what was good is the dense model.
            if stage != "search":
                self.run.save(model, "last-good")

        def keep(state: Callable[[], dict[str, Any]]) -> None:
            # One clock, but a signal to any process is a signal to all.
            asked, due = processes.highest(self.run.keeper.asked, self.run.folder.main and self.run.keeper.due)
            if asked or due:
                weights = model.state_dict()
                if not all(bool(value.isfinite().all()) for value in weights.values()):
                    raise TrainingError("weights are no longer finite; lower the learning rate or train in float32")
                self.run.keep(stage, fit=state(), model=weights, **more())
            if asked:
                self.run.stop_if_asked(stage)

        begun = self.run.begun(stage)
        if begun is not None:
            with taking_over(str(self.run.folder.path)):
                model.load_state_dict(begun["model"])
        if c.compile:
            model.compile()
        with self.run.timed(stage):
            try:
                done = fit(
                    model,
                    self.training_batches(STAGES.index(stage)),
                    options,
                    accelerator=self.run.accelerator,
                    hook=hook,
                    teacher=teacher if c.distill or c.distill_features else None,
                    report=report,
                    epoch_end=epoch_end,
                    keep=keep,
                    start=begun["fit"] if begun is not None else None,
                )
            except TrainingError as error:
                raise TrainingError(f"{stage}: {error}; {self.run.last_good()}") from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"{stage}: out of memory on {self.run.accelerator.device}, outside of the passes over images; use "
                    f"a smaller model; {self.run.last_good()}"
                ) from error
        self.run.training[stage] = {"skipped_steps": done.skipped, "micro_batch": done.micro_batch}
        if done.skipped:
            self.run.notes.append(f"{stage}: {done.skipped} steps were left out: loss or gradients were not finite")
        if done.memory:
            self.run.notes.append(
                f"{stage}: memory ran out; micro-batches of {done.micro_batch} images, the same steps"
            )

    def measure(self, models: dict[str, nn.Module], final: nn.Module) -> Result:
        """Everything that result.json says but the seconds."""
        plan = self.run.plan
        self.run.observer.stage("evaluate", "all models on validation and test, in float32; latency")
        self.run.stop_if_asked("evaluate")
        with self.run.timed("evaluate"):
            scores = measure_scores(plan, self.run.accelerator, models, masked=self.run.masked)
        with self.run.timed("latency"):
            latency = measure_latency(plan, self.run.accelerator.device, models["dense"], final, self.run.notes)
            promised: Result = {}
            with left_out("latency of the target", self.run.notes):
                promised = measure_promise(plan, models["dense"], final, self.run.searched["ratio"])
        return {
            "schema": SCHEMA,
            "status": "complete",
            **provenance(self.run.accelerator.device, self.run.command),
            **origin(plan),
            "weights": weights_hash(self.run.folder.path / "model"),
            **scores,
            "warnings": [*scores["warnings"], *self.run.notes, *promised.get("warnings", [])],
            "gap": self.run.masked.get("gap"),
            **sizes(models["dense"], final),
            **self.run.searched,
            "training": self.run.training,
            "latency": latency,
            "latency_target": promised or None,
        }

    def training_batches(self, stage: int) -> Batches:
        """Each stage draws its own order and augmentations: else every stage would begin with the same batches."""
        plan, c = self.run.plan, self.run.plan.config
        return make_batches(
            plan.data.train,
            c.model_copy(update={"seed": c.seed + 1_000_003 * stage}),
            plan.loaded,
            self.run.accelerator,
            classes=len(plan.data.classes),
            augment=make_augment(c),
        )
