"""What the step benchmarks share: models, training steps, fair timing, peak memory, provenance.

Must not know which variants are compared, and must not print.
"""

import argparse
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import upop

Step = Callable[[], None]


class Reading(NamedTuple):
    """Milliseconds of one step: by the clock, and of all this process's threads (what others' load leaves alone)."""

    wall_ms: float
    cpu_ms: float


WIDTHS = {"tiny": 192, "small": 384, "base": 768}  # DeiT; 12 blocks, heads of 64 dims
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LABELS = 10
WARM_UP_STEPS = 3


def options(description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options of every step benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=WIDTHS)
    parser.add_argument("--image-size", type=int, help="pixels; patches have 4 up to 64 pixels, else 16")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, help="timed steps of each variant")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 is autocast, the weights stay fp32")
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, help="steps between two clock readings (CPU: 1, else 10)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    parser.set_defaults(**defaults)
    return parser


def build(args: argparse.Namespace) -> nn.Module:
    """A DeiT of that size with random weights (facebook/deit-* are of transformers' class ViT), training."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTHS[args.model],
        num_attention_heads=WIDTHS[args.model] // 64,
        intermediate_size=4 * WIDTHS[args.model],
        image_size=args.image_size,
        patch_size=4 if args.image_size <= 64 else 16,
        num_labels=LABELS,
        attn_implementation=args.attention,
    )
    return ViTForImageClassification(config).to(args.device).train()


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, S, S] and labels [B]."""
    source = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, generator=source)
    labels = torch.randint(LABELS, (args.batch,), generator=source)
    return images.to(args.device), labels.to(args.device)


def finetune_step(model: nn.Module, args: argparse.Namespace, search: upop.Search | None = None) -> Step:
    """One ordinary optimizer step of `model`; with `search` attached, one step of that search as well."""
    images, labels = batch_of(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    forward = torch.compile(model) if args.compile else model
    autocast = torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.dtype == "bf16")

    def step() -> None:
        with autocast:
            logits = forward(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels)
        if search is not None:
            loss = loss + search.penalty()
        loss.backward()
        optimizer.step()
        if search is not None:
            search.step()
        optimizer.zero_grad()

    return step


def search_step(args: argparse.Namespace) -> Step:
    """A step of a search that goes through its whole schedule while it is measured."""
    model = build(args)
    steps = WARM_UP_STEPS + args.steps
    return finetune_step(model, args, upop.Search(model, target=upop.Target(prunable=0.5), steps=steps, interval=1))


def take_turns(variants: dict[str, Step], args: argparse.Namespace) -> dict[str, list[Reading]]:
    """Readings of each variant, A B B A A B B A .., with `--chunk` steps between two readings.

    Readings i of all variants are neighbours in time: compare them with each other, not with distant ones.
    """
    chunk = args.chunk or (1 if args.device == "cpu" else 10)
    for step in variants.values():
        for _ in range(WARM_UP_STEPS):
            step()
    readings: dict[str, list[Reading]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(max(1, args.steps // chunk)):
        for name in order:
            readings[name].append(_read(variants[name], chunk, args.device))
        order.reverse()
    return readings


def _read(step: Step, chunk: int, device: str) -> Reading:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(chunk):
        step()
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Reading(wall_ms=wall * 1e3 / chunk, cpu_ms=cpu * 1e3 / chunk)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(values * 2 if len(values) == 1 else values, method="inclusive")
    return middle, high - low


def peak_mib(make: Callable[[], Step], device: str) -> float:
    """Peak MiB of tensors, from before the model is built to the end of its third step."""
    gc.collect()
    torch.compiler.reset()
    if device != "cpu":
        _three_steps(make)  # libraries take their workspaces once, and keep them
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _three_steps(make)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Every allocation and release of torch's allocator: unlike the resident set, the same in every run.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        _three_steps(make)
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def _three_steps(make: Callable[[], Step]) -> None:
    step = make()
    for _ in range(3):
        step()


def provenance() -> dict[str, object]:
    """Command, commit, versions and machine of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "src", "benchmarks")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(args: argparse.Namespace, **result: object) -> None:
    """Provenance, options and result, to `--json` where it is given."""
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(provenance() | {"options": settings} | result, indent=1) + "\n")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    except FileNotFoundError:  # no git here: the numbers are worth more than their commit
        return ""
    return done.stdout.strip()
