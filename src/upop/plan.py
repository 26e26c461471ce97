"""From a configuration to everything a run needs, checked before any training: model, data, target, steps.

Must not train, and must not write anything.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from upop import processes
from upop.analysis import Analysis, analyze
from upop.config import PruneConfig, given_values
from upop.costs import Cost, params_cost
from upop.data import Augment, Batches, ImageData, Split, load_data
from upop.errors import ModelError, TargetError, UpopError
from upop.families import find_family, find_structures
from upop.folder import weights_hash
from upop.latency import LatencyTable
from upop.methods import METHODS, parse_align
from upop.models import LoadedModel, fit_head_, load_model
from upop.observer import Nobody, Observer
from upop.penalty import equal_sparsity
from upop.profiling import count_macs
from upop.ranking import check_alignment, group_price
from upop.recipe import count_steps
from upop.search import Search
from upop.slim import slim
from upop.structures import Structure
from upop.targets import TOLERANCE, Target, amount, find_cost
from upop.timing import measure_latency_table
from upop.tracking import parse_trackers
from upop.version import code_version


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any training.

    Attributes:
        given: the configuration as it came.
        config: resolved.
        target: None where the search decides the ratio itself.
        kinds: what competes in the ranking; align: kind -> multiples of which widths become.
        latency: the table of a target in latency.
        left: what the target leaves, in its own currency.
        params_after, macs_after: if all layers shrank alike, which the search decides otherwise; but parameters are
            exact where the target is in them.
        steps: optimizer steps per stage.
    """

    given: PruneConfig
    config: PruneConfig
    loaded: LoadedModel
    data: ImageData
    analysis: Analysis
    target: Target | None
    kinds: tuple[str, ...]
    align: Mapping[str, int]
    latency: LatencyTable | None
    left: float
    params_after: int
    macs_before: int
    macs_after: int
    steps: Mapping[str, int]

    def promise(self) -> str:
        """What the target asks for and how widths may come out, in one line for people."""
        widths = ", ".join(f"{kind} in multiples of {n}" for kind, n in self.align.items()) or "any"
        if METHODS[self.config.method].score == "none":
            return f"{self.config.method}: nothing is removed"
        if self.target is None:
            return f"target open; widths: {widths}"
        dense, currency = self.analysis.costs[self.target.currency].dense, self.target.currency
        where = f" ({self.latency})" if self.latency is not None else ""
        change = f"{amount(dense, currency)} -> {amount(self.left, currency)}"
        return f"target {self.target}: {change}{where}; widths: {widths}"

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be the same run."""
        return identity(self.given) | {"data": self.data.fingerprint}


def identity(config: PruneConfig) -> dict[str, Any]:
    """What must be the same for a run to be the same run, but its data, which are not read for this."""
    return {
        "configuration": json.loads(json.dumps(given_values(config))),
        "code": code_version(),
        "start": weights_hash(Path(config.model)),
    }


def make_plan(config: PruneConfig, *, latency: LatencyTable | None = None, observer: Observer | None = None) -> Plan:
    """Load model and data and check that the run can be done, without training or writing anything.

    A target in latency needs a table: `latency`, or one is measured now. Raises UpopError for whatever stands in the
    way.
    """
    given, device = config, device_type(config.device)
    parse_trackers(config.tracker)
    target = None if config.open_ended else Target.parse(config.target)
    loaded = load_model(config.model, seed=config.seed, new_head=config.has("dense"))
    kinds = tuple(config.structures.split(","))
    ignored = config.ignored_layers
    analyze(loaded.model, kinds, ignored_layers=ignored)  # refuses an unsupported model before any data is read
    if config.has("search") and not find_family(loaded.model).saves:
        raise ModelError(
            f"{config.model}: slimmed models of the class {type(loaded.model).__name__} cannot be saved; prune it in "
            "a loop of your own with upop.Search"
        )
    data = read_data(config, loaded)
    replace = config.has("dense") or not loaded.trained
    notes = fit_head_(loaded.model, data.classes, name=config.model, replace=replace, seed=config.seed)
    loaded = dataclasses.replace(loaded, notes=loaded.notes + notes)
    align = _alignment(config, loaded.model, kinds, device)
    pruned = target is not None and config.has("search") and METHODS[config.method].score != "none"
    if target is not None and target.unit == "latency" and pruned and latency is None:
        latency = _table_of_first(config, loaded, kinds, align, device, observer or Nobody())
    analysis = analyze(loaded.model, kinds, ignored_layers=ignored, align=align, latency=latency)
    cost = analysis.costs[target.currency] if target is not None and pruned else analysis.params_cost
    budget = (
        target.budget(cost, align, unified=METHODS[config.method].unified) if target is not None and pruned else 0.0
    )
    config = config.resolve(trained=loaded.trained, device_type=device, trained_by=loaded.optimizer)
    per_epoch = max(1, len(data.train) // config.batch_size)
    epochs = {
        "dense": config.epochs_dense or 0,
        "search": config.epochs_search,
        "retrain": config.epochs_retrain,
    }
    steps = {stage: count_steps(n, per_epoch) for stage, n in epochs.items() if config.has(stage) and n}
    equal = equal_sparsity(analysis.structures, config.sparsity_attn)
    config = config.model_copy(
        update={
            "sparsity_mlp": equal.get("mlp", 0.0) if config.sparsity_mlp is None else config.sparsity_mlp,
            "rank_batches": min(config.rank_batches, per_epoch),
            "lr_mask": config.lr_mask or 2 / steps.get("search", 2),
            "align": ",".join(f"{kind}={n}" for kind, n in align.items()) or "none",
        }
    )
    guess = _uniform_keep(analysis.structures, cost, budget)
    in_params = cost.currency == "params"
    plan = Plan(
        given=given,
        config=config,
        loaded=loaded,
        data=data,
        analysis=analysis,
        target=target,
        kinds=kinds,
        align=align,
        latency=latency,
        left=cost.dense - budget,
        params_after=analysis.params - math.ceil(budget if in_params else analysis.params_cost.removed(guess)),
        macs_before=count_macs(loaded.model),
        macs_after=count_macs(slim(loaded.model, guess)),
        steps=steps,
    )
    if config.has("search") and not config.one_shot:
        make_search(plan, loaded.model).detach()  # refuses what contradicts itself while nothing is lost yet
    return plan


def make_search(plan: Plan, model: nn.Module) -> Search:
    """The search that `plan` asks for, on `model`. Raises UpopError for options that contradict each other."""
    c = plan.config
    return Search(
        model,
        target=plan.target,
        steps=plan.steps["search"],
        structures=plan.kinds,
        ignored_layers=c.ignored_layers,
        align=plan.align,
        latency=plan.latency,
        method=c.method,
        shrink=c.shrink,
        schedule=c.schedule,
        interval=c.interval,
        normalise=c.normalise or "zscore",
        gradient_order=c.gradient_order,
        sparsity=equal_sparsity(plan.analysis.structures, c.sparsity_attn)
        | ({"mlp": c.sparsity_mlp or 0.0} if "mlp" in plan.kinds else {}),
        threshold=c.threshold,
        max_drop=c.max_drop,
        tolerance=c.tolerance,
        checks=c.checks,
        seed=c.seed,
    )


def _table_of_first(
    config: PruneConfig,
    loaded: LoadedModel,
    kinds: Sequence[str],
    align: Mapping[str, int],
    device: str,
    observer: Observer,
) -> LatencyTable:
    """What the first process measures: all decide by the same clock, on a machine that the others leave alone."""
    found: list[LatencyTable] = []
    processes.by_first(lambda: found.append(_measure_table(config, loaded, kinds, align, device, observer)))
    text = processes.text_from_first(json.dumps(found[0].to_dict()) if found else "")
    return found[0] if found else LatencyTable.from_dict(json.loads(text))


def _measure_table(
    config: PruneConfig,
    loaded: LoadedModel,
    kinds: Sequence[str],
    align: Mapping[str, int],
    device: str,
    observer: Observer,
) -> LatencyTable:
    what = f"{config.latency_runtime}, {config.latency_dtype}, batch {config.latency_batch}"
    observer.stage("latency", f"measure the time at some widths: {what}")
    return measure_latency_table(
        loaded.model.to(device),
        batch=config.latency_batch,
        image_size=loaded.image_size,
        runtime=config.latency_runtime,
        dtype=config.latency_dtype,
        structures=kinds,
        align=align,
        seconds=4 * config.latency_seconds,
    )


def _alignment(config: PruneConfig, model: nn.Module, kinds: Sequence[str], device: str) -> dict[str, int]:
    """The multiples that were asked for; by device, those that were measured to matter, halved while too coarse.

    Too coarse is what no target could be met with, or this one not: floors of one multiple forbid high ratios.
    """
    if config.align != "auto":
        wanted = {} if config.align == "none" else parse_align(config.align)
        structures = find_structures(model, kinds)
        known = dict.fromkeys(s.kind for s in structures)  # of a model slimmed over qk and v these, whatever was said
        for kind in wanted:
            if kind not in known:
                raise UpopError(f"align: expected kinds among structures = {','.join(known)}, got {kind!r}")
            widest = max(s.width for s in structures if s.kind == kind)
            if wanted[kind] >= widest > 1:
                raise UpopError(
                    f"align: {kind}={wanted[kind]}: expected less than the {widest} units that a layer has, or none "
                    f"of them could go; leave {kind} out of structures where that is meant"
                )
        return check_alignment(wanted)
    if (device == "cpu" and config.latency_dtype == "float32") or config.threshold is not None:
        return {}
    # Matrix units work on tiles; a CPU's are narrow enough for hidden neurons not to matter.
    tiles = dict.fromkeys(("attn", "dims", "qk", "v"), 8) | ({"mlp": 64} if device != "cpu" else {})
    structures = find_structures(model, kinds, config.ignored_layers)
    cost = params_cost(model, structures)
    align: dict[str, int] = {}
    for s in structures:
        each = min(tiles.get(s.kind, 1), s.width)
        while each > 1 and group_price(s, cost, {s.kind: each}) > 0.5 * TOLERANCE * cost.dense:
            each //= 2
        align[s.kind] = min(each, align.get(s.kind, each))
    align = check_alignment(align)
    # The table of a target in latency is measured for one alignment, and so comes after it.
    target = None if config.open_ended else Target.parse(config.target)
    if target is None or target.unit == "latency":
        return align
    cost = find_cost(model, structures, target.currency)
    while align and not _can_be_met(target, cost, align, unified=METHODS[config.method].unified):
        align = check_alignment({kind: each // 2 for kind, each in align.items()})
    return align


def _can_be_met(target: Target, cost: Cost, align: Mapping[str, int], *, unified: bool) -> bool:
    with contextlib.suppress(TargetError):
        target.budget(cost, align, unified=unified)
        return True
    return False


def read_data(config: PruneConfig, loaded: LoadedModel) -> ImageData:
    """The data of a run. The split is the same for every seed: seeds vary training, not what it is judged on."""
    held_out = config.validation
    return load_data(
        config.data,
        validation=int(held_out) if held_out is not None and held_out >= 1 else held_out,
        seed=0,
        skip_bad=config.skip_bad,
        image_size=loaded.image_size,
        shorter_side=loaded.shorter_side,
        subset=config.subset,
    )


def device_type(wanted: str) -> str:
    """`cpu` or `cuda` for `auto`, `cpu` or `cuda`; raises UpopError for a GPU that is not there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UpopError(f"device: expected auto, cpu or cuda, got {wanted!r}")
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


