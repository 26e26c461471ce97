"""Which attention kernel trains faster on this device, by number of tokens and dtype: eager or sdpa.

    python benchmarks/attention.py --json benchmarks/results/attention.json

What `attention = auto` follows (upop.config): measured on an AMD EPYC with AVX-512 bf16, eager takes 0.60 to 0.80 of
sdpa's time in bfloat16 and 0.99 to 1.07 in float32, from 17 to 197 tokens. Where other numbers come out, say so.
"""

import argparse
import json
from pathlib import Path

from common import Step, build, finetune_step, median_and_spread, take_turns, write_json

# (image size, patch of common.build) -> tokens: 17 at 16 px, 65 at 32, 145 at 48, 197 at 224.
SIZES = (16, 32, 48, 224)


def main() -> None:
    """Time a fine-tuning step with either kernel, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small")
    parser.add_argument("--images", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        for size in SIZES:
            for dtype in ("fp32", "bf16"):
                rows.append(compare(args, name, size, dtype))
                print(json.dumps(rows[-1]), flush=True)
                write_json(args, rows=rows)


def compare(args: argparse.Namespace, name: str, size: int, dtype: str) -> dict[str, object]:
    """Time of a step with eager attention as a share of that with sdpa: the median over neighbouring pairs."""
    variants: dict[str, Step] = {}
    for kernel in ("eager", "sdpa"):
        case = argparse.Namespace(
            model=name,
            image_size=size,
            batch=args.images,
            dtype=dtype,
            attention=kernel,
            device=args.device,
            compile=False,
            steps=args.steps,
            chunk=None,
        )
        variants[kernel] = finetune_step(build(case), case)
    readings = take_turns(variants, case)
    pairs = zip(readings["eager"], readings["sdpa"], strict=True)
    share, spread = median_and_spread([a.wall_ms / b.wall_ms for a, b in pairs])
    tokens = (size // (4 if size <= 64 else 16)) ** 2 + 1
    return {
        "model": name,
        "tokens": tokens,
        "dtype": dtype,
        "eager_over_sdpa": round(share, 3),
        "spread": round(spread, 3),
    }


if __name__ == "__main__":
    main()
