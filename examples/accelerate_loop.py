"""Prune in an Accelerate loop: real digits, a small ViT, one process or several. About a minute on two cores.

python examples/accelerate_loop.py [share]    a share of all epochs, to try it out; 1 by default
torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import upop

share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
accelerator = Accelerator(cpu=not torch.cuda.is_available())
digits = load_digits()
images = torch.tensor(digits.images / 16.0 - 0.5, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
samples = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in order]
test = accelerator.prepare(DataLoader(samples[1500:], batch_size=300 // accelerator.num_processes))


def train(model, *, epochs, lr, target=None):
    """Any training you like; with a target it searches, and returns the search."""
    model = model.to(accelerator.device)  # masks are made where the weights are
    steps = max(2, round(30 * epochs * share))
    search = None if target is None else upop.Search(model, target=target, steps=steps)
    loader = DataLoader(samples[:1500], batch_size=50 // accelerator.num_processes, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr), loader)
    prepared.train()
    done = 0
    while done < steps:
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss if search is None else loss + search.penalty())
            optimizer.step()
            if search is not None:
                search.step()
            optimizer.zero_grad()
            if (done := done + 1) == steps:
                break
    accelerator.free_memory()
    del model._is_accelerate_prepared  # or Accelerate would leave the model as it is when it is prepared again
    return search


@torch.no_grad()
def accuracy(model):
    model.eval()
    right = [accelerator.gather_for_metrics(model(**b).logits.argmax(-1) == b["labels"]) for b in test]
    return torch.cat(right).float().mean().item()


set_seed(0)
config = ViTConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=8, patch_size=2,
    num_labels=10, attn_implementation="eager",
)  # fmt: skip
model = ViTForImageClassification(config)
train(model, epochs=20, lr=1e-3)
accelerator.print(f"dense: {accuracy(model):.3f}")

search = train(model, epochs=10, lr=1e-3, target=upop.Target(params=0.5))
accelerator.print(f"after search, masked: {accuracy(model):.3f}")

small = search.slim()  # the same outputs, half the parameters
train(small, epochs=10, lr=5e-4)
accelerator.print(f"retrained: {accuracy(small):.3f}")

small.save_pretrained("digits-half", is_main_process=accelerator.is_main_process)
accelerator.wait_for_everyone()
again = upop.from_pretrained("digits-half")
sizes = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
accelerator.print(f"saved: {sizes[0]:,} of {sizes[1]:,} parameters")
accelerator.end_training()
