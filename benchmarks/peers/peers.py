"""upop against Torch-Pruning: the same dense model, data, split, retraining and number of epochs; see README.md here.

python benchmarks/peers/peers.py --jobs 2 --threads 1 --out runs/peers
python benchmarks/peers/peers.py --report
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peer_report
import peer_runs
from filelock import FileLock, Timeout
from peer_pruners import SETTINGS
from peer_runs import UPOP, UPOP_ONCE, Job, Options

from upop.disk import write_whole
from upop.version import code_version

DEFAULT_SETTINGS = (
    *(
        UPOP,
        UPOP_ONCE,
        "magnitude",
        "taylor",
        "taylor-isomorphic",
        "taylor-round8",
        "taylor-embed",
    ),
)
SMOKE: dict[str, Any] = {
    "out": Path("runs/peers-smoke"),
    "ratios": [0.8],
    "seeds": [0],
    "settings": [UPOP, UPOP_ONCE, "taylor"],
    "subset": 512,
    "rates": [1e-3, 2e-3],
    "latency_seconds": 0.05,
}
HOW_TO_TRAIN = (
    "upop prune --model deit-tiny-cifar-6layers-patch8 --data data/cifar10 --stages dense --epochs-dense 36 "
    "--batch-size 256 --lr 0.02 --mixup 0.2 --out runs/claims/dense"
)


def main() -> int:
    args = _arguments()
    options = _options(args)
    if args.do is not None:
        job = Job(**json.loads(args.do))
        _write(args.out, job.label, peer_runs.carry_out(job, options))
        return 0
    if not args.report and (problem := _problem(args) or _alone(args, options)) is not None:
        print(problem, file=sys.stderr)
        return 1
    text = peer_report.report(peer_report.read(args.out))
    write_whole(args.out / "report.md", text)
    print(text if args.report else f"report in {args.out / 'report.md'}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="folder for the results")
    parser.add_argument("--dense", default="runs/claims/dense/model", help="the dense model's folder")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--settings", nargs="+", choices=peer_runs.SETTINGS, default=list(DEFAULT_SETTINGS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9], help="of ALL parameters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1.0, help="in all; upop searches for a part of them")
    parser.add_argument("--search-share", type=float, default=Options("", "").search_share, help="that part")
    parser.add_argument("--optimizer", choices=peer_runs.LR_SEARCH, default=Options("", "").optimizer)
    parser.add_argument("--rates", nargs="+", type=float, help="to choose from; each optimizer has its own")
    parser.add_argument("--subset", type=int, help="use only so many images of each split")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Options("", "").device)
    parser.add_argument("--latency-seconds", type=float, default=0.5, help="per batch size")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run; results depend on it")
    parser.add_argument("--any-code", action="store_true", help="results of other versions of upop's code count too")
    parser.add_argument("--smoke", action="store_true", help="a tiny comparison, in less than a minute")
    parser.add_argument("--report", action="store_true", help="only write and print the report of what there is")
    parser.add_argument("--do", help=argparse.SUPPRESS)  # one job, in the process started for it
    given = parser.parse_args()
    if given.smoke:
        # What is given on the command line still holds: the second parse starts from other defaults.
        parser.set_defaults(**SMOKE)
        given = parser.parse_args()
    return given


def _options(args: argparse.Namespace) -> Options:
    return Options(
        dense=args.dense,
        data=args.data,
        epochs=args.epochs,
        search_share=args.search_share,
        optimizer=args.optimizer,
        rates=tuple(args.rates or peer_runs.RATES[args.optimizer]),
        subset=args.subset,
        threads=args.threads,
        latency_seconds=args.latency_seconds,
        device=args.device,
    )


def _problem(args: argparse.Namespace) -> str | None:
    """Why this cannot be done, in one line, or None."""
    if not (Path(args.dense) / "config.json").exists():
        return f"--dense {args.dense}: no model there; train it with: {HOW_TO_TRAIN}"
    if any(setting in SETTINGS for setting in args.settings):
        try:
            import torch_pruning  # noqa: F401
        except ImportError:
            return 'Torch-Pruning is not installed: python -m pip install "upop[peers]"'
    return None


def _alone(args: argparse.Namespace, options: Options) -> str | None:
    """Do everything, as the only process in the folder; what went wrong in one line, or None."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock = args.out / ".lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                if (problem := _others(args, options)) is not None:
                    return problem
                failed = _do_all(args, options)
            finally:
                lock.unlink(missing_ok=True)  # the folder is checked in
    except Timeout:
        return f"{args.out}: another process works there; wait for it, or choose another --out"
    return f"{failed} failed; a second call tries them again" if failed else None


