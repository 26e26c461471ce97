"""Two processes decide what one decides: mask gradients are averaged over processes before anything is ranked."""

import subprocess
import sys

import pytest

WORKER = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification
import upop

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8,
    num_labels=4,
)).double()
search = upop.Search(model, target=upop.Target(params=0.4), steps=6)
wrapped = model
if world > 1:
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
data = torch.Generator().manual_seed(1)
for _ in range(6):
    x, y = torch.randn(8, 3, 16, 16, generator=data).double(), torch.randint(0, 4, (8,), generator=data)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    (cross_entropy(wrapped(pixel_values=x[mine]).logits, y[mine]) + search.penalty()).backward()
    optimizer.step(); search.step(); optimizer.zero_grad()
# A file each: what two processes print to one pipe may be mixed.
with open(f"{sys.argv[1]}-{rank}-of-{world}", "w") as file:
    file.write("".join(str(int(k)) for keep in search.keep().values() for k in keep))
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_units_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for prefix in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *prefix, script, tmp_path / "keep"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    alone, first, second = (tmp_path / f"keep-{name}" for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert {"0", "1"} == set(alone.read_text())
    assert alone.read_text() == first.read_text() == second.read_text()
