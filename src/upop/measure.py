"""What a run measures of its models: accuracy, size, latency, and that slimming changed nothing.

Must not train, and writes nothing.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop import processes
from upop.config import PruneConfig, given_values
from upop.data import Batches, Split
from upop.errors import UpopError
from upop.evaluation import Score, evaluate
from upop.families import find_structures
from upop.folder import recorded
from upop.memory import in_parts, left_out
from upop.models import fit_head_, load_model
from upop.plan import Plan, device_type, make_accelerator, make_batches, read_data, set_attention
from upop.profiling import compare_latency, count_macs, count_params, time_in_turns
from upop.runtimes import make_runner
from upop.structures import widths
from upop.targets import MEASURED_LATENCY

LATENCY_BATCHES = (1, 64)


def origin(plan: Plan) -> dict[str, Any]:
    """What a result says of where it came from: code, start, configuration, data."""
    identity = plan.identity()
    return {
        "code": identity["code"],
        "start": identity["start"],
        "given": given_values(plan.given),
        "config": plan.config.model_dump(),
        "structures": plan.kinds,
        "align": dict(plan.align),
        "data": plan.data.facts(),
        "images": {"size": plan.loaded.image_size, "mean": plan.loaded.mean, "std": plan.loaded.std},
    }


def plain_batches(plan: Plan, split: Split, accelerator: Accelerator) -> Batches:
    """Batches of `split` as they are, for looking at a model."""
    return make_batches(split, plan.config, plan.loaded, accelerator, classes=len(plan.data.classes))


def measure_scores(
    plan: Plan, accelerator: Accelerator, models: Mapping[str, nn.Module], *, masked: Mapping[str, Any]
) -> dict[str, Any]:
    """`accuracy` and `loss` per stage and split, with `warnings` to read first. Reads the test split, once.

    A dense model that a run has made and measured on the same data is not measured again. `masked` is what
    `measure_masked` found at the end of the search.
    """
    data = plan.data
    known = {} if plan.config.has("dense") else recorded(Path(plan.config.model), data.facts())
    splits = {"validation": data.validation} | ({"test": data.test} if data.test is not None else {})
    scores: dict[str, dict[str, Score]] = {}
    for name, split in splits.items():
        todo = {stage: model for stage, model in models.items() if stage != "dense" or name not in known}
        found = evaluate(todo, plain_batches(plan, split, accelerator), accelerator=accelerator)
        before = {} if name not in known else {"dense": Score(**known[name], images=len(split))}
        scores[name] = before | found
    stages = {stage: {split: found[stage] for split, found in scores.items() if stage in found} for stage in models}
    accuracy = {stage: {split: score.accuracy for split, score in found.items()} for stage, found in stages.items()}
    loss = {stage: {split: score.loss for split, score in found.items()} for stage, found in stages.items()}
    if masked:
        accuracy = _after_dense(accuracy, {"validation": masked["accuracy"]})
        loss = _after_dense(loss, {"validation": masked["loss"]})
    return {
        "warnings": [*plan.loaded.notes, *chance_warnings(accuracy, data.validation.labels)],
        "accuracy": accuracy,
        "loss": loss,
    }


def _after_dense(found: dict[str, dict[str, float]], masked: dict[str, float]) -> dict[str, dict[str, float]]:
    """With the masked model's numbers in their place, between dense and slimmed."""
    return {"dense": found["dense"], "search": masked} | found


@torch.no_grad()
def measure_masked(plan: Plan, accelerator: Accelerator, masked: nn.Module, small: nn.Module) -> dict[str, float]:
    """Accuracy and loss of the masked model, which nobody keeps, on the validation split alone; and `gap`.

    The gap is the largest difference between masked and slimmed logits over a batch of validation images.
    """
    batches = plain_batches(plan, plan.data.validation, accelerator)
    score = evaluate({"search": masked}, batches, accelerator=accelerator)["search"]
    # The first process's share of the first batch: it is never empty, and it is the first that writes.
    [images] = [images for images, _ in itertools.islice(batches, 1)]

    def gap_in(micro: int) -> float:
        pairs: list[list[Any]] = [
            [model(pixel_values=x) for model in (masked, small)] for x in torch.split(images, micro)
        ]
        return max(float((a.logits - b.logits).abs().max()) for a, b in pairs)

    gap = in_parts(len(images), gap_in, where="evaluate")
    return {"accuracy": score.accuracy, "loss": score.loss, "gap": gap}


def measure_latency(
    plan: Plan, device: torch.device, dense: nn.Module, final: nn.Module, warnings: list[str]
) -> dict[str, Any]:
    """Batch size -> before and after, timed in turns, on the first process's device while the others wait.

    A batch that memory is short for is left out, with a warning.
    """
    if processes.index() > 0:
        return {}
    pair = _as_loaded(dense, final)
    found = {}
    for batch in LATENCY_BATCHES:
        with left_out(f"latency, batch {batch}", warnings):
            found[batch] = compare_latency(
                pair,
                batch=batch,
                image_size=plan.loaded.image_size,
                device=device,
                max_seconds=plan.config.latency_seconds,
            )
    return {str(batch): {name: asdict(value) for name, value in each.items()} for batch, each in found.items()}