def _others(args: argparse.Namespace, options: Options) -> str | None:
    """Why runs with these options would not belong beside those in the folder, or would take their place; or None."""
    wanted = asdict(options) | {"data": Path(options.data).name}
    for path in sorted(args.out.glob("*_s[0-9]*.json")):
        spec = {"device": Options.device} | _load(args.out, path.stem).get("spec", {})
        setting = spec.get("setting")
        # Of a setting that is not asked for, how it worked is nobody's business.
        wanted["how"] = peer_runs.how(setting) if setting in args.settings else spec.get("how")
        for key in ("data", "epochs", "optimizer", "subset", "threads", "device", "how"):
            if key in spec and spec[key] != wanted[key]:
                return f"{path}: {key} {spec[key]} there, {wanted[key]} wanted; choose another --out"
    return None


def _do_all(args: argparse.Namespace, options: Options) -> int:
    """Do what is not done yet, choices of learning rates first; returns how many jobs failed."""
    dense, start = _load(args.out, "dense"), peer_runs.weights_hash(Path(args.dense))
    if (dense.get("start"), dense.get("subset")) != (start, options.subset):
        _write(args.out, "dense", peer_runs.measure_dense(options))
    choices = list(dict.fromkeys(peer_runs.choice_of(setting) for setting in args.settings))
    began, failed = time.monotonic(), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        # Jobs start in this order: a run that waits for its choice waits for one that has begun.
        chosen = {job.setting: pool.submit(_do, job, args, options) for job in choices}
        futures = [pool.submit(_run, *which, chosen, args, options) for which in _wanted(args)]
        every = [*chosen.values(), *futures]
        try:
            for done, future in enumerate(as_completed(every), 1):
                line, ok = _line(future)
                failed += not ok
                print(f"[{done}/{len(every)}, {(time.monotonic() - began) / 60:.1f} min] {line}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _wanted(args: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Setting, ratio and seed of every run, seed by seed: whoever stops early has whole columns."""
    for seed in args.seeds:
        for setting in args.settings:
            for ratio in args.ratios:
                yield setting, ratio, seed


def _run(
    setting: str,
    ratio: float,
    seed: int,
    chosen: dict[str, "Future[dict[str, Any]]"],
    args: argparse.Namespace,
    options: Options,
) -> dict[str, Any]:
    rate = chosen[peer_runs.rate_setting(setting)].result()["rate"]
    return _do(Job(setting, ratio, seed, rate), args, options)


def _do(job: Job, args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """The job's result: the one on disk where it counts, else from a process of its own."""
    if (found := _done(job, args, options)) is not None:
        return found | {"label": f"{job.label} (was done)"}
    command = [sys.executable, __file__, "--do", json.dumps(asdict(job)), "--out", str(args.out)]
    command += ["--dense", options.dense, "--data", options.data, "--epochs", str(options.epochs)]
    command += ["--search-share", str(options.search_share), "--optimizer", options.optimizer]
    command += ["--rates", *map(str, options.rates), "--threads", str(options.threads)]
    command += ["--latency-seconds", str(options.latency_seconds), "--device", options.device]
    command += ["--subset", str(options.subset)] if options.subset else []
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = _done(job, args, options)
    if ended.returncode or found is None:
        raise RuntimeError(f"{job.label}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return found | {"label": job.label}


def _done(job: Job, args: argparse.Namespace, options: Options) -> dict[str, Any] | None:
    found = _load(args.out, job.label)
    same_code = args.any_code or found.get("code") == code_version()
    return found if found.get("spec") == peer_runs.spec(job, options) and same_code else None


def _load(out: Path, name: str) -> dict[str, Any]:
    """A result on disk; empty where there is none, or a broken one."""
    try:
        found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(out: Path, name: str, result: dict[str, Any]) -> None:
    write_whole(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def _line(future: "Future[dict[str, Any]]") -> tuple[str, bool]:
    """How a job ended, for the terminal."""
    try:
        found = future.result()
    except Exception as error:
        return f"FAILED {error}", False
    if "rate" in found:
        return f"{found['label']}: learning rate {found['rate']:g} of {found['validation']}", True
    if found["status"] != "complete":
        return f"{found['label']}: {found['status']}, nearest {found['removed']:.3f}", True
    accuracy = found["accuracy"]
    return (
        f"{found['label']}: removed {found['removed']:.3f}, validation {accuracy['pruned']['validation']:.4f} -> "
        f"{accuracy['retrained']['validation']:.4f}, {found['wall_seconds']:.0f} s"
    ), True


if __name__ == "__main__":
    sys.exit(main())
