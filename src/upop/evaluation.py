"""Accuracy and loss of models on a split, every image counted once, over all processes.

Must not train, and must not decide which split is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from upop import processes
from upop.data import Batches
from upop.memory import in_parts


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and mean cross-entropy over `images` images."""

    accuracy: float
    loss: float
    images: int


@contextmanager
def _whole_float32() -> Iterator[None]:
    """No TF32 in convolutions, where it is the default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module], batches: Batches, *, accelerator: Accelerator, autocast: bool = False
) -> dict[str, Score]:
    """Score of each model in one pass over the split.

    Without `autocast` in the models' own precision, for results: a masked model and its slimmed twin must not differ
    by rounding. With it as in training, for a quick look. Where memory runs out, fewer images go through at once.
    """
    # A compiled model as it was: to compile it again, for this precision and for the last, smaller batch, takes longer
    # than to go without, and leaves training with graphs for any batch size.
    with torch.compiler.set_stance("force_eager"), _whole_float32():
        return _evaluate(models, batches, accelerator, autocast)


def _evaluate(
    models: Mapping[str, nn.Module], batches: Batches, accelerator: Accelerator, autocast: bool
) -> dict[str, Score]:
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()

    def sums_in(micro: int) -> dict[str, Tensor]:
        sums = {name: torch.zeros(3, device=accelerator.device, dtype=torch.float64) for name in models}
        for images, labels in batches:
            for i in range(0, len(images), micro):
                x, y = images[i : i + micro], labels[i : i + micro]
                for name, model in models.items():
                    with accelerator.autocast() if autocast else nullcontext():
                        logits = model(pixel_values=x).logits.float()
                    loss = F.cross_entropy(logits, y, reduction="sum")
                    correct = (logits.argmax(-1) == y).sum()
                    # Element by element: a tensor made from Python numbers would be a copy to the device.
                    sums[name][0] += correct
                    sums[name][1] += loss
                    sums[name][2] += len(y)
        return sums

    # Nothing is asked of other processes before the end: each may go at its own pace.
    sums = in_parts(batches.batch_size, sums_in, where="evaluate")
    for name, model in models.items():
        model.train(training[name])
    result = {}
    for name, counts in sums.items():
        right, total, seen = (float(v) for v in processes.add_up_(counts))
        assert seen == len(batches.split), "every image counts once, in one process"
        result[name] = Score(right / seen, total / seen, int(seen))
    return result
