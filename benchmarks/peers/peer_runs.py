"""One run of the comparison: prune the dense model in one setting, retrain, measure; or choose a learning rate.

Every run uses upop's data, split, training loop and measurements, whoever prunes. Must not print or write results.
"""

import copy
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_pruners as peers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from upop.config import PruneConfig
from upop.data import Augment, Batches
from upop.evaluation import evaluate
from upop.folder import provenance, recorded, weights_hash
from upop.models import load_model
from upop.plan import Plan, cpu_threads, make_accelerator, make_augment, make_batches, make_plan, set_attention
from upop.profiling import compare_latency, count_macs, count_params
from upop.recipe import FitOptions
from upop.run import prune
from upop.slim import slim
from upop.train import Progress, fit
from upop.version import code_version

SCHEMA = 1
UPOP, UPOP_ONCE, SCRATCH = "upop", "upop-one-shot", "scratch"
SETTINGS = (UPOP, UPOP_ONCE, *peers.SETTINGS, SCRATCH)
LATENCY_BATCHES = (1, 64)
BATCH_SIZE = 128
# To choose from for retraining; the search's rate is not among them: what the studies `claims` and `recipe` have.
RATES = {"adamw": (2.5e-4, 5e-4, 1e-3, 2e-3), "muon": (1.25e-3, 2.5e-3, 5e-3, 1e-2)}
LR_SEARCH = {"adamw": 5e-4, "muon": 2.5e-3}
CHOICE_RATIO, CHOICE_SEED = 0.8, 100
TAYLOR_BATCHES, TAYLOR_BATCH_SIZE = 50, 64  # the batches of Isomorphic Pruning, the batch size of Torch-Pruning
PLAIN_STEPS = 24  # of ordinary training, for what a step costs without a search
# Batches of the batch size of training, also to compensate with. Results that name no `normalise` had "none".
ONE_SHOT = {"rank_batches": 16, "rank_rounds": 4, "normalise": "zscore"}
RETRAIN = 2  # position of retraining among upop's stages, which its batches are drawn by


@dataclass(frozen=True)
class Options:
    """What all runs of a comparison share.

    `epochs` in all: of the search and of retraining, where there are both; the search gets `search_share` of them.
    """

    dense: str
    data: str
    epochs: float = 1.0
    search_share: float = 0.5
    optimizer: str = "adamw"
    rates: tuple[float, ...] = RATES["adamw"]
    subset: int | None = None
    threads: int = 1
    latency_seconds: float = 0.5
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """One run; without `rate` the choice of one. `ratio` is the share of ALL parameters to remove."""

    setting: str
    ratio: float
    seed: int
    rate: float | None = None

    @property
    def label(self) -> str:
        return f"choice_{self.setting}" if self.rate is None else f"{self.setting}_params{self.ratio:g}_s{self.seed}"


def rate_setting(setting: str) -> str:
    """The setting whose choice of a learning rate holds for this one."""
    return (peers.SETTINGS[setting].rate_of or setting) if setting in peers.SETTINGS else setting


def choice_of(setting: str) -> Job:
    return Job(rate_setting(setting), CHOICE_RATIO, CHOICE_SEED)


def how(setting: str) -> dict[str, Any] | None:
    """What a setting does, where its name does not say all."""
    if setting == UPOP_ONCE:
        return ONE_SHOT
    return dataclasses.asdict(peers.SETTINGS[setting]) if setting in peers.SETTINGS else None


def spec(job: Job, options: Options) -> dict[str, Any]:
    """What must be equal for a result to be the result of this job, as JSON gives it back."""
    shared = dataclasses.asdict(options) | {"rates": list(options.rates)}
    # Folders are known by what is in them, wherever they lie.
    del shared["dense"]
    if job.setting != UPOP or options.search_share == Options.search_share:
        del shared["search_share"]  # nobody else searches; and half was all there was once
    if options.device == Options.device:
        del shared["device"]  # CPUs were all there was once
    shared |= {"data": Path(options.data).name, "start": weights_hash(Path(options.dense))}
    if job.rate is not None:
        del shared["rates"]  # what it was chosen from is no part of the run
    return {"schema": SCHEMA, **dataclasses.asdict(job), "how": how(job.setting), **_recipe(options), **shared}


def _recipe(options: Options) -> dict[str, Any]:
    """What is the same for everybody, as fields of a configuration."""
    return {"optimizer": options.optimizer, "batch_size": BATCH_SIZE, "lr_search": LR_SEARCH[options.optimizer]}