def _as_loaded(dense: nn.Module, final: nn.Module) -> dict[str, nn.Module]:
    """Copies, which are not compiled, with the attention kernel that loading gives them, not that of training."""
    pair = {"before": copy.deepcopy(dense), "after": copy.deepcopy(final)}
    for model in pair.values():
        set_attention(model)
    return pair


def measure_promise(plan: Plan, dense: nn.Module, final: nn.Module, ratio: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of a target in latency: the passes that it is about, timed in turns; empty for other targets.

    `ratio` is what the search has removed: the target is but a limit to it where accuracy decides.
    """
    table = plan.latency
    if table is None or processes.index() > 0:
        return {}
    shape = (table.batch, 3, table.image_size, table.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    passes = {
        name: make_runner(model, images, runtime=table.runtime, dtype=table.dtype)
        for name, model in _as_loaded(dense, final).items()
    }
    found = time_in_turns(passes, device=next(final.parameters()).device, max_seconds=plan.config.latency_seconds)
    took = found["after"].median_ms / found["before"].median_ms
    limit = plan.config.max_drop is not None or plan.config.tolerance is not None
    wanted = 1 - ratio["latency"] if limit and ratio else plan.left / table.dense_ms
    warnings = []
    if abs(took - wanted) > MEASURED_LATENCY * wanted:
        warnings.append(
            f"latency: {took:.3f} of the dense model's time, not {wanted:.3f} as the table promised ({table}); "
            "measure again with `upop bench` on a quiet machine"
        )
    before_ms, after_ms, left = found["before"].median_ms, found["after"].median_ms, plan.target and plan.target.left
    over = after_ms - (left or after_ms)
    if left and (over if limit else abs(over)) > MEASURED_LATENCY * left:
        warnings.append(
            f"latency: {after_ms:.3g} ms, not the {left:.3g} ms asked for: the dense model takes {before_ms:.3g} ms, "
            f"and took {table.dense_ms:.3g} ms for the table ({table}); begin again on the machine that is meant"
        )
    return {
        "wanted": wanted,
        "ratio": took,
        "before_ms": before_ms,
        "after_ms": after_ms,
        "table": table.to_dict(),
        "warnings": warnings,
    }


def sizes(dense: nn.Module, final: nn.Module) -> dict[str, Any]:
    """Parameters, MACs per image and widths per layer, before and after."""
    return {
        "params": {"before": count_params(dense), "after": count_params(final)},
        "macs": {"before": count_macs(dense), "after": count_macs(final)},
        "widths": {"before": widths(find_structures(dense)), "after": widths(find_structures(final))},
    }


def chance_warnings(accuracy: Mapping[str, Mapping[str, float]], labels: Tensor) -> list[str]:
    """What a reader of the numbers must know first: models that do no better than guessing the largest class."""
    chance = float(labels.bincount().max() / len(labels))
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / len(labels))
    low = {stage: found["validation"] for stage, found in accuracy.items() if found["validation"] < limit}
    lines = []
    for stage, value in low.items():
        found = f"{stage}: validation accuracy {value:.3f}"
        if value > chance + 0.2 * (1 - chance):
            lines.append(
                f"{found} cannot be told from guessing ({chance:.3f}) with {len(labels)} images; hold out more"
            )
        elif stage == "dense":
            # What comes after a dense model that knows nothing cannot be judged.
            untrained = "the dense model is not trained, or not for these classes in this order"
            return [f"{found} is at chance ({chance:.3f}); {untrained}"]
        else:
            collapsed = "the model has collapsed: remove less, or retrain for longer"
            lines.append(f"{found} is at chance ({chance:.3f}); {collapsed}")
    return lines


def evaluate_model(config: PruneConfig, split: str) -> tuple[Score, int, int, tuple[str, ...]]:
    """Score of `config.model` on a split of `config.data`, parameters, MACs per image, and what was assumed of it.

    Raises UpopError where the model's head does not fit the data, or the data has no such split.
    """
    loaded = load_model(config.model)
    data = read_data(config, loaded)
    notes = loaded.notes + fit_head_(loaded.model, data.classes, name=config.model, replace=False)
    images = {"validation": data.validation, "test": data.test}[split]
    if images is None:
        raise UpopError(f"{config.data}: has no {split} split; use --split validation")
    config = config.resolve(trained=True, device_type=device_type(config.device))
    accelerator = make_accelerator(config)
    model = loaded.model.to(accelerator.device)
    set_attention(model, config.attention)
    batches = make_batches(images, config, loaded, accelerator, classes=len(data.classes))
    score = evaluate({"model": model}, batches, accelerator=accelerator)["model"]
    return score, count_params(model), count_macs(model), notes
