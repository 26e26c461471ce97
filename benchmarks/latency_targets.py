"""Does `Target(latency=0.5)` land, and what do half the MACs bring in time: DeiT shapes, batches, runtimes, dtypes.

    python benchmarks/latency_targets.py --json benchmarks/results/latency-targets.json

Per case: latency tables are measured, for any widths and for aligned ones, then four models are cut and timed in
turns with the dense one: half the time and half the MACs, with any widths and with aligned ones. The units that go are
chosen by random scores that differ between layers, so that widths differ as a search leaves them; times do not depend
on which units they are. A case takes one to four minutes; what is done is kept in the JSON file, and a second call
goes on.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from common import WIDTHS, provenance
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import upop
from upop.allocator import keep_freed_memory
from upop.costs import macs_cost
from upop.errors import TargetError
from upop.families import find_structures
from upop.latency import latency_cost
from upop.profiling import count_macs, time_in_turns
from upop.ranking import select
from upop.runtimes import make_runner
from upop.structures import Structure, widths
from upop.targets import Target
from upop.timing import measure_latency_table

ALIGNED = {"attn": 8, "mlp": 32}


def main() -> None:
    """Measure all cases that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small,base")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--runtimes", default="eager/float32,eager/bfloat16,onnx/float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--structures", default="attn,mlp", help="add block to let depth help")
    parser.add_argument("--seconds", type=float, default=40.0, help="of timed passes per table, and per comparison")
    parser.add_argument("--json", type=Path, metavar="OUT", help="read what is done, and write all")
    args = parser.parse_args()
    keep_freed_memory()
    done = json.loads(args.json.read_text())["cases"] if args.json and args.json.exists() else []
    cases = itertools.product(args.models.split(","), args.batches.split(","), args.runtimes.split(","))
    for name, batch, way in cases:
        runtime, dtype = way.split("/")
        case = {"model": name, "batch": int(batch), "runtime": runtime, "dtype": dtype, "structures": args.structures}
        if any(all(row[key] == value for key, value in case.items()) for row in done):
            continue
        row = case | measure(build(name).to(args.device), args, int(batch), runtime, dtype)
        done.append(row)
        print(json.dumps(row["results"]), flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(provenance() | {"cases": done}, indent=1) + "\n")


def build(name: str) -> nn.Module:
    """A DeiT at 224 pixels with random weights."""
    torch.manual_seed(0)
    width = WIDTHS[name]
    config = ViTConfig(hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width)
    return ViTForImageClassification(config).eval()


def measure(model: nn.Module, args: argparse.Namespace, batch: int, runtime: str, dtype: str) -> dict[str, object]:
    """The table, and per way of pruning the time as a share of the dense model's, with quartiles."""
    kinds = tuple(args.structures.split(","))
    structures = find_structures(model, kinds)
    options = {"batch": batch, "image_size": 224, "runtime": runtime, "dtype": dtype, "structures": kinds}
    models, tables, refused = {"dense": model}, [], {}
    # ONNX Runtime's times have no steps at odd widths (and each export takes seconds).
    for aligned in (False, True) if runtime != "onnx" else (False,):
        align = {k: n for k, n in ALIGNED.items() if k in kinds} if aligned else {}
        table = measure_latency_table(model, seconds=args.seconds, align=align, **options)
        tables.append(table.to_dict())
        costs = {"latency": latency_cost(structures, table), "macs": macs_cost(model, structures)}
        for currency, cost in costs.items():
            target = Target(**{currency: 0.5})
            try:
                budget = target.budget(cost, align)
            except TargetError as error:
                refused[f"{currency}=0.5{' aligned' if aligned else ''}"] = str(error)
                continue
            slack = target.slack(cost, budget)
            keep = select(structures, scores(structures), budget, cost=cost, align=align, slack=slack)
            models[f"{currency}=0.5{' aligned' if aligned else ''}"] = upop.slim(model, keep)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    passes = {name: make_runner(each, images, runtime=runtime, dtype=dtype) for name, each in models.items()}
    times = time_in_turns(passes, device=args.device, min_runs=10, max_seconds=args.seconds)
    results = {}
    for name, each in models.items():
        pairs = zip(times[name].runs_ms, times["dense"].runs_ms, strict=True)
        shares = torch.tensor([a / b for a, b in pairs], dtype=torch.float64)
        low, middle, high = (float(shares.quantile(q)) for q in (0.25, 0.5, 0.75))
        results[name] = {
            "ms": times[name].median_ms,
            "share": middle,
            "quartiles": [low, high],
            "macs_share": count_macs(each) / count_macs(model),
            "widths": widths(find_structures(each)),
        }
    return {"tables": tables, "refused": refused, "runs": times["dense"].runs, "results": results}


def scores(structures: tuple[Structure, ...]) -> dict[str, Tensor]:
    """Random, with a mean of its own for each structure."""
    source = torch.Generator().manual_seed(0)
    return {
        s.name: torch.randn(s.units, generator=source) + 0.5 * torch.randn(1, generator=source) for s in structures
    }


if __name__ == "__main__":
    main()
