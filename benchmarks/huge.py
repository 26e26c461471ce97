"""Analyse and slim a ViT-Huge shape (632 M parameters, random weights): seconds and peak memory.

    python benchmarks/huge.py --json benchmarks/results/huge.json

Measured when checked in: see benchmarks/results/huge.json. Aim: under 30 s on two cores, and a peak of at most 2.2
times the model's memory.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from common import write_json
from transformers import ViTConfig, ViTForImageClassification

import upop
from upop.costs import params_cost
from upop.families import find_structures
from upop.profiling import count_params
from upop.ranking import select


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    parser.add_argument("--removed", type=float, default=0.5, help="fraction of all parameters")
    parser.add_argument("--structures", default="attn,mlp")
    args = parser.parse_args()
    config = ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
    )
    # What the libraries take by themselves is not the model's.
    upop.analyze(ViTForImageClassification(ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)))
    libraries = peak_bytes()
    model = ViTForImageClassification(config).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = peak_bytes()
    began = time.perf_counter()
    analysis = upop.analyze(model, args.structures.split(","))
    analysed = time.perf_counter()
    structures = find_structures(model, args.structures.split(","))
    cost = params_cost(model, structures)
    scores = {s.name: torch.randn(s.units) for s in structures}
    keep = select(structures, scores, args.removed * cost.dense, cost=cost)
    ranked = time.perf_counter()
    small = upop.slim(model, keep)
    slimmed = time.perf_counter()
    result = {
        "params": {"before": analysis.params, "after": count_params(small)},
        "structures": args.structures,
        "seconds": {"analyse": analysed - began, "rank": ranked - analysed, "slim": slimmed - ranked},
        "model_bytes": weights,
        "peak_ratio": (peak_bytes() - libraries) / weights,
        "peak_ratio_before_slimming": (loaded - libraries) / weights,
    }
    write_json(args, **result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
