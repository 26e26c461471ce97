"""One configuration -> dense, search, slim, retrain, evaluate -> a folder with the model and a Result.

Ties the pieces together. Must not print: whoever watches does so through an Observer.
"""

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop import plots
from upop.config import STAGES, PruneConfig, given_values
from upop.data import Augment, Batches
from upop.errors import TrainingError
from upop.folder import RunFolder, disk_errors, is_main_process, provenance, weights_hash
from upop.measure import measure_gap, measure_latency, measure_scores, plain_batches, sizes
from upop.models import save_image_processor
from upop.plan import Plan, cpu_threads, make_accelerator, make_batches, make_plan, set_attention
from upop.pretrained import save_pretrained
from upop.profiling import count_params
from upop.search import Search
from upop.structures import prunable_cost, removed_cost
from upop.trace import TraceRecorder
from upop.train import FitOptions, Hook, NoHook, Progress, evaluate, fit
from upop.version import code_version

log = logging.getLogger(__name__)

SCHEMA = 2
METRICS_EVERY = 50  # optimizer steps
Result = dict[str, Any]


class Observer(Protocol):
    """Who watches a run: the command line, a notebook, nobody."""

    def stage(self, name: str, about: str) -> None:
        """A stage begins."""

    def progress(self, progress: Progress) -> None:
        """An optimizer step is done."""

    def epoch(self, number: int, accuracy: float) -> None:
        """An epoch is done; accuracy in [0, 1] on the validation split."""


