"""One configuration -> dense, search, slim, retrain, evaluate -> a folder with the model and a Result.

Ties the pieces together. Must not print: whoever watches does so through an Observer.
"""

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop import plots
from upop.config import STAGES, PruneConfig
from upop.data import Augment, Batches, Split
from upop.errors import TrainingError, UpopError
from upop.families import find_structures
from upop.folder import RunFolder, disk_errors, is_main_process, provenance
from upop.models import fit_head_, load_model, save_image_processor
from upop.plan import Plan, device_type, make_accelerator, make_batches, make_plan, read_data, set_attention
from upop.pretrained import save_pretrained
from upop.profiling import compare_latency, count_macs, count_params
from upop.search import Search
from upop.structures import widths
from upop.train import FitOptions, Hook, NoHook, Progress, Score, evaluate, fit

log = logging.getLogger(__name__)

SCHEMA = 1
LATENCY_BATCHES = (1, 64)
LATENCY_SECONDS = 5.0
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


def prune(config: PruneConfig, *, overwrite: bool = False, observer: Observer | None = None) -> Result:
    """Do the whole run and leave everything in `config.out`; returns what result.json holds.

    Raises UpopError before anything is written where the run cannot be done, and TrainingError where training breaks
    off: the weights of the last good epoch are then in `<out>/last-good`.
    """
    RunFolder(Path(config.out), main=is_main_process()).check(overwrite=overwrite, sources=(config.model, config.data))
    plan = make_plan(config)
    accelerator = make_accelerator(plan.config)
    folder = RunFolder(Path(config.out), main=accelerator.is_main_process)
    run = _Run(plan, folder, accelerator, observer or Nobody())
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
    """The search as the training loop sees it."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def penalty(self) -> Tensor:
        return self._search.penalty()

    def step(self) -> None:
        self._search.step()

    def metrics(self) -> Mapping[str, float]:
        return {"ratio": self._search.ratio}


@dataclass
class _Run:
    """The stages of one run, in order, over what they share."""

    plan: Plan
    folder: RunFolder
    accelerator: Accelerator
    observer: Observer
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
            schedule=c.schedule,
            interval=c.interval,
            gradient_order=c.gradient_order,
            sparsity={"attn": c.sparsity_attn, "mlp": c.sparsity_mlp},
        )
        about = f"search what can go, {c.target}"
        hook = _SearchHook(search)
        self.fit("search", about, model, epochs=c.epochs_search, lr=c.lr_search, hook=hook, teacher=teacher)
        assert search.done, "a search must take all its steps"
        return model, search.slim()

    def fit(
        self,
        stage: str,
        about: str,
        model: nn.Module,
        *,
        epochs: int | None,
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
        validation = self.batches(self.plan.data.validation)
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
            log.info("%s: epoch %d of %d, validation accuracy %.4f", stage, number, epochs, score.accuracy)
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
        """Everything that result.json says but the seconds. Reads the test split, once."""
        plan, dense = self.plan, models["dense"]
        self.observer.stage("evaluate", "all models on validation and test, in float32; latency")
        with self.timed("evaluate"):
            splits = {"validation": plan.data.validation}
            if plan.data.test is not None:
                splits["test"] = plan.data.test
            scores = {n: evaluate(models, self.batches(s), accelerator=self.accelerator) for n, s in splits.items()}
            gap = self.gap(models)
        with self.timed("latency"):
            # Copies: a copy is not compiled, so that both are timed alike.
            pair = {"before": copy.deepcopy(dense), "after": copy.deepcopy(final)}
            latency = {
                str(batch): compare_latency(
                    pair,
                    batch=batch,
                    image_size=plan.loaded.image_size,
                    device=self.accelerator.device,
                    max_seconds=LATENCY_SECONDS,
                )
                for batch in LATENCY_BATCHES
            }
        accuracy = {stage: {split: found[stage].accuracy for split, found in scores.items()} for stage in models}
        return {
            "schema": SCHEMA,
            "status": "complete",
            "warnings": [*plan.loaded.notes, *_warnings(accuracy, plan.data.validation.labels)],
            **provenance(self.accelerator.device),
            "config": plan.config.model_dump(),
            "data": plan.data.facts(),
            "images": {"size": plan.loaded.image_size, "mean": plan.loaded.mean, "std": plan.loaded.std},
            "accuracy": accuracy,
            "loss": {stage: {split: found[stage].loss for split, found in scores.items()} for stage in models},
            "gap": gap,
            "params": {"before": count_params(dense), "after": count_params(final)},
            "macs": {"before": count_macs(dense), "after": count_macs(final)},
            "latency": {batch: {k: asdict(v) for k, v in found.items()} for batch, found in latency.items()},
            "widths": {"before": widths(find_structures(dense)), "after": widths(find_structures(final))},
        }

    @torch.no_grad()
    def gap(self, models: dict[str, nn.Module]) -> float | None:
        """Largest difference between masked and slimmed logits over a batch of validation images."""
        if "slim" not in models:
            return None
        images, _ = next(iter(self.batches(self.plan.data.validation)))
        outputs: list[Any] = [models[name](pixel_values=images) for name in ("search", "slim")]
        return float((outputs[0].logits - outputs[1].logits).abs().max())

    def batches(self, split: Split) -> Batches:
        plan = self.plan
        return make_batches(split, plan.config, plan.loaded, self.accelerator, classes=len(plan.data.classes))

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


def _warnings(accuracy: Mapping[str, Mapping[str, float]], labels: Tensor) -> list[str]:
    """What a reader of the numbers must know first: models that do no better than guessing the largest class."""
    chance = float(labels.bincount().max() / len(labels))
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))
    return [
        f"{stage}: validation accuracy {found['validation']:.3f} is at chance ({chance:.3f}); "
        + ("the dense model is not trained" if stage == "dense" else "the model has collapsed: prune less or longer")
        for stage, found in accuracy.items()
        if found["validation"] < limit
    ]


def evaluate_model(config: PruneConfig, split: str) -> tuple[Score, int, int]:
    """Score of `config.model` on a split of `config.data`, its parameters and its MACs per image.

    Raises UpopError where the model's head does not fit the data, or the data has no such split.
    """
    loaded = load_model(config.model)
    data = read_data(config, loaded.image_size)
    fit_head_(loaded.model, data.classes, name=config.model, replace=False)
    images = {"validation": data.validation, "test": data.test}[split]
    if images is None:
        raise UpopError(f"{config.data}: has no {split} split; use --split validation")
    config = config.resolve(trained=True, device_type=device_type(config.device))
    accelerator = make_accelerator(config)
    model = loaded.model.to(accelerator.device)
    set_attention(model, config.attention)
    batches = make_batches(images, config, loaded, accelerator, classes=len(data.classes))
    score = evaluate({"model": model}, batches, accelerator=accelerator)["model"]
    return score, count_params(model), count_macs(model)
