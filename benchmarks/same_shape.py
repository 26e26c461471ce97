"""Is it the shape that pruning found, or the weights that it kept?

Builds the model that a pruning run left, as many units in each layer, with random weights in place of those that were
kept, for training it from scratch:

    python benchmarks/same_shape.py results/retrain-long/upop_params0.8_s0.json \\
        --model deit-tiny-cifar-6layers-patch8 --out runs/same-shape
    upop prune --model runs/same-shape --data data/cifar10 --stages dense ... --out runs/same-shape-trained

`--model` is the built-in shape that the run's dense model had.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import upop
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.models import fit_head_, load_model, save_image_processor
from upop.reading import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="result.json of a pruning run")
    parser.add_argument("--model", required=True, help="built-in shape of the dense model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    try:
        same_shape(args.result, args.model, args.out, seed=args.seed)
    except UpopError as error:
        parser.error(str(error))


def same_shape(result: Path, name: str, out: Path, *, seed: int = 0) -> None:
    """Write to `out` the model that `result` is of, with random weights, its image processor beside it.

    Raises UpopError where the built-in shape `name` is not what that run pruned.
    """
    found = read_json(result)
    loaded = load_model(name, seed=seed)
    fit_head_(loaded.model, tuple(found["data"]["classes"]), name=name, replace=True, seed=seed)
    small = cut(loaded.model, found["widths"]["after"])
    params = sum(parameter.numel() for parameter in small.parameters())
    if params != found["params"]["after"]:
        raise ModelError(f"{name}: expected {found['params']['after']:,} parameters as in {result}, got {params:,}")
    upop.save_pretrained(small, out)
    save_image_processor(out, loaded)


def cut(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> nn.Module:
    """`model` with the first units of each layer, as many as `widths` says: kind -> units in a lane, one a layer.

    Weights are drawn alike for any width here, so that those left are as if drawn for the smaller one.
    """
    structures = find_structures(model, tuple(widths))
    if {kind: len(layers) for kind, layers in widths.items()} != {
        kind: sum(s.kind == kind for s in structures) for kind in widths
    }:
        raise ModelError("expected the shape whose layers the result has; see its config.json")
    wanted = {kind: iter(layers) for kind, layers in widths.items()}
    keep = {s.name: (torch.arange(s.units) % s.width) < next(wanted[s.kind]) for s in structures}
    return upop.slim(model, keep)


if __name__ == "__main__":
    main()
