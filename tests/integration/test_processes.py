"""Several processes do what one does: the same units stay, checkpoints carry them over, the first speaks for all."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist

from upop import Search, Target, processes
from upop.callback import PLAIN
from upop.config import make_config
from upop.errors import ModelError, UpopError
from upop.run import prune, resume

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

WORKER = """
import os, sys
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
import upop
from upop.callback import SearchCallback

rank, world, base = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), sys.argv[1]
torch.set_num_threads(1)

def model(width):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16,
        patch_size=8, num_labels=4,
    )).double()

def tell(name, keep):
    # A file each: what two processes print to one pipe may be mixed.
    with open(f"{base}/{name}-{rank}-of-{world}", "w") as file:
        file.write("".join(str(int(k)) for keep in keep.values() for k in keep))

# One's own loop, and the search's own masks.
alone = model(64)
search = upop.Search(alone, target=upop.Target(params=0.4), steps=6)
wrapped = DistributedDataParallel(alone) if world > 1 else alone
optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
data = torch.Generator().manual_seed(1)
for _ in range(6):
    x, y = torch.randn(8, 3, 16, 16, generator=data).double(), torch.randint(0, 4, (8,), generator=data)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    (cross_entropy(wrapped(pixel_values=x[mine]).logits, y[mine]) + search.penalty()).backward()
    optimizer.step(); search.step(); optimizer.zero_grad()
tell("loop", search.keep())

# The Trainer, and trained masks, which need the gradients of both.
AcceleratorState._reset_state(reset_partial_state=True)
data = torch.Generator().manual_seed(1)
images = torch.randn(32, 3, 16, 16, generator=data).double()
callback = SearchCallback(target=upop.Target(params=0.4), method="unified")
arguments = TrainingArguments(
    f"{base}/trained-{world}", max_steps=6, per_device_train_batch_size=4 // world, use_cpu=True, report_to=[],
    save_steps=3, disable_tqdm=True, optim="sgd", learning_rate=0.05, data_seed=0,
    ddp_backend="gloo" if world > 1 else None,
)
samples = [{"pixel_values": x, "labels": i % 4} for i, x in enumerate(images)]
Trainer(model(32), arguments, train_dataset=samples, callbacks=[callback]).train()
tell("trainer", callback.search.keep())
if world > 1:
    dist.barrier()
    dist.destroy_process_group()  # or the first to leave may abort the other
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop", "trainer"])
def test_two_processes_keep_the_same_units_as_one(ran, name):
    alone, first, second = ((ran / f"{name}-{which}").read_text() for which in ("0-of-1", "0-of-2", "1-of-2"))
    assert {"0", "1"} == set(alone)
    assert alone == first == second
    assert (ran / "trained-2/checkpoint-6" / PLAIN).is_file()


# ---------------------------------------------------------------- whole runs

# Batches and splits that two processes cannot share evenly. Muon would multiply what they round differently: it works
# in bfloat16.
OPTIONS = {
    "data": "digits",
    "stages": "search",
    "epochs_search": 1,
    "batch_size": 63,
    "subset": 261,
    "optimizer": "adamw",
    "precision": "fp32",
    "device": "cpu",
    "crop": 4,
    "flip": True,
    "erasing": 0.3,
    "threads": 1,
    "latency_seconds": 0.02,
    "checkpoint_minutes": 1e-9,
}
RUNS = {
    "search": {},
    # Shares of 28 and 29 images, whose sevenths are 4 and 5: the last of the parts would be missing from one.
    "mixed": {"mixup": 0.5, "method": "unified", "batch_size": 57, "accumulate": 7, "epochs_search": 0.5},
    # In one round: each of more would rank what the rounding of the one before has made of the weights.
    "one-shot": {"epochs_search": 0, "rank_rounds": 1},
}
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from upop.config import make_config
from upop.errors import StopError
from upop.run import prune, resume

rank, base = int(os.environ["RANK"]), Path(sys.argv[1])
configs = json.loads((base / "configs.json").read_text())

class Asks:
    # A signal to one of the processes, in the middle of a step.
    def __init__(self, step): self.step = step
    def stage(self, name, about): ...
    def epoch(self, number, accuracy): ...
    def progress(self, progress):
        if progress.step == self.step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

for name in configs:
    prune(make_config(configs[name] | {"out": str(base / "two" / name)}))
for name in ("resumed", "left"):
    try:
        prune(make_config(configs["search"] | {"out": str(base / "two" / name)}), observer=Asks(3))
    except StopError as stop:
        (base / f"{name}-{rank}").write_text(str(stop))
