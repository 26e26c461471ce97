"""Look at models with one's own eyes: what each says of a picture, how fast, how large, how wide in each layer.

Must not know HTTP, and writes nothing.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from upop.data import MemorySplit, load_data
from upop.data.items import MOST_PIXELS, upright
from upop.data.sources import find
from upop.errors import DataError, ModelError, UpopError, one_line, said
from upop.families import find_structures
from upop.folder import weights_hash
from upop.models import LoadedModel, image_processor, load_model
from upop.plots import KIND_LABELS
from upop.profiling import count_macs, count_params, time_in_turns
from upop.reading import read_json
from upop.structures import widths

TOP = 5
MOST_BYTES = 32 * 2**20  # of an uploaded file
# Pillow before 11.3 does not even know the name.
HAS_AVIF = "avif" in features.modules and features.check("avif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if HAS_AVIF else []))
SAMPLES = 12
SAMPLE_SIZE = 224  # pixels of a side, of images of many sizes
# Kinds of the same units, whose bars have one scale.
SCALE = {"qk": "attn", "v": "attn", "dims": "attn"}


@dataclass(frozen=True)
class Viewed:
    """A model to look at.

    Attributes:
        name: for people, different from all others.
        loaded: in eval mode, on its device, with the image processor that goes with it.
        widths: kind -> units left, one number a layer; empty for a model that upop does not know.
        accuracy: on the test split, in [0, 1], where the run that made the model has measured it.
    """

    name: str
    folder: Path
    loaded: LoadedModel
    processor: Any
    params: int
    macs: int
    widths: Mapping[str, Sequence[int]]
    accuracy: float | None


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: the likeliest classes with their probabilities, and ms of a forward pass."""

    name: str
    top: tuple[tuple[str, float], ...]
    ms: float


def find_folders(paths: Sequence[str]) -> dict[str, Path]:
    """Name -> model folder, the dense models first where a run has both; a model in two places comes once.

    A path is the output folder of `upop prune` or a model folder. Raises ModelError for one that is neither.
    """
    runs = [(Path(path), _of_run(Path(path))) for path in paths]
    found: dict[str, Path] = {}
    for path, folders in runs:
        for name, folder in folders.items():
            if any(_same(folder, other) for other in found.values()):
                continue
            # `dense` and `pruned` say it all while there is one run.
            full = name if len(paths) == 1 else f"{path.resolve().name} {name}".strip()
            number = 2
            while full in found:
                full, number = f"{full.removesuffix(f' ({number - 1})')} ({number})", number + 1
            found[full] = folder
    return found


def _of_run(path: Path) -> dict[str, Path]:
    """The models at `path`: dense and pruned of a run, or the one that the folder itself is."""
    if (path / "config.json").is_file():
        return {path.resolve().name: path} if path.name not in ("model", "dense", "slim") else {path.name: path}
    folders = {"dense": path / "dense", "pruned": path / "model"}
    if not (path / "dense" / "config.json").is_file():
        folders["dense"] = _start(path) or folders["dense"]
    there = {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}
    if "pruned" not in there:
        raise ModelError(
            f"{path}: expected the output folder of `upop prune` (with model/) or a model folder (with config.json), "
            + (_hint(path) if path.is_dir() else "there is no such folder")
        )
    return there


def _start(path: Path) -> Path | None:
    """The model folder that a run began from, where it trained no dense model of its own."""
    config = _result(path).get("config")
    start = Path(str(config.get("model", "")) if isinstance(config, dict) else "")
    return start if (start / "config.json").is_file() else None


def _hint(path: Path) -> str:
    runs = sorted(child.parent.name for child in path.glob("*/model") if (child / "config.json").is_file())
    return f"found neither; did you mean {path / runs[0]}?" if runs else "found neither"


def _result(run: Path) -> dict[str, Any]:
    try:
        return read_json(run / "result.json")
    except (OSError, UpopError):
        return {}


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (
        (digest := weights_hash(one)) is not None and digest == weights_hash(other)
    )


def load_viewed(folders: Mapping[str, Path], *, device: str) -> list[Viewed]:
    """The models in `folders`, ready to be asked. Raises ModelError for one that cannot be loaded."""
    found = []
    for name, folder in folders.items():
        loaded = load_model(str(folder))
        config: Any = loaded.model.config
        if config.problem_type == "regression":
            raise ModelError(f"{folder}: expected a classifier, got a model for regression, which names no classes")
        try:
            own_widths = widths(find_structures(loaded.model))
        except ModelError:
            own_widths = {}
        params, macs = count_params(loaded.model), count_macs(loaded.model)
        loaded.model.to(device)
        processor = image_processor(str(folder), loaded)
        found.append(Viewed(name, folder, loaded, processor, params, macs, own_widths, _accuracy(folder)))
    return found


