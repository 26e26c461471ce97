"""Hugging Face ViT and DeiT (plain, distilled, with teacher), as laid out since transformers 5.9.

Describes where the structures are, by the names of modules; must not import transformers.
"""

import torch
from torch import nn

from upop.errors import ModelError
from upop.structures import Attribute, Port, Structure, linear, make_structure

CLASSES = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)


def matches(model: nn.Module) -> bool:
    """True for a classifier of transformers' ViT or DeiT, and for subclasses such as slimmed models."""
    return any(c.__module__.startswith("transformers.models.") and c.__name__ in CLASSES for c in type(model).__mro__)


def find_structures(model: nn.Module) -> tuple[Structure, ...]:
    """`attn.<layer>`: head dims, shared by q, k, v and all heads; `mlp.<layer>`: hidden neurons.

    Raises ModelError for an unknown layout, or an activation f with f(0) != 0: an MLP unit masked to 0 before it
    would still contribute f(0).
    """
    prefix = str(model.base_model_prefix)
    structures: list[Structure] = []
    try:
        layers = model.get_submodule(f"{prefix}.layers")
        for layer in range(len(list(layers.children()))):
            structures += _layer_structures(model, f"{prefix}.layers.{layer}", layer)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__}: expected blocks at {prefix}.layers, laid out as in transformers 5.9 and later "
            f"({error}); upgrade transformers"
        ) from None
    return tuple(structures)


def _layer_structures(model: nn.Module, path: str, layer: int) -> list[Structure]:
    attention, mlp = f"{path}.attention", f"{path}.mlp"
    head_dim = int(getattr(model.get_submodule(attention), "head_dim"))  # noqa: B009 - get_submodule is untyped
    heads = linear(model, f"{attention}.q_proj").out_features // head_dim
    _require_zero_at_zero(model.get_submodule(f"{mlp}.activation_fn"), f"{mlp}.activation_fn")
    return [
        make_structure(
            model,
            kind="attn",
            layer=layer,
            units=head_dim,
            producers=[Port(f"{attention}.{name}", outer=heads) for name in ("q_proj", "k_proj", "v_proj")],
            consumers=[Port(f"{attention}.o_proj", outer=heads)],
            # `scaling` is left alone: logits must keep the original 1/sqrt(head_dim).
            attributes=[Attribute(attention, "head_dim")],
        ),
        make_structure(
            model,
            kind="mlp",
            layer=layer,
            units=linear(model, f"{mlp}.fc1").out_features,
            producers=[Port(f"{mlp}.fc1")],
            consumers=[Port(f"{mlp}.fc2")],
        ),
    ]


def _require_zero_at_zero(activation: nn.Module, path: str) -> None:
    value = float(activation(torch.zeros(1, device="cpu")))
    if value != 0:
        raise ModelError(
            f"{path}: expected an activation f with f(0) = 0 (GELU, ReLU, SiLU), got {type(activation).__name__} "
            f"with f(0) = {value:g}; masked neurons would not be silent, so this MLP cannot be pruned exactly"
        )
