"""Does a search step cost what a fine-tuning step costs? Promise: 1.03 of its time, 1.02 of its peak memory.

Both kinds of step take turns in one process; the result is the median of the ratios of neighbours in time.
On a CPU that others use too, set OMP_WAIT_POLICY=PASSIVE (else small operations wait for a time slice each) and
read the ratio of CPU time: the clock's is then mostly the others'.

    python benchmarks/search_step.py --model tiny --image-size 32 --batch 64 --dtype bf16 --json OUT
"""

import statistics

from common import (
    Reading,
    build,
    finetune_step,
    median_and_spread,
    options,
    peak_mib,
    search_step,
    take_turns,
    write_json,
)

from upop.allocator import keep_freed_memory

TIME_PROMISE, MEMORY_PROMISE = 1.03, 1.02


def main() -> None:
    parser = options(__doc__ or "", model="tiny", image_size=32, batch=64, steps=30, dtype="fp32")
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    variants = {"plain": lambda: finetune_step(build(args), args), "search": lambda: search_step(args)}
    peaks = {name: peak_mib(make, args.device) for name, make in variants.items()}
    readings = take_turns({name: make() for name, make in variants.items()}, args)
    wall, cpu = (_ratio(readings, clock) for clock in ("wall_ms", "cpu_ms"))
    memory = peaks["search"] / peaks["plain"]

    print("step     wall ms   cpu ms  peak MiB   (medians)")
    for name, values in readings.items():
        wall_ms, cpu_ms = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:7} {wall_ms:8.1f} {cpu_ms:8.1f} {peaks[name]:9.1f}")
    print(f"wall   x{wall[0]:.3f} +- {wall[1] / 2:.3f}  {_verdict(wall[0], TIME_PROMISE)}")
    print(f"cpu    x{cpu[0]:.3f} +- {cpu[1] / 2:.3f}  {_verdict(cpu[0], TIME_PROMISE)}")
    print(f"memory x{memory:.3f}           {_verdict(memory, MEMORY_PROMISE)}")
    write_json(
        args,
        wall_ratio=dict(zip(("median", "interquartile_range"), wall, strict=True)),
        cpu_ratio=dict(zip(("median", "interquartile_range"), cpu, strict=True)),
        memory_ratio=memory,
        peak_mib=peaks,
        readings_ms={name: [reading._asdict() for reading in values] for name, values in readings.items()},
    )


def _ratio(readings: dict[str, list[Reading]], clock: str) -> tuple[float, float]:
    """Median and interquartile range, over pairs of neighbours, of search step / plain step."""
    pairs = zip(readings["plain"], readings["search"], strict=True)
    return median_and_spread([getattr(search, clock) / getattr(plain, clock) for plain, search in pairs])


def _verdict(value: float, promise: float) -> str:
    return f"promise {promise:.2f} {'kept' if value <= promise else 'BROKEN'}"


if __name__ == "__main__":
    main()
