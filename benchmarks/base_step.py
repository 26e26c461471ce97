"""What a GPU makes of DeiT-Base: fine-tuning, search and 50 %-pruned steps in images/s, MFU and peak memory.

MFU counts three forward passes' multiply-accumulates a step, against the matmul rate measured in this process.

    python benchmarks/base_step.py --device cuda --json OUT
"""

import statistics
import time

import torch
from common import (
    DTYPES,
    build,
    finetune_step,
    options,
    peak_mib,
    search_step,
    synchronize,
    take_turns,
    write_json,
)
from torch import nn

import upop
from upop.profiling import count_macs, count_params

FORWARD_PASSES_PER_STEP = 3  # backward costs two


def pruned(model: nn.Module) -> nn.Module:
    """Half the units of every structure, drawn at random."""
    source = torch.Generator().manual_seed(0)
    keep = {s.name: torch.randperm(s.units, generator=source) < s.units // 2 for s in upop.analyze(model).structures}
    return upop.slim(model, keep).train()


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """Best measured rate of a large square matrix product, in 1e12 floating point operations a second."""
    size, runs = (1024, 10) if device == "cpu" else (8192, 30)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(runs):
            left @ right
        synchronize(device)
        best = max(best, 2 * size**3 * runs / (time.perf_counter() - start) / 1e12)
    return best


def main() -> None:
    parser = options(__doc__ or "", model="base", image_size=224, batch=256, steps=50, dtype="bf16")
    args = parser.parse_args()
    dense = build(args)
    small = pruned(dense)
    models = {"finetune": dense, "search": dense, "pruned": small}
    macs = {name: count_macs(model) for name, model in models.items()}
    params = {name: count_params(model) for name, model in models.items()}
    del dense, small, models
    variants = {
        "finetune": lambda: finetune_step(build(args), args),
        "search": lambda: search_step(args),
        "pruned": lambda: finetune_step(pruned(build(args)), args),
    }
    peaks = {name: peak_mib(make, args.device) for name, make in variants.items()}
    matmul = matmul_tflops(args.device, DTYPES[args.dtype])
    readings = take_turns({name: make() for name, make in variants.items()}, args)

    print(f"matmul {matmul:.2f} TFLOP/s in {args.dtype}")
    print("step       ms    images/s   MFU   peak MiB   GMACs   params")
    rows = {}
    for name, values in readings.items():
        wall_ms = statistics.median(reading.wall_ms for reading in values)
        flops = 2 * FORWARD_PASSES_PER_STEP * macs[name] * args.batch
        rows[name] = {
            "wall_ms": wall_ms,
            "images_per_s": args.batch / wall_ms * 1e3,
            "mfu": flops / wall_ms * 1e3 / (matmul * 1e12),
            "peak_mib": peaks[name],
            "macs": macs[name],
            "params": params[name],
        }
        print(
            f"{name:8} {wall_ms:7.1f} {rows[name]['images_per_s']:9.0f} {rows[name]['mfu']:6.1%}"
            f" {peaks[name]:9.0f} {macs[name] / 1e9:8.3f} {params[name]:11,}"
        )
    write_json(
        args,
        matmul_tflops=matmul,
        steps=rows,
        readings_ms={name: [reading._asdict() for reading in values] for name, values in readings.items()},
    )


if __name__ == "__main__":
    main()
