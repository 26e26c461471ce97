"""The configuration of one run: validated where it is made, saved beside every result.

One flat, frozen model: a field here is an option on the command line and a key in a config file, under one name.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from upop.errors import UpopError, nearest, shortened
from upop.methods import KINDS, METHODS, NORMALISE, ONE_SHOT, parse_align, parse_kinds, parse_layers
from upop.schedules import SCHEDULES

STAGES = ("dense", "search", "retrain")
# UPop as published (Algorithm 1; DeiT was searched for 60 epochs and retrained for 300), whatever becomes the default.
PAPER: dict[str, Any] = {
    "epochs_search": 1,
    "epochs_retrain": 5,
    "method": "upop",
    "structures": "attn,mlp",
    "align": "none",
    "schedule": "sine",
    "interval": 1,
    "normalise": "zscore",
    "gradient_order": "paper",
    "binarise": "topk",
    "compensate": "none",
    "sparsity_attn": 4.8e-3,
    "distill": 0.0,
    "distill_features": 0.0,
}

# Options that say how a search goes, and so that there is one.
OF_A_SEARCH = {"lr_search", "shrink", "schedule", "interval", "gradient_order", "max_drop", "tolerance", "checks"}
OF_A_SEARCH |= {"lr_mask", "sparsity_attn", "sparsity_mlp"}
# What says nothing where a stage is not run.
UNUSED_WITHOUT = {
    "search": OF_A_SEARCH
    | {"epochs_search", "rank_batches", "rank_rounds", "normalise", "binarise", "threshold", "compensate"},
    "retrain": {"epochs_retrain"},
}


class ConfigError(UpopError):
    """A key or value that a configuration cannot have."""


class PruneConfig(BaseModel):
    """Everything that decides what a run computes. `None` means: chosen from model and device, see `resolve`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="Hub name, local folder, or built-in shape such as deit-tiny-cifar")
    data: str = Field(description="cifar10, a Hub data set, digits, or a local folder")
    target: str = Field(
        "params=0.5",
        description="what to remove: params=0.5, macs=0.5, latency=0.5, prunable=0.5, or what is left: params=11M, "
        "macs=2.3G, latency=4ms; open: as far as max_drop, tolerance or threshold allow",
    )
    out: str = Field("runs/latest", description="folder for everything that comes out")
    stages: str = Field("dense,search,retrain", description="which stages to run, each on the model it is given")
    recipe: Literal["best", "paper"] = Field(
        "best", description="what options that are not given mean: what measured best, or UPop as published"
    )

    epochs_dense: int | float | None = Field(None, gt=0, description="fine-tuning epochs (3; from scratch 100)")
    epochs_search: int | float | None = Field(
        None,
        ge=0,
        description="search epochs; 0.5 is half an epoch, 0 one-shot: rank on a few batches, then slim (0; 1 with a "
        "method, a target or an option that needs a search)",
    )
    rank_batches: int = Field(16, ge=1, description="batches that a one-shot ranking, and compensation, look at")
    rank_rounds: int = Field(4, ge=1, description="of a one-shot ranking; each takes the same share of what is left")
    epochs_retrain: int | float | None = Field(
        None, gt=0, description="retraining epochs of the slimmed model (6; after a search 5)"
    )
    batch_size: int = Field(128, ge=1, description="images per optimizer step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches a step is split into, to save memory")
    optimizer: Literal["adamw", "muon"] | None = Field(
        None, description="adamw; muon from scratch, and for what it has trained in an earlier run"
    )
    lr: float | None = Field(None, gt=0, description="peak rate of the dense stage (5e-5; from scratch 0.02)")
    lr_search: float | None = Field(
        None, gt=0, description="rate of the search, constant after warm-up (half of lr_retrain)"
    )
    lr_retrain: float | None = Field(None, gt=0, description="peak rate of retraining (lr; from scratch lr / 4)")
    weight_decay: float = Field(0.05, ge=0, description="decoupled; never on norms, biases, tokens, positions")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of a stage's steps for the learning rate to rise")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    distill: float = Field(
        0.0, ge=0, le=1, description="weight of the dense model's soft labels in search and retrain"
    )
    distill_features: float = Field(
        0.0, ge=0, description="weight of the dense model's last hidden states in search and retrain"
    )
    temperature: float = Field(2.0, gt=0, description="temperature of distillation")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = off")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the average over steps that fine-tuning and retraining end with; 0 = off",
    )

    structures: str = Field("attn,mlp", description=f"what competes in the ranking, some of: {', '.join(KINDS)}")
    ignored_layers: str = Field("", description="layers that keep all of their units, as 0,-1 or 0-2,-1")
    align: str = Field(
        "auto", description="widths as hardware likes them: auto (by device), none, or multiples such as attn=8,mlp=64"
    )
    latency_batch: int = Field(1, ge=1, description="images in the pass that a latency target is about")
    latency_runtime: Literal["eager", "compile", "onnx"] = Field("eager", description="and what runs it")
    latency_dtype: Literal["float32", "bfloat16"] = Field("float32", description="and in which weights")

    method: str = Field("upop", description=f"who goes, and how: {', '.join(METHODS)}")
    compensate: Literal["auto", "none", "mean", "least-squares"] = Field(
        "auto", description="what was cut at once is made up for in the next layer (auto: where one-shot)"
    )
    shrink: Literal["progressive", "once"] | None = Field(
        None, description="losers sink to zero, or are cut at the end (the method's own)"
    )
    schedule: str = Field("sine", description=f"growth of the ratio: {', '.join(SCHEDULES)}")
    interval: int = Field(1, ge=1, description="steps between two decisions of the search")
    normalise: str | None = Field(
        None,
        description=f"scores within a kind: {', '.join(NORMALISE)} (zscore; one-shot, nothing retrained: none)",
    )
    gradient_order: Literal["paper", "authors"] = Field("paper", description="normalise then sum, or sum first")
    binarise: Literal["topk", "threshold"] = Field(
        "topk", description="prune up to the target, or (target open) all units above a threshold"
    )
    threshold: float | None = Field(None, description="on the normalised score, for binarise = threshold")
    max_drop: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="as much as fits, at most the target: validation at most this (such as 0.01) below dense",
    )
    tolerance: float | None = Field(
        None, ge=0, lt=1, description="adaptive rate: grow while validation falls by at most this between two checks"
    )
    checks: int = Field(20, ge=1, description="validation checks during a search with max_drop or tolerance")
    lr_mask: float | None = Field(
        None, gt=0, description="rate of masks trained by the optimizer (2 / search steps: 0 is half-way off)"
    )
    sparsity_attn: float = Field(4.8e-3, ge=0, description="weight of sum |mask| over head dims")
    sparsity_mlp: float | None = Field(
        None, ge=0, description="weight of sum |mask| over hidden neurons (as much in all as the head dims)"
    )

    flip: bool = Field(True, description="random horizontal flip")
    crop: int = Field(4, ge=0, le=31, description="random crop after padding by this many pixels per 32")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0 = off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0 = off")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    color: float = Field(0.0, ge=0, le=1, description="strength of colour jitter")
    randaugment: int = Field(
        0, ge=0, le=14, description="random operations on each image, as TrivialAugment draws one; 0 = off"
    )

    validation: float | None = Field(
        None, gt=0, description="images (> 1) or share (< 1) of train held out (0.1; digits 0.15)"
    )
    subset: int | None = Field(None, ge=1, description="use only so many images of each split, for a quick trial")
    skip_bad: bool = Field(False, description="skip unreadable images (they are listed) instead of stopping")
    seed: int = Field(0, ge=0, description="of everything random")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="of training; results are read in float32")
    attention: Literal["auto", "eager", "sdpa"] = Field("auto", description="attention kernel in training")
    threads: int | None = Field(None, ge=1, description="CPU threads (all cores); results depend on it by rounding")
    checkpoint_minutes: float = Field(5.0, ge=0, description="time between two checkpoints, for --resume")
    latency_seconds: float = Field(5.0, gt=0, description="time to measure latency, per batch size")
    compile: bool = Field(False, description="torch.compile the model")
    workers: int = Field(2, ge=0, description="decoding processes, for data sets too large for memory")
    tracker: str | None = Field(
        None, description="also log to tensorboard, wandb, mlflow, trackio, ...; several: tensorboard,wandb"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_recipe(cls, values: Any) -> Any:
        return PAPER | values if isinstance(values, dict) and values.get("recipe") == "paper" else values

    @model_validator(mode="before")
    @classmethod
    def _asked_for_a_search(cls, values: Any) -> Any:
        """Here, so that from now on values alone say what a configuration means, and not which of them were given."""
        if isinstance(values, dict) and "epochs_search" not in values:
            asked = any(values.get(name) is not None for name in OF_A_SEARCH)
            return values | ({"epochs_search": 1} if asked else {})
        return values

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, value: str) -> str:
        wanted = [part.strip() for part in value.split(",")]
        for part in wanted:
            if part not in STAGES:
                raise ValueError(f"expected some of {', '.join(STAGES)}, got {part!r}{nearest(part, STAGES)}")
        return ",".join(stage for stage in STAGES if stage in wanted)

    @field_validator("model", "data", "out")
    @classmethod
    def _home(cls, value: str) -> str:
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @field_validator("validation")
    @classmethod
    def _whole_images(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError(f"expected a share below 1 or a whole number of images, got {value}")
        return value

    @field_validator("schedule", "method", "normalise")
    @classmethod
    def _known_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        names: dict[str, Iterable[str]] = {"schedule": SCHEDULES, "method": METHODS, "normalise": NORMALISE}
        known = list(names[info.field_name or ""])
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        return value

    @field_validator("structures")
    @classmethod
    def _known_kinds(cls, value: str) -> str:
        return ",".join(parse_kinds(value))

    @field_validator("ignored_layers")
    @classmethod
    def _known_layers(cls, value: str) -> str:
        return ",".join(map(str, parse_layers(value)))

    @field_validator("align")
    @classmethod
    def _known_align(cls, value: str) -> str:
        if value not in ("auto", "none"):
            parse_align(value)
        return value

    @model_validator(mode="after")
    def _needs_search_for_masks(self) -> "PruneConfig":
        if self.stages == "dense,retrain":
            raise ValueError("stages: expected a search between dense and retrain")
        return self

    @model_validator(mode="after")
    def _teacher(self) -> "PruneConfig":
        if self.stages == "retrain":
            # The model that this run is given would be its own teacher.
            for name in ("distill", "distill_features"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}: needs the dense model, which stage retrain alone has not; use search,retrain"
                    )
        return self

    @model_validator(mode="after")
    def _one_shot(self) -> "PruneConfig":
        if self.one_shot:
            if self.method not in ONE_SHOT:
                raise ValueError(
                    f"method: expected one of {', '.join(ONE_SHOT)} for a one-shot ranking (epochs_search = 0), got "
                    f"{self.method!r}"
                )
            if self.open_ended:
                raise ValueError("target: open needs a search, got a one-shot ranking; use epochs_search = 1")
            for name in ("max_drop", "tolerance"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: needs a search, got a one-shot ranking; use epochs_search = 1")
        return self

    @model_validator(mode="after")
    def _one_goal(self) -> "PruneConfig":
        if (self.binarise == "threshold") != (self.threshold is not None):
            raise ValueError("threshold: expected together with binarise = threshold, and only then")
        rules = [n for n in ("threshold", "max_drop", "tolerance") if getattr(self, n) is not None]
        if len(rules) > 1:
            raise ValueError(f"target: expected one of threshold, max_drop, tolerance, got {' and '.join(rules)}")
        if self.open_ended and not rules and self.method != "dense-continued":
            raise ValueError("target: open needs one of threshold, max_drop, tolerance, to say where it ends")
        if not self.open_ended and self.threshold is not None:
            raise ValueError("target: a threshold decides the ratio itself; use target = open")
        return self

    @property
    def open_ended(self) -> bool:
        """Whether the search decides the final ratio itself."""
        return self.target.strip() == "open"

    @property
    def one_shot(self) -> bool:
        """Whether units are ranked on a few batches, without a search."""
        return self.has("search") and self.how_long_to_search == 0

    @property
    def how_long_to_search(self) -> int | float:
        """Resolved epochs: none where a ranking will do and nothing that is asked for needs more (docs/recipe.md)."""
        if self.epochs_search is not None:
            return self.epochs_search
        return 1 if self.open_ended or self.method not in ONE_SHOT else 0

    @property
    def how_to_compensate(self) -> Literal["none", "mean", "least-squares"]:
        """Resolved: nothing is left to make up for where losers have shrunk to zero."""
        if self.compensate != "auto":
            return self.compensate
        return "least-squares" if self.one_shot else "none"

    @property
    def _effects_alone_count(self) -> bool:
        """Whether units are best ranked by their first-order effects on the loss as they are.

        Those are losses, the same unit in every kind, so they say best what a cut costs at once. But at high ratios
        they starve one kind, which retraining cannot make good: z-scores end higher (docs/recipe.md).
        """
        return self.one_shot and ONE_SHOT.get(self.method) == "taylor" and not self.has("retrain")

    def has(self, stage: str) -> bool:
        """Whether the run includes `stage`."""
        return stage in self.stages.split(",")

    def resolve(self, *, trained: bool, device_type: str, trained_by: str | None = None) -> "PruneConfig":
        """The same configuration with every automatic value filled in, as it is saved beside the result.

        Pretrained weights get a learning rate that does not destroy them: 5e-5 for AdamW. From scratch: Muon, at a
        rate that the later stages, whose model is trained by then, must not keep. What depends on the model's units or
        the number of steps (`sparsity_mlp`, `lr_mask`) the plan fills in.
        """
        from upop.devices import has_bf16  # torch, which to read a configuration needs not

        # What Muon has trained here loses less where Muon trains it again; fine-tuning is to be gentle all the same.
        muon = not trained or (trained_by == "muon" and not self.has("dense"))
        optimizer = self.optimizer or ("muon" if muon else "adamw")
        gentle = {"adamw": 5e-5, "muon": 5e-3}[optimizer]
        lr = self.lr or (gentle if trained else {"adamw": 1e-3, "muon": 0.02}[optimizer])
        lr_retrain = self.lr_retrain or (lr if trained else lr / 4)
        fast = "bf16" if has_bf16(device_type) else "fp32"
        precision = fast if self.precision == "auto" else self.precision
        # A training step on CPUs at 17 to 197 tokens: in bfloat16 eager takes 0.6 to 0.8 of the time of sdpa, whose
        # backward is slow; in float32 sdpa is a few per cent faster (benchmarks/attention.py).
        attention = "eager" if device_type == "cpu" and precision == "bf16" else "sdpa"
        return self.model_copy(
            update={
                "epochs_dense": self.epochs_dense or (3 if trained else 100),
                "epochs_search": self.how_long_to_search,
                "epochs_retrain": self.epochs_retrain or (6 if self.one_shot else 5),
                "optimizer": optimizer,
                "lr": lr,
                "lr_search": self.lr_search or lr_retrain / 2,
                "lr_retrain": lr_retrain,
                "shrink": self.shrink or METHODS[self.method].shrink,
                "compensate": self.how_to_compensate,
                "normalise": self.normalise or ("none" if self._effects_alone_count else "zscore"),
                "device": device_type,
                "precision": precision,
                "attention": attention if self.attention == "auto" else self.attention,
            }
        )


def given_values(config: PruneConfig) -> dict[str, Any]:
    """What of a configuration decides its numbers, as plain values: all but where results go and who watches."""
    values = config.model_dump(exclude={"out", "tracker", "checkpoint_minutes"})
    # A folder is known by its weights, wherever it lies.
    return values | ({"model": "a folder"} if Path(config.model).is_dir() else {})


def is_given(found: object, config: PruneConfig) -> bool:
    """Whether `found`, `given_values` as JSON, perhaps of a version that had fewer options, is that of `config`."""
    wanted = json.loads(json.dumps(given_values(config)))
    if not isinstance(found, dict):
        return False
    # An option that was not known was as it is by default.
    usual = {name: PruneConfig.model_fields[name].default for name in wanted if name not in found}
    unused = {name for stage, names in UNUSED_WITHOUT.items() if not config.has(stage) for name in names}
    return all(wanted.get(name) == value for name, value in (usual | found).items() if name not in unused)


def make_config(values: dict[str, Any], where: str = "options") -> PruneConfig:
    """A PruneConfig of `values`; raises ConfigError in one line, naming the nearest known key for an unknown one."""
    for key in values:
        if key not in PruneConfig.model_fields:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, PruneConfig.model_fields)}")
    try:
        return PruneConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # Further parts say which of several types was tried.
        key = str(first["loc"][0]) if first["loc"] else ""
        what = first["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
        if len(first["loc"]) > 1:
            what = "expected a number, as 3 or 0.5"
        if first["type"] == "missing":
            what = f"missing; expected {PruneConfig.model_fields[key].description}"
        got = "" if first["type"] in ("missing", "value_error") else f", got {shortened(first['input'])}"
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{what}{got}") from None