def carry_out(job: Job, options: Options) -> dict[str, Any]:
    """The whole job in this process, which should be a fresh one: its peak memory is part of the result."""
    began = time.monotonic()
    with cpu_threads(options.threads), tempfile.TemporaryDirectory() as out:
        config = _config(job, options, out)
        if job.rate is None:
            found = _choose(job, options, config)
        else:
            found = (_upop if job.setting in (UPOP, UPOP_ONCE) else _peer)(job, options, config)
        about = provenance(torch.device(options.device), _command(job, options))
    about["versions"] |= _torch_pruning_version()
    seconds = {"wall_seconds": time.monotonic() - began}
    return {"spec": spec(job, options), "status": "complete", "code": code_version(), **about, **seconds, **found}


def _config(job: Job, options: Options, out: str) -> PruneConfig:
    """The `upop prune` of this job; peers take their data, recipe and target from it too."""
    one_shot = job.setting == UPOP_ONCE
    return PruneConfig(
        model=options.dense,
        data=options.data,
        target=f"params={job.ratio}",
        out=out,
        stages="search,retrain",
        epochs_search=0 if one_shot else options.epochs * options.search_share,
        epochs_retrain=options.epochs * (1 if one_shot else 1 - options.search_share),
        **ONE_SHOT,
        align="none",  # peers take any widths
        lr_retrain=job.rate or options.rates[0],
        seed=job.seed,
        subset=options.subset,
        threads=options.threads,
        latency_seconds=options.latency_seconds,
        checkpoint_minutes=0,
        device=options.device,
        **_recipe(options),
    )


class Bench:
    """The model, data and recipe of a plan, outside of upop's own stages."""

    def __init__(self, config: PruneConfig) -> None:
        self.plan: Plan = make_plan(config)
        self.config = self.plan.config
        self.accelerator: Accelerator = make_accelerator(self.config)
        self.dense: nn.Module = self.plan.loaded.model.to(self.accelerator.device)
        set_attention(self.dense, self.config.attention)

    def batches(self, split: str, *, augment: Augment | None = None, **changes: Any) -> Batches:
        config = self.config.model_copy(update=changes)
        found = getattr(self.plan.data, split)
        classes = len(self.plan.data.classes)
        return make_batches(found, config, self.plan.loaded, self.accelerator, classes=classes, augment=augment)

    def retrain(self, model: nn.Module, *, epochs: float, rate: float, steps: list[float] | None = None) -> float:
        """As upop's stage `retrain`, to the same bits; returns its CPU seconds. `steps` takes the time after each."""
        c = self.config
        augment = make_augment(c)
        # upop's stages each draw their own order of the images.
        batches = self.batches("train", augment=augment, seed=c.seed + 1_000_003 * RETRAIN)
        same = ("optimizer", "weight_decay", "warmup", "label_smoothing", "clip", "accumulate", "ema", "seed")
        recipe: dict[str, Any] = {name: getattr(c, name) for name in same}

        def report(progress: Progress) -> None:
            if steps is not None:
                steps.append(time.process_time())

        began = time.process_time()
        options = FitOptions(epochs=epochs, lr=rate, **recipe)
        fit(model, batches, options, accelerator=self.accelerator, report=report)
        return time.process_time() - began

    def accuracy(self, model: nn.Module, split: str = "validation") -> float:
        return evaluate({"model": model}, self.batches(split), accelerator=self.accelerator)["model"].accuracy

    def collect_gradients_(self) -> None:
        """Gradients of the loss over some training images on the dense model, for Taylor importance."""
        batches = self.batches(
            "train", augment=Augment(flip=False, crop=0), batch_size=min(TAYLOR_BATCH_SIZE, len(self.plan.data.train))
        )
        for _, (images, labels) in zip(range(TAYLOR_BATCHES), batches, strict=False):
            F.cross_entropy(self.dense(pixel_values=images).logits, labels).backward()


def _peer(job: Job, options: Options, config: PruneConfig) -> dict[str, Any]:
    """Prune in one go, retrain for all the epochs, measure."""
    bench = Bench(config)
    memory = PeakMemory()
    small, how = _prune(bench, job)
    how["memory"] = memory.read()
    if how["status"] != "complete":
        return how
    assert job.rate is not None
    pruned = bench.accuracy(small)
    how["cpu_seconds"]["training"] = bench.retrain(small, epochs=options.epochs, rate=job.rate)
    retrained = {split: bench.accuracy(small, split) for split in ("validation", "test")}
    return how | {
        "accuracy": {"pruned": {"validation": pruned}, "retrained": retrained},
        "widths": peers.widths(small),
        "params": {"before": count_params(bench.dense), "after": count_params(small)},
        "macs": {"before": count_macs(bench.dense), "after": count_macs(small)},
        "latency": _latency(bench, small, options),
    }


