"""Where a model comes from: a built-in shape with random weights, a local folder, or a Hub name.

Returns models ready for a given number of classes, with the pixel statistics they expect. Must not train or prune.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upop.errors import ModelError, nearest

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Shape:
    """A DeiT built here with random weights: plain patch embedding, class token, MLP of 4 x width."""

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


SHAPES: dict[str, Shape] = {
    "deit-tiny-cifar": Shape(192, 12, 3, 32, 4, CIFAR_MEAN, CIFAR_STD),
    "deit-small-cifar": Shape(384, 12, 6, 32, 4, CIFAR_MEAN, CIFAR_STD),
    "deit-tiny-cifar-6layers": Shape(192, 6, 3, 32, 4, CIFAR_MEAN, CIFAR_STD),
    "deit-tiny": Shape(192, 12, 3, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-small": Shape(384, 12, 6, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-base": Shape(768, 12, 12, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-digits": Shape(96, 4, 3, 16, 4, HALF, HALF),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model and what its images must look like: square `image_size` pixels, channels minus mean over std."""

    model: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trained: bool  # False: random weights


def load_model(name: str, *, seed: int = 0) -> LoadedModel:
    """The model called `name`, as it is, on the CPU, in eval mode; built-in shapes get random weights from `seed`.

    Raises ModelError for names that are neither shape, folder nor Hub name, and for folders that do not load.
    """
    if name in SHAPES and not Path(name).exists():
        shape = SHAPES[name]
        torch.manual_seed(seed)
        return LoadedModel(_build(shape), shape.image_size, shape.mean, shape.std, trained=False)
    from upop.pretrained import from_pretrained

    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ModelError(
            f"model {name!r}: expected a built-in shape ({', '.join(SHAPES)}), a folder with config.json, or a Hub "
            f"name such as facebook/deit-base-patch16-224{nearest(name, SHAPES)}"
        )
    model = from_pretrained(name)
    size, mean, std = _image_settings(name, model)
    return LoadedModel(model, size, mean, std, trained=True)


def _build(shape: Shape) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_labels=1000,
    )
    model: nn.Module = ViTForImageClassification(config).eval()
    return model


def fit_head_(model: nn.Module, classes: tuple[str, ...], *, name: str, replace: bool, seed: int = 0) -> None:
    """Give `model` the data's class names and, where its number of labels differs, a fresh head. In place.

    Raises ModelError where the head does not fit and may not be replaced.
    """
    stock: Any = model
    labels = int(stock.config.num_labels)
    if labels != len(classes) and not replace:
        raise ModelError(
            f"{name}: its head has {labels} labels, the data {len(classes)} classes ({', '.join(classes[:3])}, ...); "
            "use the data it was trained for, or fine-tune first (stage dense), which replaces the head"
        )
    if labels != len(classes):
        generator = torch.Generator().manual_seed(seed)
        for head in ("classifier", "cls_classifier", "distillation_classifier"):
            old = getattr(model, head, None)
            if isinstance(old, nn.Linear):
                new = nn.Linear(old.in_features, len(classes))
                nn.init.trunc_normal_(new.weight, std=0.02, generator=generator)
                nn.init.zeros_(new.bias)
                setattr(model, head, new)
    stock.config.id2label = dict(enumerate(classes))
    stock.config.label2id = {label: index for index, label in enumerate(classes)}
    stock.num_labels = len(classes)


def _image_settings(name: str, model: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Image size from the config, mean and std from the folder's image processor or, without one, the model type's."""
    size = model.config.image_size
    size = size if isinstance(size, int) else size[0]
    from transformers import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        values = {}
    mean, std = values.get("image_mean"), values.get("image_std")
    if mean is None or std is None:
        deit = "deit" in model.config.model_type
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if deit else (HALF, HALF)
    if not all(len(v) == 3 and all(math.isfinite(x) for x in v) for v in (mean, std)) or min(std) <= 0:
        raise ModelError(f"{name}/preprocessor_config.json: expected 3 means and 3 deviations > 0, got {mean}, {std}")
    return size, tuple(mean), tuple(std)


def save_image_processor(folder: Path, loaded: LoadedModel) -> None:
    """Write the preprocessor_config.json that makes pipelines treat images as training did."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    side = {"height": loaded.image_size, "width": loaded.image_size}
    ViTImageProcessorPil(
        size=side, image_mean=list(loaded.mean), image_std=list(loaded.std), resample=3, do_convert_rgb=True
    ).save_pretrained(folder)