resume(base / "two/resumed")
exec((base / "worker.py").read_text())
"""


def of(folder):
    """What several processes must agree on with one; what differs by rounding; the masks over the search."""
    result = json.loads((folder / "result.json").read_text())
    trace = dict(np.load(folder / "trace.npz")) if (folder / "trace.npz").exists() else {}
    same = {key: result[key] for key in ("widths", "params", "macs", "ratio", "accuracy")}
    return same, {**result["loss"]["dense"], **result["loss"]["slim"]}, trace


@pytest.fixture(scope="module")
def ran(tmp_path_factory, only_results):
    """Folder with the runs of one process below `one`, those of two below `two`."""
    base = tmp_path_factory.mktemp("processes")
    dense = {**OPTIONS, "model": "deit-digits-2layers", "stages": "dense", "epochs_dense": 1, "lr": 1e-3}
    prune(make_config({**dense, "out": str(base / "dense")}))
    configs = {name: {**OPTIONS, **more, "model": str(base / "dense/dense")} for name, more in RUNS.items()}
    (base / "configs.json").write_text(json.dumps(configs))
    for name, config in configs.items():
        prune(make_config({**config, "out": str(base / "one" / name)}))
    (base / "program.py").write_text(PROGRAM)
    (base / "worker.py").write_text(WORKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["worker.py", str(base)])
        runpy.run_path(str(base / "worker.py"))
    done = subprocess.run([*TORCHRUN, base / "program.py", base], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_the_result_of_one(ran, name):
    (same, losses, trace), (same2, losses2, trace2) = (of(ran / count / name) for count in ("one", "two"))
    assert same2 == same
    assert losses2 == pytest.approx(losses, rel=1e-4)
    assert trace.keys() == trace2.keys()
    for key, values in trace.items():
        # Trained masks are rounded like weights; those of the search itself are decided, and are equal.
        off = 1 if (name, key) == ("mixed", "masks") else 0
        assert np.array_equal(values, trace2[key]) or np.abs(values.astype(int) - trace2[key]).max() <= off, key
    result = json.loads((ran / "two" / name / "result.json").read_text())
    assert result["processes"] == 2
    assert set(result["latency"]["1"]) == {"before", "after"}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_two_go_on_to_the_same_bits(ran):
    said = [(ran / f"resumed-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] == f"search: stopped by SIGTERM; go on with --resume {ran}/two/resumed"
    whole, resumed = (ran / "two" / name / "model/model.safetensors" for name in ("search", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert of(resumed.parents[1])[0] == of(whole.parents[1])[0]
    assert not list((ran / "two/resumed").glob(".*.partial"))


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_begun(ran):
    result = resume(ran / "two/left")
    assert any("begun in 2 process(es), went on in 1" in line for line in result["warnings"])
    assert result["widths"] == json.loads((ran / "one/search/result.json").read_text())["widths"]


DIES = """
import os, signal, sys
from upop import cli
from upop.cli import show

class Watcher(show.Watcher):
    def progress(self, progress):
        super().progress(progress)
        if progress.step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

cli.Watcher = Watcher
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(ran, tmp_path):
    config = json.loads((ran / "configs.json").read_text())["search"]
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    (tmp_path / "run.toml").write_text(lines)
    (tmp_path / "dies.py").write_text(DIES)
    command = [*TORCHRUN, tmp_path / "dies.py", "prune", "--config", tmp_path / "run.toml", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("upop: ")]
    assert len(ours) == 1, done.stderr
    # Torchrun asks the others to end as soon as one is gone: which of the two they hear of first is a matter of luck.
    assert f"--resume {tmp_path}/out" in ours[0]
    assert done.stdout.count("search: upop") == 1, "only the first process speaks"
    assert not (tmp_path / "out/result.json").exists()


# ---------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            r"accelerate launch was asked for several, but starts one .* type torchrun --nproc-per-node N -m upop",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, r"the whole model in every process, got FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"got DEEPSPEED, which shards it"),
    ],
)
def test_launches_that_would_go_wrong_are_refused(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UpopError, match=message):
        processes.join("cpu")


def test_the_number_that_was_started_is_asserted(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.join("cpu")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UpopError, match="expected 1, as WORLD_SIZE says, got 2"):
        processes.join("cpu")


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_are_refused_before_and_after_the_masks(alone, make_model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ModelError, match=r"expected a whole weight in every process, got a DTensor"):
        Search(fully_shard(make_model("vit"), mesh=mesh), target=Target(params=0.5), steps=3)
    model = make_model("vit")
    search = Search(model, target=Target(params=0.5), steps=3)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ModelError, match="got a DTensor"):
        search.step()
