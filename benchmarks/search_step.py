"""Does a search step cost what a fine-tuning step costs? Promise: 1.10 of its time, 1.05 of its peak memory.

Both kinds of step take turns in one process; the result is the median of the ratios of neighbours in time.
On a CPU that others use too, set OMP_WAIT_POLICY=PASSIVE: else small operations wait for a time slice each.

    python benchmarks/search_step.py --model tiny --image-size 32 --batch 64 --dtype bf16 --json OUT
"""

from common import (
    build,
    finetune_step,
    median_and_spread,
    options,
    peak_mib,
    search_step,
    take_turns,
    write_json,
)

TIME_PROMISE, MEMORY_PROMISE = 1.10, 1.05


def main() -> None:
    parser = options(__doc__ or "", model="tiny", image_size=32, batch=64, steps=30, dtype="fp32")
    args = parser.parse_args()
    variants = {"plain": lambda: finetune_step(build(args), args), "search": lambda: search_step(args)}
    peaks = {name: peak_mib(make, args.device) for name, make in variants.items()}
    times_ms = take_turns({name: make() for name, make in variants.items()}, args)
    ratios = [search / plain for plain, search in zip(times_ms["plain"], times_ms["search"], strict=True)]
    ratio, spread = median_and_spread(ratios)
    memory_ratio = peaks["search"] / peaks["plain"]

    print("step    median ms  spread ms  peak MiB")
    for name, values in times_ms.items():
        median, interquartile = median_and_spread(values)
        print(f"{name:7} {median:9.1f} {interquartile:10.1f} {peaks[name]:9.1f}")
    print(f"time   x{ratio:.3f} +- {spread / 2:.3f} ({len(ratios)} pairs), promise {TIME_PROMISE}: ", end="")
    print("kept" if ratio <= TIME_PROMISE else "BROKEN")
    print(f"memory x{memory_ratio:.3f}, promise {MEMORY_PROMISE}: ", end="")
    print("kept" if memory_ratio <= MEMORY_PROMISE else "BROKEN")
    write_json(
        args,
        time_ratio=ratio,
        time_ratio_spread=spread,
        memory_ratio=memory_ratio,
        peak_mib=peaks,
        times_ms=times_ms,
    )


if __name__ == "__main__":
    main()