def _prune(bench: Bench, job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned model, and what is to be said of the pruning; status `unreachable` where the target is not met."""
    if job.setting == SCRATCH:
        small = _random_model(bench)
        removed = 1 - count_params(small) / count_params(bench.dense)
        status = "complete" if abs(removed - job.ratio) <= peers.TOLERANCE else "unreachable"
        return small, {"status": status, "removed": removed, "cpu_seconds": {"pruning": 0.0}}
    setting = peers.SETTINGS[job.setting]
    began = time.process_time()
    if setting.importance == "taylor":
        bench.collect_gradients_()
    gradients = time.process_time() - began
    found = peers.prune_to(bench.dense, setting, target=job.ratio)
    bench.dense.zero_grad(set_to_none=True)
    seconds = {"gradients": gradients, "one_try": found.seconds, "pruning": time.process_time() - began}
    facts = {name: getattr(found, name) for name in ("removed", "pruning_ratio", "skipped", "tries")}
    return found.model, {
        "status": "complete" if found.meets(job.ratio) else "unreachable",
        **facts,
        "cpu_seconds": seconds,
    }


def _random_model(bench: Bench) -> nn.Module:
    """A model with random weights and the target's number of parameters, every layer equally wide."""
    torch.manual_seed(bench.config.seed)
    fresh = type(bench.dense)(bench.dense.config).to(bench.accelerator.device).eval()
    set_attention(fresh, bench.config.attention)
    structures = bench.plan.analysis.structures
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        keep = {s.name: torch.arange(s.units) < max(1, round(s.units * share)) for s in structures}
        small = slim(fresh, keep)
        low, high = (share, high) if count_params(small) < bench.plan.params_after else (low, share)
    return small


def _upop(job: Job, options: Options, config: PruneConfig) -> dict[str, Any]:
    """`upop prune`; then a few steps of ordinary training, to know what of a search step is the search."""
    watch = _Watch()
    result = prune(config, observer=watch)
    accuracy, latency = result["accuracy"], result["latency"]
    return {
        "removed": result["ratio"]["params"],
        "accuracy": {"pruned": {"validation": accuracy["slim"]["validation"]}, "retrained": accuracy["retrain"]},
        "widths": result["widths"]["after"],
        "params": result["params"],
        "macs": result["macs"],
        "latency": {batch: {"dense": found["before"], "pruned": found["after"]} for batch, found in latency.items()},
        "memory": watch.memory,
        "cpu_seconds": _one_shot_seconds(watch) if job.setting == UPOP_ONCE else _search_seconds(watch, config),
    }


def _one_shot_seconds(watch: "_Watch") -> dict[str, float]:
    return {"pruning": watch.seconds("search"), "training": watch.seconds("retrain")}


def _search_seconds(watch: "_Watch", config: PruneConfig) -> dict[str, float]:
    """Of a search, `pruning` is what its steps take longer than as many ordinary ones of the dense model."""
    plain, steps = _plain_steps(config)
    step = statistics.median(_differences(watch.times["search"]))
    search, retrain = watch.seconds("search"), watch.seconds("retrain")
    extra = (step - plain) * steps
    return {
        "pruning": extra,
        "training": search - extra + retrain,
        "search": search,
        "retrain": retrain,
        "search_step": step,
        "plain_step": plain,
    }


def _plain_steps(config: PruneConfig) -> tuple[float, int]:
    """Median CPU seconds of a step of ordinary training of the dense model, and the steps of a search."""
    bench = Bench(config)
    steps: list[float] = []
    per_epoch = max(1, len(bench.plan.data.train) // bench.config.batch_size)
    rate = LR_SEARCH[bench.config.optimizer or "adamw"]
    bench.retrain(copy.deepcopy(bench.dense), epochs=PLAIN_STEPS / per_epoch, rate=rate, steps=steps)
    return statistics.median(_differences(steps)), bench.plan.steps["search"]


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


class _Watch:
    """Observer of a run of upop: peak memory of the search, CPU time at the start of a stage and after its steps."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.ended: dict[str, float] = {}
        self.memory: dict[str, Any] = {}

    def stage(self, name: str, about: str) -> None:
        if self.times:
            self.ended[self._stage] = time.process_time()
        self._stage = name
        if name == "search":
            self._peak = PeakMemory()
        elif name == "retrain":
            self.memory = self._peak.read()
        self.times[name] = [time.process_time()]

    def progress(self, progress: Progress) -> None:
        self.times[self._stage].append(time.process_time())

    def epoch(self, number: int, accuracy: float) -> None: ...

    def seconds(self, stage: str) -> float:
        """CPU time from a stage's start to its last step; to its end where it has no steps."""
        times = self.times[stage]
        return (times[-1] if len(times) > 1 else self.ended[stage]) - times[0]


def _choose(job: Job, options: Options, config: PruneConfig) -> dict[str, Any]:
    """Prune once, retrain with each rate; the rate with the best validation accuracy. Test is not read."""
    if len(options.rates) == 1:
        return {"rate": options.rates[0], "validation": {}}
    small, bench = _searched(config) if job.setting in (UPOP, UPOP_ONCE) else _pruned(job, config)
    epochs = options.epochs * (1 - options.search_share if job.setting == UPOP else 1)
    found = {}
    for rate in options.rates:
        model = copy.deepcopy(small)
        bench.retrain(model, epochs=epochs, rate=rate)
        found[rate] = bench.accuracy(model)
    return {
        "rate": max(found, key=lambda rate: found[rate]),
        "validation": {str(rate): accuracy for rate, accuracy in found.items()},
    }


def _searched(config: PruneConfig) -> tuple[nn.Module, Bench]:
    prune(config.model_copy(update={"stages": "search"}))
    small = load_model(str(Path(config.out) / "model")).model
    bench = Bench(config)
    set_attention(small, bench.config.attention)
    return small.to(bench.accelerator.device), bench


def _pruned(job: Job, config: PruneConfig) -> tuple[nn.Module, Bench]:
    bench = Bench(config)
    small, _ = _prune(bench, job)
    return small, bench


def _latency(bench: Bench, small: nn.Module, options: Options) -> dict[str, Any]:
    """Batch size -> dense and pruned, timed in turns in one process."""
    pair = {"dense": bench.dense, "pruned": small}
    size, seconds = bench.plan.loaded.image_size, options.latency_seconds
    where = {"image_size": size, "device": bench.accelerator.device.type, "max_seconds": seconds}
    measured = {b: compare_latency(pair, batch=b, **where) for b in LATENCY_BATCHES}
    return {str(b): {name: dataclasses.asdict(x) for name, x in found.items()} for b, found in measured.items()}


class PeakMemory:
    """Peak resident memory of this process from here on; since its start where Linux does not let us begin anew."""

    def __init__(self) -> None:
        gc.collect()
        self._since = "pruning"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._since = "start of the process"
        self._before = _resident_mib("VmRSS")

    def read(self) -> dict[str, Any]:
        return {"before_mib": self._before, "peak_mib": _resident_mib("VmHWM"), "since": self._since}


def _resident_mib(name: str) -> float | None:
    """A line of /proc/self/status; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure_dense(options: Options) -> dict[str, Any]:
    """What the dense model scores, as its own run recorded it or, without one, measured."""
    with cpu_threads(options.threads), tempfile.TemporaryDirectory() as out:
        bench = Bench(_config(choice_of(UPOP), options, out))
        known = recorded(Path(options.dense), bench.plan.data.facts())
        splits = ("validation", "test")
        accuracy = {s: known[s]["accuracy"] if known else bench.accuracy(bench.dense, s) for s in splits}
    return {
        "start": weights_hash(Path(options.dense)),
        "subset": options.subset,
        "accuracy": accuracy,
        "params": count_params(bench.dense),
        "macs": count_macs(bench.dense),
        "data": bench.plan.data.facts(),
    }


def _command(job: Job, options: Options) -> str:
    """What to type for this run alone, with the usual folders."""
    parts = ["python benchmarks/peers/peers.py", f"--settings {job.setting}"]
    if job.rate is not None:
        parts += [f"--ratios {job.ratio:g}", f"--seeds {job.seed}"]
    default = Options("", "")
    parts += [f"--epochs {options.epochs:g}"] if options.epochs != default.epochs else []
    parts += [f"--search-share {options.search_share:g}"] if options.search_share != default.search_share else []
    parts += [f"--optimizer {options.optimizer}"] if options.optimizer != default.optimizer else []
    parts += (
        [f"--rates {' '.join(f'{rate:g}' for rate in options.rates)}"]
        if options.rates != RATES[options.optimizer]
        else []
    )
    parts += [f"--subset {options.subset}"] if options.subset else []
    parts += [f"--device {options.device}"] if options.device != default.device else []
    return " ".join(parts)


def _torch_pruning_version() -> dict[str, str]:
    from importlib import metadata

    try:
        return {"torch-pruning": metadata.version("torch-pruning")}
    except metadata.PackageNotFoundError:
        return {}
