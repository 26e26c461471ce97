"""Prune with the Hugging Face Trainer: real digits, a small ViT, one callback. About a minute on two cores.

python examples/hf_trainer.py [share]     a share of all epochs, to try it out; 1 by default
"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import upop
from upop.callback import SearchCallback

share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
digits = load_digits()
images = torch.tensor(digits.images / 16.0 - 0.5, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
samples = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in order]


def train(model, *, epochs, lr, callbacks=()):
    """Any training you like; returns the Trainer."""
    arguments = TrainingArguments(
        "digits-trainer", num_train_epochs=epochs * share, learning_rate=lr, per_device_train_batch_size=50,
        per_device_eval_batch_size=300, save_strategy="no", logging_steps=100, report_to=[], disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=samples[:1500], eval_dataset=samples[1500:], callbacks=list(callbacks),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    return trainer


def accuracy(trainer):
    return trainer.evaluate()["eval_accuracy"]


torch.manual_seed(0)
config = ViTConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=8, patch_size=2,
    num_labels=10, attn_implementation="eager",
)  # fmt: skip
model = ViTForImageClassification(config)
print(f"dense: {accuracy(train(model, epochs=20, lr=1e-3)):.3f}")

callback = SearchCallback(target=upop.Target(params=0.5))
print(f"after search, masked: {accuracy(train(model, epochs=10, lr=1e-3, callbacks=[callback])):.3f}")

small = callback.slim()  # the same outputs, half the parameters
print(f"retrained: {accuracy(train(small, epochs=10, lr=5e-4)):.3f}")

small.save_pretrained("digits-half")
again = upop.from_pretrained("digits-half")
sizes = [sum(p.numel() for p in m.parameters()) for m in (again, model)]
print(f"saved: {sizes[0]:,} of {sizes[1]:,} parameters")
