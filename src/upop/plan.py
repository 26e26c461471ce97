"""From a configuration to everything a run needs, checked before any training: model, data, target, steps.

Must not train, and must not write anything.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from upop.analysis import Analysis, analyze
from upop.config import PruneConfig, given_values
from upop.data import Augment, Batches, ImageData, Split, load_data
from upop.errors import ModelError, UpopError
from upop.families import find_family
from upop.folder import weights_hash
from upop.methods import METHODS
from upop.models import LoadedModel, fit_head_, load_model
from upop.profiling import count_macs
from upop.search import equal_sparsity
from upop.slim import slim
from upop.targets import Target
from upop.train import count_steps
from upop.version import code_version


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any training.

    Attributes:
        given: the configuration as it came.
        config: resolved.
        target: None where the search decides the ratio itself.
        params_after: parameters left at the target.
        macs_before, macs_after: multiply-accumulates per image; after: if all layers shrank alike, which the search
            decides otherwise.
        steps: optimizer steps per stage.
    """

    given: PruneConfig
    config: PruneConfig
    loaded: LoadedModel
    data: ImageData
    analysis: Analysis
    target: Target | None
    params_after: int
    macs_before: int
    macs_after: int
    steps: Mapping[str, int]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be the same run."""
        return {
            "configuration": json.loads(json.dumps(given_values(self.given))),
            "code": code_version(),
            "data": self.data.fingerprint,
            "start": weights_hash(Path(self.given.model)),
        }


def make_plan(config: PruneConfig) -> Plan:
    """Load model and data and check that the run can be done, without training or writing anything.

    Raises UpopError for whatever stands in the way.
    """
    given, device = config, device_type(config.device)
    target = None if config.open_ended else Target.parse(config.target)
    loaded = load_model(config.model, seed=config.seed, new_head=config.has("dense"))
    analyze(loaded.model)  # refuses an unsupported model before any data is read
    if config.has("search") and not find_family(loaded.model).saves:
        raise ModelError(
            f"{config.model}: slimmed models of the class {type(loaded.model).__name__} cannot be saved yet, only ViT "
            "and DeiT can; prune it in a loop of your own with upop.Search"
        )
    data = read_data(config, loaded.image_size)
    replace = config.has("dense") or not loaded.trained
    fit_head_(loaded.model, data.classes, name=config.model, replace=replace, seed=config.seed)
    analysis = analyze(loaded.model)
    pruned = target is not None and config.has("search") and METHODS[config.method].score != "none"
    budget = target.budget(analysis.structures, analysis.params) if target is not None and pruned else 0.0
    config = config.resolve(trained=loaded.trained, device_type=device)
    per_epoch = max(1, len(data.train) // config.batch_size)
    epochs = {
        "dense": config.epochs_dense or 0,
        "search": config.epochs_search,
        "retrain": config.epochs_retrain,
    }
    steps = {stage: count_steps(n, per_epoch) for stage, n in epochs.items() if config.has(stage)}
    config = config.model_copy(
        update={
            "sparsity_mlp": equal_sparsity(analysis.structures, config.sparsity_attn)["mlp"]
            if config.sparsity_mlp is None
            else config.sparsity_mlp,
            "lr_mask": config.lr_mask or 2 / steps.get("search", 2),
        }
    )
    return Plan(
        given=given,
        config=config,
        loaded=loaded,
        data=data,
        analysis=analysis,
        target=target,
        params_after=analysis.params - math.ceil(budget),
        macs_before=count_macs(loaded.model),
        macs_after=count_macs(slim(loaded.model, _uniform_keep(analysis, budget / analysis.prunable))),
        steps=steps,
    )


def read_data(config: PruneConfig, image_size: int) -> ImageData:
    """The data of a run. The split is the same for every seed: seeds vary training, not what it is judged on."""
    held_out = config.validation
    return load_data(
        config.data,
        validation=int(held_out) if held_out is not None and held_out >= 1 else held_out,
        seed=0,
        skip_bad=config.skip_bad,
        image_size=image_size,
        subset=config.subset,
    )


def device_type(wanted: str) -> str:
    """`cpu` or `cuda` for `auto`, `cpu` or `cuda`; raises UpopError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UpopError("device: expected a CUDA GPU for device = cuda, found none; use device = cpu or auto")
    return "cuda" if there and wanted != "cpu" else "cpu"


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on so many CPU threads meanwhile; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _uniform_keep(analysis: Analysis, ratio: float) -> dict[str, Tensor]:
    return {s.name: torch.arange(s.units) < max(s.floor, round(s.units * (1 - ratio))) for s in analysis.structures}


def make_accelerator(config: PruneConfig) -> Accelerator:
    """Accelerate for a resolved configuration. Raises UpopError for an unknown tracker."""
    # Accelerate keeps its settings per process; a second run may want others.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            cpu=config.device == "cpu",
            log_with=config.tracker,
            project_dir=config.out,
        )
    except (ValueError, ImportError) as error:
        what = f"tracker {config.tracker!r}: cannot be used" if config.tracker else "Accelerate cannot be set up"
        raise UpopError(f"{what} ({error}); install it or leave it out") from error


def make_batches(
    split: Split,
    config: PruneConfig,
    loaded: LoadedModel,
    accelerator: Accelerator,
    *,
    classes: int,
    augment: Augment | None = None,
) -> Batches:
    """Batches of `split` as the model wants its images, shared out over the processes; augmented for training."""
    return Batches(
        split,
        batch_size=config.batch_size,
        size=loaded.image_size,
        mean=loaded.mean,
        std=loaded.std,
        device=accelerator.device,
        train=augment is not None,
        augment=augment,
        num_classes=classes,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.workers,
    )


def set_attention(model: Any, kernel: str) -> None:
    """Choose the attention kernel of a Hugging Face model; saved folders do not remember it."""
    model.set_attn_implementation(kernel)
