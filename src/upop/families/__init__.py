"""Families: where the prunable structures of a kind of model are. One small module per library.

A family describes; it must not mask, rank or cut. Import of a family must not import its library.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from upop.errors import ModelError
from upop.families import hf
from upop.structures import Structure


@dataclass(frozen=True)
class Family:
    """A kind of model that upop can prune.

    Attributes:
        name: shown to users.
        matches: whether a model belongs to the family.
        find: the model's structures, in layer order; raises ModelError for a model it cannot prune.
        finish_: called on a freshly slimmed model, so that it can describe itself (class, config) when saved.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    find: Callable[[nn.Module], tuple[Structure, ...]]
    finish_: Callable[[nn.Module], None]


def _adopt_hf_(model: nn.Module) -> None:
    # On first need: transformers' model code takes two seconds to import.
    from upop.modeling import adopt_

    adopt_(model)


FAMILIES: list[Family] = [Family("Hugging Face ViT and DeiT", hf.matches, hf.find_structures, _adopt_hf_)]


def find_family(model: nn.Module) -> Family:
    """The family that `model` belongs to; raises ModelError that names what stands in the way."""
    for family in FAMILIES:
        if family.matches(model):
            return family
    raise ModelError(
        f"{type(model).__name__}: unsupported model; expected one of: {', '.join(f.name for f in FAMILIES)} "
        f"(classification); unsupported modules: {_modules_with_weights(model)}"
    )


def find_structures(model: nn.Module) -> tuple[Structure, ...]:
    """The prunable structures of `model`, in layer order; raises ModelError for unsupported models."""
    return find_family(model).find(model)


def _modules_with_weights(model: nn.Module) -> str:
    """The kinds of modules that hold weights, each with its count and first path."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            kind = type(module).__name__
            first.setdefault(kind, path or "the model itself")
            count[kind] += 1
    shown = [f"{kind} x{count[kind]} ({first[kind]})" for kind in list(first)[:6]]
    return ", ".join(shown) + (", ..." if len(first) > 6 else "") if shown else "none with weights"