def _accuracy(folder: Path) -> float | None:
    """Test accuracy as the run above the folder has recorded it, if these are still the weights."""
    result = _result(folder.parent)
    try:
        stages = result["accuracy"]
        if folder.name == "dense":
            return float(stages["dense"]["test"])
        last = [found for found in stages.values() if "test" in found][-1]
        return float(last["test"]) if result["weights"] == weights_hash(folder) else None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def read_image(data: bytes) -> Image.Image:
    """The picture in an uploaded file: RGB, upright, the first frame where there are several.

    Raises DataError for anything else, and for pictures of more than MOST_PIXELS, before they are decoded.
    """
    if not data:
        raise DataError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is a warning at first; ours comes before it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(
                f"expected at most {MOST_PIXELS // 2**20} megapixels, got {width:,} x {height:,} pixels; shrink it"
            )
        with image:
            return upright(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"this is not an image; expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise about anything on broken files
        raise DataError(f"this image cannot be read ({said(error, 300)})") from error


@torch.no_grad()
def predict(models: Sequence[Viewed], image: Image.Image, *, seconds: float = 0.5) -> list[Prediction]:
    """What each model says of an RGB image of any size, and the median time of its forward pass, batch 1.

    Models are timed in turns, for about `seconds` in all. Raises DataError for an image of a shape that they cannot
    be given.
    """
    passes, tops = {}, {}
    for viewed in models:
        model: Any = viewed.loaded.model
        pixels = _pixels(viewed, image)
        passes[viewed.name] = lambda model=model, pixels=pixels: model(pixel_values=pixels)
        tops[viewed.name] = _top(model(pixel_values=pixels).logits[0], model.config)
    device = next(models[0].loaded.model.parameters()).device
    times = time_in_turns(passes, device=device, min_runs=5, max_seconds=seconds)
    return [Prediction(viewed.name, tops[viewed.name], times[viewed.name].median_ms) for viewed in models]


def _pixels(viewed: Viewed, image: Image.Image) -> Tensor:
    """Image as the model wants it, [1, 3, size, size]."""
    try:
        pixels: Tensor = viewed.processor(images=image, return_tensors="pt")["pixel_values"]
    except ValueError as error:
        raise DataError(
            f"an image of {image.width} x {image.height} pixels cannot be used ({one_line(error)})"
        ) from error
    return pixels.to(next(viewed.loaded.model.parameters()).device)


def _top(logits_C: Tensor, config: Any) -> tuple[tuple[str, float], ...]:
    # As pipelines have it: of one logit, or of labels that do not exclude each other, each is a yes or no by itself.
    apart = len(logits_C) == 1 or config.problem_type == "multi_label_classification"
    scores = logits_C.float().sigmoid() if apart else logits_C.float().softmax(-1)
    found = scores.topk(min(TOP, len(logits_C)))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return tuple((str(config.id2label.get(index, index)), value) for index, value in pairs)


@dataclass(frozen=True)
class Rows:
    """The widths of one kind, to be drawn: each model's, against the widest of all."""

    label: str
    layers: int
    widest: int
    models: tuple[tuple[str, tuple[int, ...]], ...]


def width_rows(models: Sequence[Viewed]) -> list[Rows]:
    """One a kind of units, of the models that have it."""
    widest: dict[str, int] = {}
    for viewed in models:
        for kind, values in viewed.widths.items():
            scale = SCALE.get(kind, kind)
            widest[scale] = max(widest.get(scale, 1), *values)
    rows = []
    for kind in dict.fromkeys(kind for viewed in models for kind in viewed.widths):
        own = tuple((viewed.name, tuple(viewed.widths[kind])) for viewed in models if kind in viewed.widths)
        layers = max(len(values) for _, values in own)
        rows.append(Rows(KIND_LABELS.get(kind, kind), layers, widest[SCALE.get(kind, kind)], own))
    return rows


def samples(data: str) -> list[tuple[str, bytes]]:
    """Some test images of a data set to try: true class and PNG file. Raises UpopError where it cannot be read."""
    # At least one of each class.
    subset = None if data == "digits" else max(100, len(find(data, skip_bad=True).classes))
    # The whole central square: a model's own processor cuts off what it does not look at.
    found = load_data(data, subset=subset, skip_bad=True, image_size=SAMPLE_SIZE, shorter_side=SAMPLE_SIZE)
    split = found.test if found.test is not None else found.validation
    step = max(1, len(split) // SAMPLES)
    chosen = []
    for index in range(0, min(len(split), step * SAMPLES), step):
        pixels = split.images[index] if isinstance(split, MemorySplit) else split[index]
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(file, "PNG")
        chosen.append((found.classes[int(split.labels[index])], file.getvalue()))
    if not chosen:
        raise UpopError(f"{data}: expected test images to try, found none")
    return chosen