def _uniform_keep(structures: Sequence[Structure], cost: Cost, budget: float) -> dict[str, Tensor]:
    """A keep that reaches `budget` with all dims and neurons narrowed alike, heads and blocks left whole."""

    def keep(ratio: float) -> dict[str, Tensor]:
        return {
            s.name: (torch.arange(s.width) < max(s.floor, 1, round(s.width * (1 - ratio)))).repeat(s.lanes)
            if s.kind not in ("head", "block")
            else torch.ones(s.units, dtype=torch.bool)
            for s in structures
        }

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if cost.removed(keep(middle)) >= budget else (middle, high)
    return keep(high if budget > 0 else 0.0)


def make_accelerator(config: PruneConfig) -> Accelerator:
    """Accelerate for a resolved configuration. Raises UpopError for a tracker that cannot be used."""
    # Accelerate keeps its settings per process; a second run may want others.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            cpu=config.device == "cpu",
            log_with=list(parse_trackers(config.tracker)) or None,
            project_dir=config.out,
        )
    except (ValueError, ImportError) as error:
        raise UpopError(f"Accelerate cannot be set up ({error})") from error


def make_augment(c: PruneConfig) -> Augment:
    """What happens to training images."""
    return Augment(
        flip=c.flip,
        crop=c.crop,
        mixup=c.mixup,
        cutmix=c.cutmix,
        erasing=c.erasing,
        color=c.color,
        randaugment=c.randaugment,
    )


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
        rank=processes.index(),
        world=processes.count(),
        workers=config.workers,
    )


def set_attention(model: Any, kernel: str = "sdpa") -> None:
    """Choose the attention kernel of a Hugging Face model; saved folders do not remember it, and load with sdpa."""
    model.set_attn_implementation(kernel)
