"""Folders of slimmed timm models: safetensors, and a config.json that says which architecture, with which widths.

config.json is timm's own (`architecture`, `model_args`), with the widths under `upop`. timm is imported on first need.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from upop.errors import ModelError, said
from upop.families import OTHERWISE, find_structures
from upop.families.parts import installed
from upop.structures import Structure, widths
from upop.surgery import cut_
from upop.vetting import Promise, check_shapes

KEY, WEIGHTS = "upop", "model.safetensors"
ADVICE = "give what it was made with: upop.save_pretrained(model, folder, timm_args={...})"


def save(model: nn.Module, folder: Path, arguments: Mapping[str, Any] | None = None) -> None:
    """Write `model`, made by `timm.create_model(name, **arguments)` and slimmed, to `folder`.

    Image size, channels, classes, pooling and depth are read off the model; `arguments` has what is not. The model is
    made again from what is written, and compared. Raises ModelError where it would come out otherwise.
    """
    anything: Any = model
    name = (getattr(anything, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise ModelError(
            f"{type(model).__name__}: expected a model of timm.create_model, which knows its architecture's name, got "
            f"one without; {OTHERWISE}"
        )
    given = _read_off(anything) | dict(arguments or {})
    found = widths(find_structures(model))
    with torch.device("meta"):
        again = _build(name, given, found)
    if difference := _difference(again, model):
        raise ModelError(f"{name}: {difference}; {ADVICE}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": name,
        "num_classes": anything.num_classes,
        "model_args": given,
        "pretrained_cfg": {k: v for k, v in dict(anything.pretrained_cfg).items() if _is_plain(v)},
        KEY: {"widths": found},
    }
    text = json.dumps(config, indent=2)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load(folder: Path, config: Mapping[str, Any], promise: Promise) -> nn.Module:
    """The slimmed timm model in `folder`, whose config.json holds `config`. Raises ModelError."""
    try:
        name, given, found = config["architecture"], config["model_args"], config[KEY]["widths"]
        with torch.device("meta"):
            check_shapes(_build(name, given, found), promise)
        model = _build(name, given, found)
        weights = load_file(folder / WEIGHTS)
        # The numbers that were saved, in the format they had.
        for key, value in model.state_dict(keep_vars=True).items():
            value.data = value.data.to(weights[key].dtype) if key in weights else value.data
        model.load_state_dict(weights)
    except ModelError:
        raise
    except Exception as error:  # whatever timm or torch make of somebody's config
        raise ModelError(f"{folder}: cannot load the timm model ({said(error)})") from error
    return model


def _read_off(model: Any) -> dict[str, Any]:
    """Those arguments of timm.create_model that a model shows."""
    try:
        patches = model.patch_embed
        return {
            "num_classes": model.num_classes,
            "img_size": list(patches.img_size),
            "in_chans": patches.proj.in_channels,
            "global_pool": model.global_pool,
            "depth": len(model.blocks),
        }
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__}: expected a model laid out as timm's VisionTransformer, to save it as a folder: "
            f"{error}; {OTHERWISE}"
        ) from None


def _build(name: str, arguments: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> nn.Module:
    """The architecture with fresh weights, cut to the widths `found`: kind -> one number a layer."""
    timm = _timm()
    # What is create_model's own, not the architecture's, reads files and downloads: a folder has no say in that.
    own = [key for key in arguments if key in inspect.signature(timm.create_model).parameters]
    if own or not isinstance(name, str) or not timm.is_model(name):
        raise ModelError(
            f"config.json: expected an architecture of this timm ({installed('timm')}) with arguments of its own, got "
            f"{name!r} with {', '.join(own) or 'no other'}"
        )
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments).eval()
    structures = find_structures(model)
    cut_(model, structures, {s.name: _first(s, found) for s in structures})
    return model


def _first(s: Structure, found: Mapping[str, Sequence[int]]) -> torch.Tensor:
    each = found.get(s.kind)
    if not isinstance(each, list) or s.layer >= len(each) or type(each[s.layer]) is not int:
        raise ModelError(f"config.json: {KEY}.widths.{s.kind}: expected a number for each layer, got {each}")
    if not 1 <= each[s.layer] <= s.units:
        raise ModelError(f"config.json: {KEY}.widths.{s.kind}: expected numbers in [1, {s.units}], got {each}")
    # Which units does not matter, their weights are still to come.
    stays: torch.Tensor = torch.arange(s.units, device="cpu") < each[s.layer]
    return stays


def other_tensor(again: nn.Module, model: nn.Module, maker: str) -> str:
    """The first tensor that `again`, which `maker` makes, lacks, or has in another shape or alone; empty: none."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in again.state_dict().items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            return f"{name}: expected {wanted.get(name)}, {maker} makes {found.get(name)}"
    return ""


def _difference(again: nn.Module, model: nn.Module) -> str:
    """What the model that a folder makes would not share with the one that is saved; empty where nothing."""
    if tensor := other_tensor(again, model, "timm"):
        return tensor
    modules = dict(again.named_modules())
    for path, module in model.named_modules():
        other = modules.get(path)
        if type(other) is not type(module) or not _are_alike(_plain(other), _plain(module)):
            return f"{path or 'the model'}: expected {_plain(module)}, timm makes {_plain(other)}"
    return ""


def _are_alike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether settings are the same; fractions that follow a width were rounded each time that it was cut."""
    return found.keys() == wanted.keys() and all(
        found[key] == value
        or (isinstance(value, float) and isinstance(found[key], float) and math.isclose(found[key], value))
        for key, value in wanted.items()
    )


def _plain(module: nn.Module | None) -> dict[str, Any]:
    """The settings of a module that are no modules or tensors: sizes, eps, rates, names."""
    hidden = ("training", "pretrained_cfg", "default_cfg", "grad_checkpointing")
    values = {} if module is None else vars(module)
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in hidden and _is_plain(v)}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"a timm model: timm cannot be imported ({error}); pip install timm") from error
    module: ModuleType = timm
    return module
