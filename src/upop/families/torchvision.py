"""torchvision's VisionTransformer; must not import torchvision.

Its attentions are torch.nn.MultiheadAttention: q, k and v are one Parameter as wide as the model, of which nothing can
be cut. `split_attentions_` puts the same computation, with Linears, in their place.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.errors import ModelError
from upop.families.parts import attention, blocks, mlp
from upop.structures import Structure

Model = TypeVar("Model", bound=nn.Module)


class SplitAttention(nn.Module):
    """What an nn.MultiheadAttention (`batch_first`, q, k and v of one width) computes, with a Linear for each of them.

    The scale of the softmax stays that of the dense head dim. Parameters that are frozen stay frozen.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.dropout = whole.head_dim, whole.head_dim**-0.5, whole.dropout
        weights = whole.in_proj_weight.chunk(3)
        biases = [None] * 3 if whole.in_proj_bias is None else whole.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = _linear(whole.out_proj.weight, whole.out_proj.bias)
        self.train(whole.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """[B, N, D] or [N, D] three times -> the same, and None in place of attention's weights, needed or not.

        The arguments are nn.MultiheadAttention's. Raises ModelError for masks.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ModelError(
                "SplitAttention: expected no masks, got one; leave it out, or describe a model of your own with "
                "upop.families.register_family (docs/families.md)"
            )
        heads = self.q_proj.out_features // self.head_dim
        q_BHNK, k_BHNK, v_BHNV = (
            projection(x).unflatten(-1, (heads, -1)).transpose(-3, -2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNV, dropout_p=dropout, scale=self.scaling)
        return self.out_proj(mixed.transpose(-3, -2).flatten(-2)), None


def split_attentions_(model: Model) -> Model:
    """Give every nn.MultiheadAttention in `model` its q, k and v as Linears, in place; returns `model`.

    Outputs stay the same but for rounding; the names of the attentions' parameters change. Raises ModelError, and
    changes nothing, where one of them is no plain self-attention of batches, or belongs to a layer of torch's own.
    """
    named = model.named_modules(remove_duplicate=False)
    wholes = {path: module for path, module in named if isinstance(module, nn.MultiheadAttention)}
    for path, whole in wholes.items():
        _check(model, path, whole)
    split = {whole: SplitAttention(whole) for whole in wholes.values()}
    for path, whole in wholes.items():
        model.set_submodule(path, split[whole])
    return model


def torch_layer(model: nn.Module, path: str) -> str | None:
    """Name of the layer of torch's own that the attention at `path` is part of; such layers read its parameters."""
    around = model.get_submodule(path.rpartition(".")[0])
    own = isinstance(around, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return f"torch.nn.{type(around).__name__}" if own else None


def _check(model: nn.Module, path: str, whole: nn.MultiheadAttention) -> None:
    """Raise ModelError unless a SplitAttention can take the place of `whole`."""
    if not path:
        raise ModelError("the model: expected one with attentions in it, got an attention; give the model around it")
    if (layer := torch_layer(model, path)) is not None:
        raise ModelError(
            f"{path}: expected an attention that is only called, got one of a {layer}, which reads its parameters; "
            "write that layer with Linears for q, k and v, and describe it (docs/families.md)"
        )
    extra = whole.bias_k is not None or whole.add_zero_attn
    if type(whole) is not nn.MultiheadAttention or not whole.batch_first or whole.in_proj_weight is None or extra:
        raise ModelError(
            f"{path}: expected a self-attention with batch_first=True, one width, no bias_k and no add_zero_attn, got "
            "another; describe this model with upop.families.register_family (docs/families.md)"
        )


def matches(model: nn.Module) -> bool:
    """True for torchvision's vit_b_16 and its relatives."""
    kind = type(model)
    return kind.__module__ == "torchvision.models.vision_transformer" and kind.__name__ == "VisionTransformer"


def find_structures(model: nn.Module) -> tuple[Structure, ...]:
    """`attn.<layer>`: head dims, shared by q, k, v and all heads; `mlp.<layer>`: hidden neurons.

    Raises ModelError where the attentions are not split yet.
    """
    structures: list[Structure] = []
    for layer, path in enumerate(blocks(model, "encoder.layers")):
        own: Any = model.get_submodule(f"{path}.self_attention")
        if isinstance(own, nn.MultiheadAttention):
            raise ModelError(
                f"{path}.self_attention: expected q, k and v as Linears, got an nn.MultiheadAttention, of which "
                "nothing can be cut; call upop.families.torchvision.split_attentions_(model) first: the same outputs"
            )
        allows = ("dims", "head")
        structures.append(attention(model, layer, f"{path}.self_attention", out="out_proj", allows=allows))
        structures.append(mlp(model, layer, f"{path}.mlp", fc1="0", act="1", fc2="3"))
    return tuple(structures)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    found = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        found.weight.copy_(weight)
        if bias is not None:
            found.bias.copy_(bias)
            found.bias.requires_grad_(bias.requires_grad)
    found.weight.requires_grad_(weight.requires_grad)
    return found
