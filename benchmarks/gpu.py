"""What waits for a GPU (GPU-TODO.md), in the order of its worth, as much as fits into the minutes given.

    python benchmarks/gpu.py --data data/cifar10 --minutes 25      a second call goes on where the first had to stop
    python benchmarks/gpu.py --list

Every step is one command. What to check in ends up in `--out`: small JSON, and what it was made with in done.json. A
step that is not done when its time is up is asked to stop, and begun again by the next call: trainings and studies go
on where they were, benchmarks of a few minutes start anew.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, "src")  # where upop is not installed: only its dependencies are then needed
from common import provenance

OWN = ("full", "base", "scratch", "dense-small")  # what the steps leave below --runs
END_S = 60.0  # from asking a step to stop to ending it: a study's runs write their checkpoints
LEAST_S = 60.0  # no step is begun with less time left


@dataclass(frozen=True)
class Step:
    """A command, and the minutes after which it gives way to the next."""

    name: str
    command: str
    minutes: float

    def words(self, args: argparse.Namespace) -> list[str]:
        """The command as this interpreter runs it."""
        given = {"data": args.data, "runs": args.runs, "out": args.out, "device": args.device}
        places = {name: shlex.quote(str(value)) for name, value in given.items()}
        places["common"] = "--data {data} --device {device} --overwrite --go-on".format(**places)
        program, *rest = shlex.split(self.command.format(**places))
        first = {"upop": [sys.executable, "-m", "upop"], "python": [sys.executable]}
        return [*first[program], *rest]


TINY = " ".join(
    "{runs}/full/" + run for run in ("dense/model", *(f"upop_params{r}_s0/model" for r in (0.5, 0.8, 0.9)))
)

# The dense model and a table's worth of runs first: eight at a time, since one alone leaves most of a GPU idle.
STEPS = (
    # Its latencies are measured beside each other: those of bench-tiny count.
    Step(
        "full",
        "upop study full --data {data} --out {runs}/full --executor processes --workers 8 --threads 2 --retry-failed",
        600,
    ),
    Step("base", "upop prune --config configs/deit-base-224.toml --model deit-base {common} --out {runs}/base", 10),
    Step("base-step", "python benchmarks/base_step.py --device {device} --json {out}/base-step.json", 3),
    Step(
        "base-step-compiled",
        "python benchmarks/base_step.py --device {device} --compile --json {out}/base-step-compiled.json",
        4,
    ),
    Step(
        "search-step-tiny",
        "python benchmarks/search_step.py --model tiny --image-size 32 --batch 512 --dtype bf16 --device {device} "
        "--steps 200 --json {out}/search-step-tiny.json",
        3,
    ),
    Step(
        "search-step-tiny-compiled",
        "python benchmarks/search_step.py --model tiny --image-size 32 --batch 512 --dtype bf16 --device {device} "
        "--steps 200 --compile --json {out}/search-step-tiny-compiled.json",
        4,
    ),
    Step(
        "search-step-base",
        "python benchmarks/search_step.py --model base --image-size 224 --batch 256 --dtype bf16 --device {device} "
        "--steps 200 --json {out}/search-step-base.json",
        4,
    ),
    Step(
        "bench-tiny",
        f"upop bench {TINY} --device {{device}} --runtimes eager --seconds 2 --overwrite --out {{out}}/bench-tiny",
        8,
    ),
    # Of a few batches: compiling takes longer than measuring.
    Step(
        "bench-tiny-compiled",
        f"upop bench {TINY} --device {{device}} --runtimes compile --batches 1,64,1024 --seconds 2 --overwrite "
        "--out {out}/bench-tiny-compiled",
        15,
    ),
    Step(
        "bench-base",
        "upop bench {runs}/base/dense {runs}/base/model --device {device} --runtimes eager,compile --batches 1,64,256 "
        "--seconds 2 --overwrite --out {out}/bench-base",
        10,
    ),
    # Dense models as small as what pruning leaves, from scratch, for as many epochs as pruning and what came before.
    *(
        Step(
            f"scratch-{width}",
            f"upop prune --config configs/deit-tiny-cifar10.toml --model deit-tiny-cifar-width{width} "
            f"--epochs-dense 330 {{common}} --out {{runs}}/scratch/{width}",
            15,
        )
        for width in (60, 84, 135)
    ),
    Step("dense-small", "upop prune --config configs/deit-small-cifar10.toml {common} --out {runs}/dense-small", 30),
    Step(
        "attention",
        "python benchmarks/attention.py --device {device} --images 512 --steps 100 --json {out}/attention.json",
        6,
    ),
    Step(
        "latency-targets",
        "python benchmarks/latency_targets.py --device {device} --batches 1,8,256 --runtimes "
        "eager/float32,eager/bfloat16,compile/bfloat16 --json {out}/latency-targets.json",
        60,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0, help="in all")
    parser.add_argument("--data", default="cifar10", help="a folder in the Hub's layout, or the Hub's name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="models and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="results, to be checked in")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS])
    parser.add_argument("--list", action="store_true", help="print the commands and what is done, and stop")
    args = parser.parse_args()
    done_file = args.out / "done.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    steps = [step for step in STEPS if args.only is None or step.name in args.only]
    if args.list:
        for step in steps:
            print(f"{'done ' if step.name in done else 'to do'} {step.name}: {shlex.join(step.words(args)[1:])}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    for step in steps:
        left = until - END_S - time.monotonic()
        if step.name in done or left < LEAST_S:
            continue
        began = time.monotonic()
        code = carry_out(step, args, min(left, 60 * step.minutes))
        seconds = time.monotonic() - began
        print(f"{step.name}: {'done' if code == 0 else f'not done (exit {code})'} after {seconds:.0f} s", flush=True)
        bring_home(args.runs, args.out)
        if code == 0:
            done[step.name] = provenance() | {"command": shlex.join(step.words(args)[1:]), "seconds": round(seconds)}
            done_file.write_text(json.dumps(done, indent=1) + "\n")
    missing = [step.name for step in steps if step.name not in done]
    print(f"to do: {', '.join(missing)}" if missing else "nothing left to do")
    return bool(missing)


def bring_home(runs: Path, out: Path) -> None:
    """Copy every result of the steps to the same place below `out`: FOLDER/result.json as FOLDER.json."""
    found = [runs.glob(f"{own}/**/{name}") for own in OWN for name in ("result.json", "study.json")]
    for result in itertools.chain.from_iterable(found):
        home = out / result.parent.relative_to(runs)
        home = home.parent / f"{home.name}.json" if result.name == "result.json" else home / result.name
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(result, home)


def carry_out(step: Step, args: argparse.Namespace, seconds: float) -> int:
    """The step's exit code; its output goes to a log in the runs' folder."""
    log = args.runs / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            step.words(args),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])},
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
