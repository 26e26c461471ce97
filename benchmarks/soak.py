"""Does a run survive being killed, over and over? SIGKILL at random moments of all stages, for a stated time.

A small run is done once undisturbed. Then the same run is begun again and again, killed at a random moment, taken up,
killed again, until it is complete; its result must then be that of the undisturbed run, bit for bit. After every kill
the folder is looked at: checkpoints must be whole, a result must only be there if the run is complete, and then no
file may be left that a write has not finished. Last, a long search in one process: memory and open files must stay
flat.

    nice -n 19 python benchmarks/soak.py --minutes 60 --json benchmarks/results/soak.json

Attempts are forked from one process that has imported everything: each is what `upop prune --go-on` does, without the
seconds that imports take.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from common import provenance

from upop import Search, Target, checkpoint
from upop.cli.show import quiet_libraries
from upop.config import make_config
from upop.errors import UpopError
from upop.models import load_model
from upop.run import prune

OPTIONS = {
    "model": "deit-digits",
    "data": "digits",
    "epochs_dense": 1,
    "epochs_search": 1.5,
    "epochs_retrain": 1,
    "batch_size": 64,
    "subset": 384,
    "flip": False,
    "threads": 1,
    "device": "cpu",
    "latency_seconds": 0.02,
    "checkpoint_minutes": 1e-9,  # before every step
}
# What must not depend on kills.
NUMBERS = ("weights", "accuracy", "loss", "widths", "gap", "ratio", "trajectory", "params", "macs", "training")
SEARCH_STEPS = 3000
KEPT = {"model", "dense", "slim", "result.json", "config.toml", "metrics.jsonl", "log", "trace.npz", "widths.png"} | {
    "stages.png",
    ".upop-run",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kills", type=int, help="end after so many kills, if that comes first")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where runs are (a temporary folder); kept where there is a fault")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="upop-soak-"))
    found = soak(folder, minutes=args.minutes, kills=args.kills, seed=args.seed)
    found["search"] = long_search(SEARCH_STEPS)
    for key, value in found.items():
        print(f"{key}: {value}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(provenance() | found, indent=1) + "\n")
    sys.exit(1 if found["violations"] else 0)


def soak(folder: Path, *, minutes: float, kills: int | None, seed: int, **options: object) -> dict[str, object]:
    """Kill and take up runs of OPTIONS and `options` below `folder`; returns counts, and what went wrong in words."""
    draw = random.Random(seed)
    began = time.monotonic()
    # In this process: what it imports and reads on the way, none of the attempts has to.
    prune(make_config({**OPTIONS, **options, "out": str(folder / "whole")}))
    wanted, events, violations = numbers(folder / "whole"), written(folder / "whole"), []
    killed: collections.Counter[str] = collections.Counter()
    complete = 0
    while time.monotonic() - began < 60 * minutes and (kills is None or killed.total() < kills):
        out = folder / f"run-{complete}"
        while not (out / "result.json").exists() or (out / "checkpoints").exists():
            # A few or many lines of the log ahead, so that a busy machine changes nothing, and then anywhere between
            # two of them. Each attempt may come to the end, wherever it begins: else a run would never be complete.
            ahead = draw.randint(0, draw.choice((2, events // 3, events)))
            stage = attempt(out, ahead, draw.uniform(0, draw.choice((0.1, 1.0))), options)
            if stage is not None:
                killed[stage] += 1
                violations += [f"{out.name} after kill {killed.total()} in {stage}: {w}" for w in faults(out)]
        complete += 1
        violations += [f"{out.name}, complete: {w}" for w in faults(out)]
        if numbers(out) != wanted:
            violations.append(f"{out.name}: another result than the undisturbed run")
        print(f"{killed.total()} kills, {complete} runs, {len(violations)} violations", flush=True)
    return {
        "kills": killed.total(),
        "kills_per_stage": dict(killed),
        "runs_complete": complete,
        "violations": violations,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def attempt(out: Path, events: int, seconds: float, options: Mapping[str, object]) -> str | None:
    """Begin or take up the run in `out`, and kill it `seconds` after it has written `events` more lines into its log.

    Returns the stage in which it was killed, None where it has come to its end.
    """
    events += written(out)
    child = os.fork()
    if child == 0:
        os.setsid()  # what it starts is killed with it
        with contextlib.suppress(BaseException):
            prune(make_config({**OPTIONS, **options, "out": str(out)}), go_on=True)
            os._exit(0)
        os._exit(1)
    deadline = None
    while True:
        if deadline is None and written(out) >= events:
            deadline = time.monotonic() + seconds
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"{out}: the run ended with status {status}; see {out / 'log'}")
            return None
        if deadline is not None and time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):  # it has not got as far as to have a group
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return stage_of(out) if os.WIFSIGNALED(status) else None
        time.sleep(0.002)


def written(out: Path) -> int:
    """Lines of a run's log."""
    try:
        return (out / "log").read_bytes().count(b"\n")
    except OSError:
        return 0


def stage_of(out: Path) -> str:
    """Where the log says that a run was."""
    found = "start"
    with contextlib.suppress(OSError):
        for line in (out / "log").read_text(encoding="utf-8").splitlines():
            words = line.partition(" INFO upop.")[2].partition(": ")[2]
            name = words.partition(":")[0]
            if name in ("dense", "search", "retrain"):
                found = name
            elif words.startswith("checkpoint"):
                found = words.rpartition(" ")[2]
    return found


def faults(out: Path) -> list[str]:
    """What a kill must never leave: an unreadable checkpoint, a result that is none, files of unfinished writes."""
    found = []
    for path in (out / "checkpoints").glob("[0-9]*"):
        try:
            checkpoint.read(path)
        except UpopError as error:
            found.append(f"unreadable checkpoint: {error}")
    if (out / "result.json").exists():
        try:
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
            found += [] if result["status"] == "complete" else ["a result that says it is not complete"]
        except (ValueError, KeyError) as error:
            found.append(f"a result that cannot be read: {error}")
    return found


def numbers(out: Path) -> tuple[object, object, bytes]:
    """Results, metrics and the trace of a complete run, less what a clock says; and what else lies in the folder."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line.pop("images_per_s")
    others = sorted({path.name for path in out.iterdir()} - KEPT)
    return {key: result[key] for key in NUMBERS} | {"left over": others}, lines, (out / "trace.npz").read_bytes()


def long_search(steps: int) -> dict[str, object]:
    """A search of many steps in this process: memory (MiB) and open files after each tenth of it."""
    model, me = load_model("deit-digits").model, psutil.Process()
    search = Search(model, target=Target(params=0.5), steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    memory, files = [], []
    for step in range(1, steps + 1):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        (loss + search.penalty()).backward()
        optimizer.step()
        search.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0:
            memory.append(round(me.memory_info().rss / 2**20, 1))
            files.append(me.num_fds())
    halves = statistics.fmean(memory[:5]), statistics.fmean(memory[5:])
    return {"steps": steps, "memory_mib": memory, "growth_mib": round(halves[1] - halves[0], 2), "open_files": files}


if __name__ == "__main__":
    main()
