"""timm's VisionTransformer, and everything else that is built of its blocks; must not import timm.

Blocks are found by their class, wherever they are: what is cut is inside a block, the model around it does not matter.
"""

from collections import Counter

from torch import nn

from upop.errors import ModelError
from upop.families.parts import (
    MissingPartError,
    fused_attention,
    gated_mlp,
    installed,
    mlp,
    packed_mlp,
    require_absent,
)
from upop.structures import Structure

BLOCKS = ("Block", "ResPostBlock", "ParallelThingsBlock")


def matches(model: nn.Module) -> bool:
    """True for a model with at least one block of timm's vision_transformer."""
    return any(_is_block(module) for module in model.modules())


def find_structures(model: nn.Module) -> tuple[Structure, ...]:
    """`attn.<n>`: head dims, shared by q, k, v and all heads; `mlp.<n>`: hidden neurons; n counts within the kind.

    Raises ModelError for another layout, and for blocks that normalise what would be cut.
    """
    structures: list[Structure] = []
    seen: Counter[str] = Counter()
    try:
        for path, module in model.named_modules():
            if _is_block(module):
                # Where a norm stands after a branch, a branch of zeros would still add the norm's bias.
                block = path if type(module).__name__ == "Block" else ""
                parts = module.named_modules(prefix=path)
                found = [s for name, m in parts for s in _describe(model, name, m, seen, block)]
                _require_all_described(module, path, found)
                structures += found
    except MissingPartError as error:
        raise ModelError(
            f"{error}; expected the layout of timm 1.0.23 and later, got that of {installed('timm')}"
        ) from None
    return tuple(structures)


def _is_block(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__ == "timm.models.vision_transformer" and kind.__name__ in BLOCKS


def _require_all_described(block: nn.Module, path: str, structures: list[Structure]) -> None:
    owned = {port.path for s in structures for port in (*s.producers, *s.consumers)}
    for name, module in block.named_modules(prefix=path):
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in owned:
            parent = name.rpartition(".")[0]
            kind = type(block.get_submodule(parent.removeprefix(path).removeprefix("."))).__name__
            raise ModelError(
                f"{name}: expected blocks of timm's Attention and Mlp, GluMlp or SwiGLU only, got a {kind} with "
                "weights of its own; describe this model with upop.families.register_family (docs/families.md)"
            )


def _describe(model: nn.Module, path: str, module: nn.Module, seen: Counter[str], block: str) -> list[Structure]:
    """The structure that `module` itself is, if any; `seen` counts structures per kind."""
    kind = type(module).__name__
    if kind == "Attention":
        why = "head dims that are normalised together, or gated, cannot be cut exactly"
        require_absent(module, path, ("q_norm", "k_norm", "norm", "gate"), why)
        found = fused_attention(model, seen["attn"], path, block=block)
    elif kind in ("Mlp", "GluMlp", "SwiGLU"):
        require_absent(module, path, ("norm",), "neurons that are normalised together cannot be cut exactly")
        if kind == "Mlp":
            found = mlp(model, seen["mlp"], path, act="act", block=block)
        elif kind == "GluMlp":
            found = packed_mlp(model, seen["mlp"], path, block=block)
        else:
            found = gated_mlp(model, seen["mlp"], path, gate="fc1_g", up="fc1_x", down="fc2", block=block)
    else:
        return []
    seen[found.kind] += 1
    return [found]
