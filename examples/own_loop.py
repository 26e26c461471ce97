"""Prune in a training loop of your own: real digits, a small ViT, plain PyTorch. About a minute on two cores."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

import upop

digits = load_digits()
images = torch.tensor(digits.images / 16.0 - 0.5, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1500], order[1500:]


def epochs(count):
    """Batches of 50 images, `count` times over."""
    for _ in range(count):
        for batch in train[torch.randperm(len(train))].split(50):
            yield images[batch], labels[batch]


def accuracy(model):
    with torch.no_grad():
        return (model(pixel_values=images[test]).logits.argmax(-1) == labels[test]).float().mean().item()


torch.manual_seed(0)
config = ViTConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=8, patch_size=2,
    num_labels=10, attn_implementation="eager",
)  # fmt: skip
model = ViTForImageClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for x, y in epochs(20):  # 1. any training you like
    cross_entropy(model(pixel_values=x).logits, y).backward()
    optimizer.step()
    optimizer.zero_grad()
print(upop.analyze(model))
print(f"dense: {accuracy(model):.3f}")

search = upop.Search(model, target=upop.Target(params=0.5), steps=10 * 30)
for x, y in epochs(10):  # 2. the same loop, three words more
    (cross_entropy(model(pixel_values=x).logits, y) + search.penalty()).backward()
    optimizer.step()
    search.step()
    optimizer.zero_grad()
print(f"after search, masked: {accuracy(model):.3f}")

small = search.slim()  # 3. the same outputs, half the parameters
print(f"slimmed: {accuracy(small):.3f}")

optimizer = torch.optim.AdamW(small.parameters(), lr=5e-4)
for x, y in epochs(10):  # 4. retrain what is left
    cross_entropy(small(pixel_values=x).logits, y).backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"retrained: {accuracy(small):.3f}")

small.save_pretrained("digits-half")
again = upop.from_pretrained("digits-half")
print(f"saved and loaded: {accuracy(again):.3f}, {sum(p.numel() for p in again.parameters()):,} parameters")