class Nobody:
    """Watches nothing."""

    def stage(self, name: str, about: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def epoch(self, number: int, accuracy: float) -> None: ...


def prune(
    config: PruneConfig, *, overwrite: bool = False, observer: Observer | None = None, command: str | None = None
) -> Result:
    """Do the whole run and leave everything in `config.out`; returns what result.json holds.

    `command` is what the result says to type for the same run; the process's own command line unless given.

    Raises UpopError before anything is written where the run cannot be done, and TrainingError where training breaks
    off: the weights of the last good epoch are then in `<out>/last-good`.
    """
    RunFolder(Path(config.out), main=is_main_process()).check(overwrite=overwrite, sources=(config.model, config.data))
    with cpu_threads(config.threads):
        return _prune(config, observer or Nobody(), command)


def _prune(config: PruneConfig, observer: Observer, command: str | None) -> Result:
    plan = make_plan(config)
    accelerator = make_accelerator(plan.config)
    folder = RunFolder(Path(config.out), main=accelerator.is_main_process)
    run = _Run(plan, folder, accelerator, observer, command)
    run.training_batches(0)  # refuses what cannot be batched before the folder is touched
    folder.claim(plan.config.to_toml())
    accelerator.wait_for_everyone()
    with folder.log_file():
        log.info("%s on %s, %s: steps %s", config.model, config.data, config.target, dict(plan.steps))
        try:
            result = run.all()
        except BaseException as error:
            log.error("stopped: %s: %s", type(error).__name__, error)
            raise
        log.info("done in %.0f s", result["seconds"]["all"])
    return result


class _SearchHook:
    """The search as the training loop sees it: with its masks recorded and its questions answered."""

    def __init__(self, search: Search, accuracy: Callable[[], float], lr_mask: float, recorder: TraceRecorder) -> None:
        self._search, self._accuracy, self._lr_mask, self._recorder = search, accuracy, lr_mask, recorder
        self._answer()

    def penalty(self) -> Tensor:
        return self._search.penalty()

    def step(self) -> None:
        search = self._search
        search.step()
        self._answer()
        self._recorder.record(search.steps_done, search.ratio, search.masks.values)

    def groups(self) -> list[dict[str, Any]]:
        masks = self._search.trained_masks()
        return [{"params": masks, "lr": self._lr_mask, "weight_decay": 0.0}] if masks else []

    def _answer(self) -> None:
        while self._search.needs_accuracy:
            self._search.observe(self._accuracy())

    def metrics(self) -> Mapping[str, float]:
        return {"ratio": self._search.ratio}


@dataclass
class _Run:
    """The stages of one run, in order, over what they share."""

    plan: Plan
    folder: RunFolder
    accelerator: Accelerator
    observer: Observer
    command: str | None
    searched: dict[str, Any] = field(default_factory=lambda: {"ratio": None, "trajectory": None, "checks": None})
    seconds: dict[str, float] = field(default_factory=dict)

    def all(self) -> Result:
        """Train, measure and write; result.json comes last: a folder that has one is a run that is complete."""
        began = time.monotonic()
        if self.plan.config.tracker:
            self.accelerator.init_trackers("upop", config=self.plan.config.model_dump())
        models = self.train()
        final = list(models.values())[-1]
        self.save(final, "model")
        result = self.measure(models, final)
        self.seconds["all"] = time.monotonic() - began
        result |= {"seconds": {k: round(v, 3) for k, v in self.seconds.items()}}
        for name, draw in (("widths.png", plots.widths), ("stages.png", plots.stages)):
            if self.folder.main:
                with disk_errors(self.folder.path / name):
                    draw(result, self.folder.path / name)
        self.folder.write_text("result.json", json.dumps(result, indent=1) + "\n")
        self.folder.remove("last-good")
        self.accelerator.end_training()
        return result

    def train(self) -> dict[str, nn.Module]:
        """Run the configured stages; the models as they are after each, on the device."""
        c, plan = self.plan.config, self.plan
        model = plan.loaded.model.to(self.accelerator.device)
        set_attention(model, c.attention)
        if c.has("dense"):
            about = "fine-tune the dense model" if plan.loaded.trained else "train the dense model from scratch"
            self.fit("dense", about, model, epochs=c.epochs_dense, lr=c.lr)
            self.save(model, "dense")
        models = {"dense": model}
        if c.has("search"):
            models["dense"] = copy.deepcopy(model)
            models["search"], models["slim"] = self.search(model, teacher=models["dense"])
            self.save(models["slim"], "slim")
        if c.has("retrain"):
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

    def search(self, model: nn.Module, *, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Search on `model`; returns it with its masks still on, and its slimmed twin."""
        c = self.plan.config
        search = Search(
            model,
            target=self.plan.target,
            steps=self.plan.steps["search"],
            method=c.method,
            shrink=c.shrink,
            schedule=c.schedule,
            interval=c.interval,
            normalise=c.normalise,
            gradient_order=c.gradient_order,
            sparsity={"attn": c.sparsity_attn, "mlp": c.sparsity_mlp or 0.0},
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
        hook = _SearchHook(search, accuracy, c.lr_mask or 0.0, trace)
        self.fit("search", about, model, epochs=c.epochs_search, lr=c.lr_search, hook=hook, teacher=teacher)
        assert search.done, "a search must take all its steps"
        if self.folder.main:
            with disk_errors(self.folder.path / "trace.npz"):
                trace.save(self.folder.path / "trace.npz")
        removed = removed_cost(search.structures, search.keep())
        self.searched = {
            "ratio": {
                "target": self.plan.target and self.plan.target.value,
                "prunable": removed / prunable_cost(search.structures),
                "params": removed / self.plan.analysis.params,
            },
            "trajectory": trace.summary(),
            "checks": search.growth and search.growth.history,
        }
        return model, search.slim()

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
    ) -> None:
        """Train one stage, with its metrics, progress and last good weights."""
        c = self.plan.config
        assert epochs is not None, "the configuration is resolved"
        assert lr is not None, "the configuration is resolved"
        hook = hook or NoHook()
        options = FitOptions(
            epochs=epochs,
            lr=lr,
            optimizer=c.optimizer or "adamw",
            weight_decay=c.weight_decay,
            warmup=c.warmup,
            decay="constant" if stage == "search" else "cosine",
            label_smoothing=c.label_smoothing,
            distill=c.distill if teacher is not None else 0.0,
            temperature=c.temperature,
            clip=c.clip,
            accumulate=c.accumulate,
            seed=c.seed,
        )
        self.observer.stage(stage, about)
        log.info("%s: %s; %s", stage, about, options)
        validation = plain_batches(self.plan, self.plan.data.validation, self.accelerator)
        last: list[Progress] = []

        def report(progress: Progress) -> None:
            last[:] = [progress]
            self.observer.progress(progress)
            if progress.step % METRICS_EVERY == 0:
                self.metrics(stage, progress)

        def epoch_end(number: int) -> None:
            score = evaluate({stage: model}, validation, accelerator=self.accelerator, autocast=True)[stage]
            if not math.isfinite(score.loss):
                raise TrainingError(f"the validation loss is not finite after epoch {number}; lower the learning rate")
            self.metrics(stage, last[0], validation_accuracy=score.accuracy, validation_loss=score.loss)
            self.observer.epoch(number, score.accuracy)
            log.info("%s: epoch %d of %s, validation accuracy %.4f", stage, number, epochs, score.accuracy)
            # During the search the weights mean nothing without their masks: what was good is the dense model.
            if stage != "search":
                self.save(model, "last-good")

        if c.compile:
            model.compile()
        with self.timed(stage):
            try:
                fit(
                    model,
                    self.training_batches(STAGES.index(stage)),
                    options,
                    accelerator=self.accelerator,
                    hook=hook,
                    teacher=teacher if c.distill else None,
                    report=report,
                    epoch_end=epoch_end,
                )
            except TrainingError as error:
                raise TrainingError(f"{stage}: {error}; {self.last_good()}") from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"{stage}: out of memory on {self.accelerator.device}; use --accumulate {2 * c.accumulate} "
                    f"(smaller micro-batches, the same steps); {self.last_good()}"
                ) from error

    def last_good(self) -> str:
        """Where the weights of the last complete epoch are."""
        for name in ("last-good", "dense"):
            if (self.folder.path / name).exists():
                return f"the last good weights are in {self.folder.path / name}"
        return "no epoch was complete before that"

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
        self.folder.add_line("metrics.jsonl", where | {k: round(v, 6) for k, v in values.items()})
        # Trackers want steps that only grow.
        earlier = list(self.plan.steps)[: list(self.plan.steps).index(stage)]
        step = progress.step + sum(self.plan.steps[name] for name in earlier)
        self.accelerator.log({f"{stage}/{k}": v for k, v in values.items()}, step=step)

    def measure(self, models: dict[str, nn.Module], final: nn.Module) -> Result:
        """Everything that result.json says but the seconds."""
        plan = self.plan
        self.observer.stage("evaluate", "all models on validation and test, in float32; latency")
        with self.timed("evaluate"):
            scores = measure_scores(plan, self.accelerator, models)
            gap = measure_gap(plan, self.accelerator, models)
        with self.timed("latency"):
            latency = measure_latency(plan, self.accelerator.device, models["dense"], final)
        return {
            "schema": SCHEMA,
            "status": "complete",
            **provenance(self.accelerator.device, self.command),
            "code": code_version(),
            "weights": weights_hash(self.folder.path / "model"),
            "start": weights_hash(Path(plan.given.model)),
            "given": given_values(plan.given),
            "config": plan.config.model_dump(),
            "data": plan.data.facts(),
            "images": {"size": plan.loaded.image_size, "mean": plan.loaded.mean, "std": plan.loaded.std},
            **scores,
            "gap": gap,
            **sizes(models["dense"], final),
            **self.searched,
            "latency": latency,
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
        began = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - began
