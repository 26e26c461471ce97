"""What is left of a trained model when units are cut in one shot, by score and by what is put back afterwards?

Validation accuracy straight after slimming, without any training. Scores and moments are of images of the training
split, as they are; seeds choose the images. On one CPU core about half an hour:

    python benchmarks/compensation.py --model runs/claims/dense/model --data data/cifar10 --bf16 --json OUT
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import get_args

from accelerate import Accelerator
from common import write_json
from torch import Tensor, nn

from upop.compensate import How, Moments, cut_and_compensate_, input_moments
from upop.data import Batches, ImageData, load_data
from upop.evaluation import evaluate
from upop.families import find_structures
from upop.models import LoadedModel, load_model
from upop.oneshot import SCORES, rank
from upop.ranking import NORMALISERS, normalise, select
from upop.slim import slim
from upop.structures import Structure, prunable_cost

Labelled = list[tuple[Tensor, Tensor]]
Cell = tuple[str, str, float, int, str]  # score, normalisation, ratio, calibration batches, compensation


def main() -> None:
    args = options()
    loaded = load_model(args.model)
    data = load_data(args.data, validation=5000, seed=0, image_size=loaded.image_size)
    judge = Judge(loaded, data, bf16=args.bf16)
    found: dict[Cell, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    dense = judge.accuracy(loaded.model)
    print(f"dense: {100 * dense:.2f} % of {len(data.validation):,} validation images")
    for batches in args.batches:
        for seed in range(args.seeds):
            images = calibration(loaded, data, batches, args.batch, seed)
            for cell, accuracy in sweep(args, loaded.model, images, seed, judge, seconds):
                found.setdefault(cell, []).append(accuracy)
            print(f"done: {batches} batches of {args.batch} images, seed {seed}", flush=True)
    show(args, found, seconds)
    write_json(
        args,
        dense_accuracy=dense,
        cpu_seconds={name: statistics.median(values) for name, values in seconds.items()},
        columns=["score", "normalise", "ratio", "batches", "compensation", "accuracies"],
        rows=[[*cell, accuracies] for cell, accuracies in found.items()],
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 0.7], help="of prunable parameters"
    )
    parser.add_argument("--scores", choices=SCORES, nargs="+", default=list(SCORES))
    parser.add_argument("--normalise", choices=NORMALISERS, nargs="+", default=["zscore", "none"])
    parser.add_argument("--batches", type=int, nargs="+", default=[16], help="calibration batches")
    parser.add_argument("--batch", type=int, default=128, help="images in a calibration batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="judge in bfloat16 autocast: a third of the time")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    return parser.parse_args()


class Judge:
    """Accuracy in [0, 1] on the validation split."""

    def __init__(self, loaded: LoadedModel, data: ImageData, *, bf16: bool) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
        self.batches = make_batches(loaded, data, train=False, batch_size=250, seed=0)

    def accuracy(self, model: nn.Module) -> float:
        return evaluate({"m": model}, self.batches, accelerator=self.accelerator, autocast=True)["m"].accuracy


def make_batches(loaded: LoadedModel, data: ImageData, *, train: bool, batch_size: int, seed: int) -> Batches:
    return Batches(
        data.train if train else data.validation,
        batch_size=batch_size,
        size=loaded.image_size,
        mean=loaded.mean,
        std=loaded.std,
        num_classes=len(data.classes),
        train=train,
        seed=seed,
    )


def calibration(loaded: LoadedModel, data: ImageData, count: int, size: int, seed: int) -> Labelled:
    """`count` batches of training images, drawn by `seed`, not augmented."""
    return list(islice(make_batches(loaded, data, train=True, batch_size=size, seed=seed), count))


@contextmanager
def timed(seconds: dict[str, list[float]], what: str) -> Iterator[None]:
    """Add the seconds that all threads of this process compute meanwhile: others' load leaves them alone."""
    began = time.process_time()
    yield
    seconds.setdefault(what, []).append(time.process_time() - began)


def sweep(
    args: argparse.Namespace,
    model: nn.Module,
    images: Labelled,
    seed: int,
    judge: Judge,
    seconds: dict[str, list[float]],
) -> Iterator[tuple[Cell, float]]:
    """Accuracy in every cell of the table, by one set of calibration images; times are added to `seconds`."""
    structures, count = find_structures(model), len(images)
    with timed(seconds, f"moments, {count} batches"):
        moments = input_moments(model, structures, (x for x, _ in images), covariance=True)
    for score in args.scores:
        with timed(seconds, f"{score}, {count} batches"):
            scores = rank(model, structures, images, score=score, seed=seed)
        for how in args.normalise:
            ranked = normalise(structures, scores, how)
            for ratio in args.ratios:
                keep = select(structures, ranked, ratio * prunable_cost(structures))
                for name, small in variants(model, structures, keep, moments):
                    yield (score, how, ratio, count, name), judge.accuracy(small)


def variants(
    model: nn.Module, structures: Sequence[Structure], keep: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> Iterator[tuple[str, nn.Module]]:
    """The slimmed model with each compensation."""
    yield "none", slim(model, keep)
    for how in get_args(How):
        work = copy.deepcopy(model)
        cut_and_compensate_(work, structures, keep, moments, how=how)
        yield how, slim(work, keep)


def show(args: argparse.Namespace, found: dict[Cell, list[float]], seconds: dict[str, list[float]]) -> None:
    for batches in args.batches:
        print(f"\nvalidation accuracy in %, mean +- standard deviation of {args.seeds} seeds, {batches} batches")
        print(f"{'score':10}{'normalise':11}{'compensation':14}" + "".join(f"{ratio:>14}" for ratio in args.ratios))
        rows = dict.fromkeys((score, how, name) for score, how, _, _, name in found)
        for score, how, name in rows:
            cells = [spread(found[score, how, ratio, batches, name]) for ratio in args.ratios]
            print(f"{score:10}{how:11}{name:14}" + "".join(f"{cell:>14}" for cell in cells))
    print()
    for what, values in seconds.items():
        print(f"{what}: {statistics.median(values):.2f} s of CPU time")


def spread(accuracies: list[float]) -> str:
    percent = [100 * value for value in accuracies]
    return f"{statistics.mean(percent):.1f} +- {statistics.stdev(percent) if len(percent) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
