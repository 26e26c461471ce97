"""Where a model comes from: a built-in shape with random weights, a local folder, or a Hub name.

Returns models ready for a given number of classes, with the pixel statistics they expect. Must not train or prune.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from upop.errors import ModelError, UpopError, nearest
from upop.reading import read_json

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
HEADS = ("classifier", "cls_classifier", "distillation_classifier")
OPTIMIZER = "upop_optimizer"  # a model's config says under this name what it was trained by
PROCESSOR, NEWER_PROCESSOR = "preprocessor_config.json", "processor_config.json"


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
    "deit-tiny": Shape(192, 12, 3, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-small": Shape(384, 12, 6, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-base": Shape(768, 12, 12, 224, 16, IMAGENET_MEAN, IMAGENET_STD),
    "deit-digits": Shape(96, 4, 3, 16, 4, HALF, HALF),
}
_VARIED = re.compile(
    rf"({'|'.join(sorted(SHAPES, key=len, reverse=True))})"
    r"(?:-(?P<layers>[1-9]\d?)layers)?(?:-patch(?P<patch_size>[1-9]\d?))?(?:-width(?P<width>[1-9]\d{0,3}))?"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model and what its images must look like: square `image_size` pixels, channels minus mean over std."""

    model: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trained: bool  # False: random weights
    folder: Path | None = None  # that it was loaded from
    notes: tuple[str, ...] = ()  # what was assumed and a reader of the results should know
    shorter_side: int | None = None  # that images are resized to before `image_size` is cut out; None: nobody says
    optimizer: str | None = None  # that a run of upop has trained it by; None: nobody says


def load_model(name: str, *, seed: int = 0, new_head: bool = False) -> LoadedModel:
    """The model called `name`, on the CPU, in float32, in eval mode; built-in shapes get random weights from `seed`.

    A shape may be varied: `deit-tiny-cifar-6layers-patch8-width96`. With `new_head` a backbone without a
    classification head will do: it gets a fresh one.
    Raises ModelError for names that are neither shape, folder nor Hub name, and for folders that do not load.
    """
    if not Path(name).exists() and (shape := _shape(name)) is not None:
        torch.manual_seed(seed)
        return LoadedModel(_build(shape), shape.image_size, shape.mean, shape.std, trained=False)
    from upop.hub import fetch
    from upop.pretrained import load

    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ModelError(
            f"model {name!r}: expected a built-in shape ({', '.join(SHAPES)}; also varied, as "
            "deit-tiny-6layers-patch8-width96), a folder with config.json, or a Hub name such as "
            f"facebook/deit-base-patch16-224{nearest(name, SHAPES)}"
        )
    # Master weights: a folder saved in bfloat16 would otherwise be trained, and judged, in it.
    folder = fetch(name)
    torch.manual_seed(seed)  # of a head that is not in the folder
    model = load(str(folder), new_head=new_head).float()
    values = _processor_settings(folder)
    size, mean, std, notes = _image_settings(name, model, values)
    shorter = _shorter_side(values, size)
    return LoadedModel(
        model,
        size,
        mean,
        std,
        trained=True,
        folder=folder,
        notes=notes,
        shorter_side=shorter,
        optimizer=getattr(model.config, OPTIMIZER, None),
    )


def _shorter_side(values: Mapping[str, Any], size: int) -> int | None:
    """What a processor brings the shorter side of images to: `size` where it cuts nothing off, None if it is mute."""
    found = values.get("size")
    if isinstance(found, dict):  # where it squashes pictures to a square, by that square's side
        found = found.get("shortest_edge", found.get("height", size))
    shorter = found if found is None or values.get("do_center_crop") else size
    return shorter if isinstance(shorter, int) and shorter >= size else None


def _side(values: Mapping[str, Any]) -> int | None:
    """The side of the square that a processor makes of an image; None if it is mute."""
    found = values.get("crop_size" if values.get("do_center_crop") else "size")
    found = found.get("height", found.get("shortest_edge")) if isinstance(found, dict) else found
    return found if isinstance(found, int) else None


def _shape(name: str) -> Shape | None:
    """The built-in shape called `name`, with the changes that follow it; None where that is no such name."""
    found = _VARIED.fullmatch(name)
    if found is None:
        return None
    changes: dict[str, Any] = {key: int(value) for key, value in found.groupdict().items() if value}
    shape = replace(SHAPES[found[1]], **changes)
    if shape.width % shape.heads or shape.image_size % shape.patch_size:
        raise ModelError(
            f"model {name!r}: expected a width that {shape.heads} heads share and a patch that divides "
            f"{shape.image_size} pixels, got width {shape.width} and patch {shape.patch_size}"
        )
    return shape


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


