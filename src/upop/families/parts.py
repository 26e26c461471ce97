"""Parts: the attentions and MLPs that transformers are built of, described by the names of their modules.

What a family is written with: `blocks`, `attention`, `fused_attention`, `mlp`, `gated_mlp`, `packed_mlp`. Must not
know a library: names come from outside. A name that is not there raises MissingPartError, which says which.
"""

from importlib import metadata

import torch
from torch import nn

from upop.errors import ModelError
from upop.structures import Attribute, Port, Structure, linear, make_structure


class MissingPartError(ModelError):
    """A module or attribute that a family's description names is not in the model."""


def blocks(model: nn.Module, *candidates: str) -> list[str]:
    """Paths of the model's blocks, in order; `candidates` are the paths that their list may have."""
    for path in candidates:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        return [f"{path}.{name}" for name, _ in found.named_children()]
    raise MissingPartError(f"{type(model).__name__}: {' or '.join(candidates)}, the list of blocks, is missing")


def attention(
    model: nn.Module,
    layer: int,
    path: str,
    *,
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    out: str = "o_proj",
    head_dim: str = "head_dim",
    scale: str | None = "scaling",
    block: str = "",
    allows: tuple[str, ...] = ("dims",),
) -> Structure:
    """`attn.<layer>`: the head dims of an attention with a Linear each for q, k and v: rows (heads, head_dim).

    `block` is the path of the block around it, where leaving out the block's Linears leaves its input as it is.
    `allows` names finer kinds: `head` where the number of heads is inferred from the shapes, `qk` and `v` where
    values may have another width than queries.

    `head_dim` and `scale` are attributes of the module at `path`. The softmax scale is left alone, so that logits
    keep the original `head_dim ** -0.5`; `scale=None` says that the model computes it anew from the width (as
    scaled_dot_product_attention does), which is then made up for in the rows of q.
    """
    units = int(number(model, path, head_dim))
    heads = _linear(model, f"{path}.{q}").out_features // units
    if scale is not None:
        number(model, path, scale)
    producers = [Port(f"{path}.{q}", outer=heads, rescaled=0 if scale is not None else heads)]
    producers += [Port(f"{path}.{name}", outer=heads) for name in (k, v)]
    consumer, attributes = Port(f"{path}.{out}", outer=heads), [Attribute(path, head_dim)]
    return _structure(model, "attn", layer, units, producers, consumer, attributes, block=block, allows=allows)


def split_attention(
    model: nn.Module,
    layer: int,
    path: str,
    *,
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    out: str = "o_proj",
    head_dim: str = "head_dim",
    block: str = "",
    allows: tuple[str, ...] = (),
) -> tuple[Structure, Structure]:
    """`qk.<layer>` and `v.<layer>`: the head dims of an attention whose values are not as wide as its queries.

    `allows` may name `head`, as in `attention`.
    """
    heads = _linear(model, f"{path}.{q}").out_features // int(number(model, path, head_dim))

    def structure(kind: str, producers: list[str], consumers: list[str], attributes: list[Attribute]) -> Structure:
        units = _linear(model, f"{path}.{producers[0]}").out_features
        ports = [[Port(f"{path}.{name}") for name in names] for names in (producers, consumers)]
        return make_structure(
            model,
            kind=kind,
            layer=layer,
            units=units,
            producers=ports[0],
            consumers=ports[1],
            attributes=attributes,
            lanes=heads,
            block=block,
            allows=allows,
        )

    return structure("qk", [q, k], [], [Attribute(path, head_dim)]), structure("v", [v], [out], [])


def fused_attention(
    model: nn.Module,
    layer: int,
    path: str,
    *,
    qkv: str = "qkv",
    out: str = "proj",
    heads: str = "num_heads",
    head_dim: str = "head_dim",
    width: str | None = "attn_dim",
    scale: str | None = "scale",
    block: str = "",
) -> Structure:
    """`attn.<layer>`: the head dims of an attention with one Linear for q, k and v: rows (3, heads, head_dim).

    The softmax scale is taken to follow the width, as in scaled_dot_product_attention; the attribute `scale`, which
    the unfused path reads, is made to follow as well. The rows of q make up for both: logits keep the original scale.
    `width` is the attribute that holds heads * head_dim.
    """
    count, units = int(number(model, path, heads)), int(number(model, path, head_dim))
    attributes = [Attribute(path, head_dim)]
    if width is not None:
        number(model, path, width)
        attributes.append(Attribute(path, width, per_unit=count))
    if scale is not None:
        at_one = number(model, path, scale) * units**0.5
        attributes.append(Attribute(path, scale, per_unit=at_one, exponent=-0.5))
    producer = Port(f"{path}.{qkv}", outer=3 * count, rescaled=count)
    consumer = Port(f"{path}.{out}", outer=count)
    return _structure(model, "attn", layer, units, [producer], consumer, attributes, block=block, allows=("dims",))


