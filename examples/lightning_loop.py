"""Prune with Lightning: real digits, a small ViT, one callback. About a minute on two cores.

pip install 'upop[lightning]'
python examples/lightning_loop.py [share]     a share of all epochs, to try it out; 1 by default
"""

import logging
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import upop
from upop.lightning import SearchCallback

share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
digits = load_digits()
images = torch.tensor(digits.images / 16.0 - 0.5, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
samples = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in order]


class Classifier(LightningModule):
    """Any LightningModule that holds a model which can be pruned."""

    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def train(model, *, epochs, lr, callbacks=()):
    """Any training you like; returns the accuracy."""
    trainer = Trainer(
        max_steps=max(2, round(30 * epochs * share)), callbacks=list(callbacks), limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier(model, lr)
    trainer.fit(module, DataLoader(samples[:1500], batch_size=50, shuffle=True))
    checker = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return checker.validate(module, DataLoader(samples[1500:], batch_size=300), verbose=False)[0]["accuracy"]


seed_everything(0, verbose=False)
config = ViTConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=8, patch_size=2,
    num_labels=10, attn_implementation="eager",
)  # fmt: skip
model = ViTForImageClassification(config)
print(f"dense: {train(model, epochs=20, lr=1e-3):.3f}")

callback = SearchCallback(target=upop.Target(params=0.5))
print(f"after search, masked: {train(model, epochs=10, lr=1e-3, callbacks=[callback]):.3f}")

small = callback.slim()  # the same outputs, half the parameters
print(f"retrained: {train(small, epochs=10, lr=5e-4):.3f}")

small.save_pretrained("digits-half")
again = upop.from_pretrained("digits-half")
sizes = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
print(f"saved: {sizes[0]:,} of {sizes[1]:,} parameters")