def fit_head_(
    model: nn.Module, classes: tuple[str, ...], *, name: str, replace: bool, seed: int = 0
) -> tuple[str, ...]:
    """Give `model` the data's class names and, where its number of labels differs, a fresh head. In place.

    A head with the same names (but for case, `_`, `-` and spaces) in another order is brought into the data's order.
    Returns what a reader must know of a head that is kept: names of its own, which nothing says mean the data's.
    Raises ModelError where the head does not fit and may not be replaced.
    """
    stock: Any = model
    # Where there are no labels, transformers puts an Identity.
    heads = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear | nn.Identity)]
    labels = [str(stock.config.id2label.get(index)) for index in range(int(stock.config.num_labels))]
    own, wanted = [_plain(label) for label in labels], [_plain(label) for label in classes]
    same = sorted(own) == sorted(wanted) and len(set(own)) == len(own)
    if same and own != wanted:
        order = torch.tensor([own.index(label) for label in wanted])
        for parameter in (p for head in heads for p in getattr(model, head).parameters()):
            parameter.data = parameter.data[order]
    if len(labels) != len(classes) and not replace:
        raise ModelError(
            f"{name}: its head has {len(labels)} labels, the data {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...); use the data it was trained for, or "
            "fine-tune first (stage dense), which replaces the head"
        )
    stock.config.id2label = dict(enumerate(classes))
    stock.config.label2id = {label: index for index, label in enumerate(classes)}
    stock.num_labels = len(classes)
    if len(labels) != len(classes):
        stock.config.problem_type = None  # the old head's
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            made = type(stock)(stock.config)
        for head in heads:
            new = nn.Linear(getattr(made, head).in_features, len(classes))
            nn.init.trunc_normal_(new.weight, std=0.02, generator=generator)
            nn.init.zeros_(new.bias)
            setattr(model, head, new)
    if same or replace:
        return ()
    return (
        f"{name}: its classes are called {', '.join(labels[:3])}, ..., the data's {', '.join(classes[:3])}, ...: "
        "taken to be the same ones in that order; where they are not, name the folders as the model names its classes",
    )


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


def _image_settings(
    name: str, model: Any, values: Mapping[str, Any]
) -> tuple[int, tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Image size of the config; mean and std of the image processor or, without one, the model type's, with a note.

    Raises ModelError for models of other than square RGB images, or that do not say of which, and for a processor that
    cannot be read.
    """
    vision = getattr(model.config, "vision_config", model.config)
    for said in ("image_size", "num_channels"):
        if not hasattr(vision, said):
            raise ModelError(
                f"{name}: expected a vision transformer that has image_size and num_channels in its config.json, got "
                f"a {type(model).__name__} without {said}"
            )
    size = vision.image_size
    size = size if isinstance(size, int) else size[0] if len(set(size)) == 1 else None
    if size is None or vision.num_channels != 3:
        raise ModelError(
            f"{name}: expected a model of square RGB images, got image_size {vision.image_size} and "
            f"{vision.num_channels} channel(s)"
        )
    mean, std = values.get("image_mean"), values.get("image_std")
    notes: tuple[str, ...] = ()
    if mean is None or std is None:
        deit = "deit" in f"{model.config.model_type} {name}".lower()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if deit else (HALF, HALF)
        notes = (f"{name}: no {PROCESSOR} says how images are normalised; assumed mean {mean}, std {std}",)
    if not (_is_three_numbers(mean) and _is_three_numbers(std) and min(std) > 0):
        raise ModelError(f"{name}/{PROCESSOR}: expected 3 means and 3 deviations > 0, got {mean}, {std}")
    # Ours are of pixels in [0, 1]; a processor may leave them at 0 to 255, or scale them otherwise.
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ModelError(f"{name}/{PROCESSOR}: expected a rescale_factor > 0, got {factor!r}")
    if values.get("do_normalize", True) is False:
        mean, std, notes = (0.0,) * 3, (1.0,) * 3, ()
    if (crop := _side(values)) is not None and crop < size:
        notes += (
            f"{name}: its {PROCESSOR} makes images of {crop} pixels, its config.json says {size}: taken to be {size}",
        )
    one = 255 * factor
    return size, tuple(x / one for x in mean), tuple(x / one for x in std), notes


def _processor_settings(folder: Path) -> dict[str, Any]:
    """What the folder says about its images: newer releases of transformers put it beside what is no image's."""
    try:
        if (folder / PROCESSOR).exists():
            return read_json(folder / PROCESSOR)
        if (folder / NEWER_PROCESSOR).exists():
            found = read_json(folder / NEWER_PROCESSOR).get("image_processor")
            return found if isinstance(found, dict) else {}
    except UpopError as error:
        raise ModelError(f"{error}{'' if ';' in str(error) else '; correct or remove it'}") from None
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from None
    return {}


def _is_three_numbers(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(isinstance(x, int | float) and math.isfinite(x) for x in value)


def save_image_processor(folder: Path, loaded: LoadedModel) -> None:
    """Write the preprocessor_config.json that makes pipelines see images as they are when accuracy is measured."""
    _own_processor(loaded).save_pretrained(folder)


def image_processor(name: str, loaded: LoadedModel) -> Any:
    """What turns pictures into the model's pixels: the processor that comes with it, or one as training would."""
    # Not from the top of transformers, whose import of it wants torchvision before 5.18.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    side = loaded.image_size
    try:
        found = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        # Images of another shape than it was taken to have are refused by most models.
        made = found(images=Image.new("RGB", (2 * side, side)), return_tensors="np")["pixel_values"]
    except (OSError, ValueError, ImportError):
        return _own_processor(loaded)
    return found if made.shape == (1, 3, side, side) else _own_processor(loaded)


def _own_processor(loaded: LoadedModel) -> Any:
    # CLIP's is the one that all releases know to resize the shorter side and take the central square.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": loaded.shorter_side or loaded.image_size},
        crop_size={"height": loaded.image_size, "width": loaded.image_size},
        image_mean=list(loaded.mean),
        image_std=list(loaded.std),
        resample=3,
        do_convert_rgb=True,
    )