def mlp(
    model: nn.Module,
    layer: int,
    path: str,
    *,
    fc1: str = "fc1",
    fc2: str = "fc2",
    act: str = "activation_fn",
    block: str = "",
) -> Structure:
    """`mlp.<layer>`: the hidden neurons of `fc2(act(fc1(x)))`.

    Raises ModelError for an activation f with f(0) != 0: a unit masked to 0 before it would still contribute f(0).
    """
    require_zero_at_zero(part(model, f"{path}.{act}"), f"{path}.{act}")
    units = _linear(model, f"{path}.{fc1}").out_features
    return _structure(model, "mlp", layer, units, [Port(f"{path}.{fc1}")], Port(f"{path}.{fc2}"), block=block)


def gated_mlp(
    model: nn.Module,
    layer: int,
    path: str,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    block: str = "",
) -> Structure:
    """`mlp.<layer>`: the hidden neurons of `down(act(gate(x)) * up(x))`; any act will do, up being 0 is enough."""
    units = _linear(model, f"{path}.{up}").out_features
    producers = [Port(f"{path}.{name}") for name in (gate, up)]
    return _structure(model, "mlp", layer, units, producers, Port(f"{path}.{down}"), block=block)


def packed_mlp(
    model: nn.Module, layer: int, path: str, *, fc1: str = "fc1", fc2: str = "fc2", block: str = ""
) -> Structure:
    """`mlp.<layer>`: the hidden neurons of a gated MLP with gate and up in one Linear: rows (2, neurons)."""
    units = _linear(model, f"{path}.{fc2}").in_features
    producer = Port(f"{path}.{fc1}", outer=2)
    return _structure(model, "mlp", layer, units, [producer], Port(f"{path}.{fc2}"), block=block)


def part(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; raises MissingPartError."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise MissingPartError(f"{type(model).__name__}: {path} is missing") from None


def number(model: nn.Module, path: str, name: str) -> float:
    """The number `name` of the module at `path`; raises MissingPartError."""
    value = getattr(part(model, path), name, None)
    if not isinstance(value, int | float):
        raise MissingPartError(f"{type(model).__name__}: {path}.{name}, a number, is missing")
    return value


def require_zero_at_zero(activation: nn.Module, path: str) -> None:
    """Raise ModelError unless `activation` maps 0 to 0."""
    value = float(activation(torch.zeros(1, device="cpu")))
    if value != 0:
        raise ModelError(
            f"{path}: expected an activation f with f(0) = 0 (GELU, ReLU, SiLU), got {type(activation).__name__} "
            f"with f(0) = {value:g}; masked neurons would not be silent, so this MLP cannot be pruned exactly"
        )


def installed(library: str) -> str:
    """The version of `library` that is installed, for messages."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "no installed version"


def require_absent(module: nn.Module, path: str, names: tuple[str, ...], why: str) -> None:
    """Raise ModelError where one of the submodules `names` (None and Identity count as absent) is in `module`."""
    for name in names:
        found = getattr(module, name, None)
        if found is not None and not isinstance(found, nn.Identity):
            raise ModelError(
                f"{path}.{name}: expected none, got {type(found).__name__}: {why}; to prune the other layers alone, "
                "register a family that leaves this one out (docs/families.md)"
            )


def _linear(model: nn.Module, path: str) -> nn.Linear:
    part(model, path)
    return linear(model, path)


def _structure(
    model: nn.Module,
    kind: str,
    layer: int,
    units: int,
    producers: list[Port],
    consumer: Port,
    attributes: list[Attribute] | None = None,
    *,
    block: str = "",
    allows: tuple[str, ...] = (),
) -> Structure:
    for port in (*producers, consumer):
        part(model, port.path)
    return make_structure(
        model,
        kind=kind,
        layer=layer,
        units=units,
        producers=producers,
        consumers=[consumer],
        attributes=attributes or [],
        block=block,
        allows=allows,
    )
