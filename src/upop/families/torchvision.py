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

    The scale of the softmax stays that of the dense head dim.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.dropout = whole.head_dim, whole.head_dim**-0.5, whole.dropout
        weights = whole.in_proj_weight.detach().chunk(3)
        biases = [None] * 3 if whole.in_proj_bias is None else whole.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        out = whole.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())
        self.train(whole.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """[B, N, D] three times -> [B, N, D], and None in place of attention's weights, which nothing asks for."""
        heads = self.q_proj.out_features // self.head_dim
        q_BHNK, k_BHNK, v_BHNV = (
            projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNV, dropout_p=dropout, scale=self.scaling)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def split_attentions_(model: Model) -> Model:
    """Give every nn.MultiheadAttention in `model` its q, k and v as Linears, in place; returns `model`.

    Outputs stay the same but for rounding; the names of the attentions' parameters change. Raises ModelError for an
    attention that is no plain self-attention of batches.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            if not module.batch_first or module.in_proj_weight is None or module.bias_k is not None:
                raise ModelError(
                    f"{path}: expected a self-attention with batch_first=True, one width and no bias_k, got another; "
                    "describe this model with upop.families.register_family (docs/families.md)"
                )
            model.set_submodule(path, SplitAttention(module))
    return model


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
    return found
