"""What a model folder holds, judged before anything is built from it: whoever wrote it, it must keep its promises.

Reads config.json and the headers of the weights. Must not build a model or load a tensor.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from upop.errors import ModelError, UpopError
from upop.reading import check_file, read_json, size

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_CONFIG = 16 * 2**20  # bytes; a name for each of 100,000 classes is 5 MB
MOST_LAYERS = 10_000
FEW_LAYERS = 64  # that cost nothing, and a text tower that is not there may name
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
# Of numbers that transformers builds something from before weights are read, or makes a list of that length.
COUNTS = ("num_hidden_layers", "num_layers", "num_labels", "depth", "num_attention_heads", "num_register_tokens")
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "projection_dim",
    "mlp_ratio",
)
HEADS = ("classifier", "pooler", "head")


@dataclass(frozen=True)
class Promise:
    """What the headers of a folder's weights say: names of tensors, and numbers in all of them."""

    folder: Path
    names: frozenset[str]
    numbers: int


def vet(folder: Path) -> Promise:
    """Raise ModelError, one line that says what to do, for a folder that no model can be loaded from safely.

    That is: no readable config.json, counts in it that the weights cannot fill, weights that only pickle could load,
    files of weights that are damaged, cut short, missing or not in the folder.
    """
    try:
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: expected a model folder with config.json and {WEIGHTS}, {_instead(folder)}")
        config = read_json(folder / "config.json", most=MOST_CONFIG)
        shapes = [shape for file in _files(folder) for shape in _shapes(file)]
    except ModelError:
        raise
    except UpopError as error:
        raise ModelError(f"{error}{'' if ';' in str(error) else '; copy or download the folder again'}") from None
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from None
    name, times = Counter(name for name, _ in shapes).most_common(1)[0] if shapes else ("", 0)
    if times > 1:
        raise ModelError(f"{folder}: expected every tensor once, got {name} in {times} files; save the model again")
    promise = Promise(folder, frozenset(name for name, _ in shapes), sum(numbers for _, numbers in shapes))
    _check_counts(config, promise, folder / "config.json")
    return promise


def check_shapes(model: nn.Module, promise: Promise) -> None:
    """Raise ModelError where `model`, built without memory from the folder's config, is larger than its weights.

    A head may be missing. Else a few bytes of config.json would make transformers fill any amount of memory with
    fresh weights before it tells.
    """
    parameters = [(name, p.numel()) for name, p in model.named_parameters()]
    body = sum(count for name, count in parameters if not any(head in name for head in HEADS))
    head = sum(count for name, count in parameters if any(head in name for head in HEADS))
    if body > promise.numbers or head > max(promise.numbers, 2**28):
        raise ModelError(
            f"{promise.folder}: config.json describes {body + head:,} parameters, the weights hold "
            f"{promise.numbers:,}; they do not belong together, save the model again"
        )


def check_finite(model: nn.Module, folder: str) -> None:
    """Raise ModelError for weights that are infinite or no numbers: what is computed from them means nothing."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{folder}: {name}: weights that are not finite (NaN or infinite); save a sound model")


def _instead(folder: Path) -> str:
    """What there is where a folder with config.json was expected, and what to do."""
    if (folder / "model/config.json").exists():
        return f"found no config.json; did you mean {folder / 'model'}?"
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    weights = [file for file in files if file.suffix in (*PICKLED, ".safetensors")]
    if not weights:
        return "got a file" if folder.is_file() else "found no config.json"
    runs = ", and can run code when it is loaded" if weights[0].suffix in PICKLED else ""
    return (
        f"got {weights[0].name}, which does not say of what model it is{runs}; build the model in Python, load the "
        "weights into it, and upop.save_pretrained(model, FOLDER) it once"
    )


def _files(folder: Path) -> list[Path]:
    """The files of weights; those of an index must lie in the folder itself."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if not others:
            raise ModelError(
                f"{folder}: expected weights in {WEIGHTS}, found none; others, which can run code when they "
                "are loaded, are not read"
            )
        raise ModelError(
            f"{folder}: expected weights in {WEIGHTS}, found {others[0]} only, which can run code when it is loaded; "
            "if you trust where it comes from, load it with transformers and save_pretrained() it once"
        )
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{folder / INDEX}: expected weight_map with the file of each tensor; save the model again")
    files = sorted(set(names.values()))
    for name in files:
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX}: expected names of .safetensors files beside it, got {name[:100]!r}")
        if not (folder / name).exists():
            raise ModelError(f"{folder}: expected {len(files)} files of weights, {name} is missing; copy them again")
    return [folder / name for name in files]


def _shapes(file: Path) -> Iterator[tuple[str, int]]:
    """(name, numbers) of each tensor, as the header says; safetensors checks that the file is as long as that."""
    check_file(file)
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                yield name, torch.Size(opened.get_slice(name).get_shape()).numel()
    except (SafetensorError, OverflowError, RuntimeError) as error:
        raise ModelError(
            f"{file}: damaged or cut short (SafetensorError: {str(error)[:150]}); copy it again"
        ) from None


def _check_counts(config: Mapping[str, Any], promise: Promise, file: Path) -> None:
    """Refuse what would make a loop or a list longer than the weights can account for."""
    for key, value in _values(config):
        if key in ("num_hidden_layers", "num_layers", "depth"):
            most = min(max(len(promise.names), FEW_LAYERS), MOST_LAYERS)
        elif key in (*COUNTS, *WIDTHS):
            most = max(promise.numbers, 2**16)
        else:
            continue
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (not isinstance(number, int | float) or not 0 <= number <= most):
                raise ModelError(
                    f"{file}: {key}: expected a number that the weights can fill ({len(promise.names)} tensors, "
                    f"{size(4 * promise.numbers)}), got {str(number)[:50]}; save the model again"
                )


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, of parts such as vision_config too."""
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            else:
                yield key, value
