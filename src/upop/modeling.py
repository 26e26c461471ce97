"""Slimmed model classes, and loading of any image classifier from a folder or the Hub.

The classes add nothing to transformers' forward: they only build their Linears at the widths of their config.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTForImageClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.vit.modeling_vit import ViTAttention, eager_attention_forward

from upop.errors import ModelError
from upop.families.hf import VIT, is_split
from upop.hub import fetch
from upop.kinds import refine
from upop.pretrained import PrunedConfig, PrunedDeiTConfig, PrunedViTConfig
from upop.surgery import cut_
from upop.vetting import check_finite, check_shapes, vet


class PrunedViTForImageClassification(ViTForImageClassification):  # type: ignore[misc]
    """ViTForImageClassification with its own width in every layer."""

    config_class = PrunedViTConfig

    def __init__(self, config: PrunedViTConfig) -> None:
        super().__init__(config)
        _narrow_(self, config)


class PrunedDeiTForImageClassification(DeiTForImageClassification):  # type: ignore[misc]
    """DeiTForImageClassification with its own width in every layer."""

    config_class = PrunedDeiTConfig

    def __init__(self, config: PrunedDeiTConfig) -> None:
        super().__init__(config)
        _narrow_(self, config)


class PrunedDeiTForImageClassificationWithTeacher(DeiTForImageClassificationWithTeacher):  # type: ignore[misc]
    """DeiTForImageClassificationWithTeacher (inference only) with its own width in every layer."""

    config_class = PrunedDeiTConfig

    def __init__(self, config: PrunedDeiTConfig) -> None:
        super().__init__(config)
        _narrow_(self, config)


PRUNED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    ViTForImageClassification: PrunedViTForImageClassification,
    DeiTForImageClassification: PrunedDeiTForImageClassification,
    DeiTForImageClassificationWithTeacher: PrunedDeiTForImageClassificationWithTeacher,
}

AutoModelForImageClassification.register(PrunedViTConfig, PrunedViTForImageClassification, exist_ok=True)
# A tuple: transformers then chooses by the `architectures` entry of config.json.
AutoModelForImageClassification.register(
    PrunedDeiTConfig,
    (PrunedDeiTForImageClassification, PrunedDeiTForImageClassificationWithTeacher),
    exist_ok=True,
)


class _ApartMixin:
    """An attention whose values have another head dim than its queries; the library's own views all three alike."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' ViTAttention, [B, N, D] -> [B, N, D], with the number of heads taken from q."""
        heads = self.q_proj.out_features // self.head_dim
        q_BHNK, k_BHNK, v_BHNV = (
            projection(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, q_BHNK, k_BHNK, v_BHNV, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class ApartViTAttention(_ApartMixin, ViTAttention):  # type: ignore[misc]
    """ViTAttention with values of a width of their own."""


class ApartDeiTAttention(_ApartMixin, DeiTAttention):  # type: ignore[misc]
    """DeiTAttention with values of a width of their own."""


APART: dict[type[nn.Module], type[nn.Module]] = {
    ViTAttention: ApartViTAttention,
    DeiTAttention: ApartDeiTAttention,
}


def _narrow_(model: nn.Module, config: PrunedConfig) -> None:
    """Cut the Linears of a freshly built model to the widths of its config; works on the meta device too."""
    wanted = {"mlp": config.mlp_widths, "head": config.head_counts}
    if config.value_widths is None:
        wanted["attn"] = config.attn_widths
    else:
        wanted |= {"qk": config.attn_widths, "v": config.value_widths}
    wanted = {kind: widths for kind, widths in wanted.items() if widths is not None}
    structures = refine(model, VIT.find(model), list(wanted))
    # Which units does not matter, there are no weights yet; in each lane, the first.
    keep = {
        s.name: (torch.arange(s.width, device="cpu") < (wanted[s.kind] or [])[s.layer]).repeat(s.lanes)
        for s in structures
    }
    cut_(model, structures, keep)
    _tell_apart_(model)


def _tell_apart_(model: nn.Module) -> None:
    """Give attentions whose values have another width than their queries the forward that can do it. In place."""
    for module in model.modules():
        if type(module) in APART and is_split(module):
            module.__class__ = APART[type(module)]


def _widths(model: nn.Module, dense_heads: int) -> dict[str, Any]:
    """What the config of a slimmed model says about its layers."""
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, tuple(APART))]
    heads = [m.q_proj.out_features // m.head_dim for m in attentions]
    values = [m.v_proj.out_features // count for m, count in zip(attentions, heads, strict=True)]
    queries = [m.head_dim for m in attentions]
    return {
        "num_hidden_layers": len(attentions),
        "attn_widths": queries,
        "value_widths": values if values != queries else None,
        "head_counts": heads if set(heads) != {dense_heads} else None,
        "mlp_widths": [s.units for s in VIT.find(model) if s.kind == "mlp"],
    }


def adopt_(model: nn.Module) -> None:
    """Turn a slimmed stock model into its Pruned class, with a config that holds its widths. In place.

    Changing the class changes no computation: the Pruned classes differ in their constructor only.
    """
    _tell_apart_(model)
    config_class = PrunedViTConfig if isinstance(model, ViTForImageClassification) else PrunedDeiTConfig
    stock: Any = model
    values = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    values |= _widths(model, stock.config.num_attention_heads)
    config = config_class.from_dict(values, attn_implementation=stock.config._attn_implementation)
    pruned = _pruned_class(type(model))
    config.architectures = [pruned.__name__]
    for module in model.modules():
        # Blocks hold the same config object for their attention implementation.
        if getattr(module, "config", None) is stock.config and module is not model:
            module.config = config
    stock.config = config
    model.__class__ = pruned


def _pruned_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class that a slimmed model of class `stock` saves itself as; `stock`'s own methods stay in force."""
    if issubclass(stock, tuple(PRUNED_CLASSES.values())):
        return stock
    base = next(c for c in stock.__mro__ if c in PRUNED_CLASSES)
    pruned = PRUNED_CLASSES[base]
    # A subclass of a user's keeps its forward in memory; the folder is one of the stock class.
    return pruned if base is stock else type(pruned.__name__, (pruned, stock), {})


def load(source: str, *, new_head: bool = False) -> nn.Module:
    """See `upop.from_pretrained`; with `new_head` the folder may lack the classifier, or bring a pooler instead."""
    folder = str(fetch(source))
    promise = vet(Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            check_shapes(AutoModelForImageClassification.from_config(config, trust_remote_code=False), promise)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot load the model folder ({_first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(problem, ()))
        if found := [name for name in names if not (new_head and ("classifier" in name or "pooler" in name))]:
            raise ModelError(
                f"{source}: {len(found)} {problem.replace('_', ' ')}, such as {found[0]}; the weights do not belong "
                "to config.json, or the folder is no image classifier"
            )
    module: nn.Module = model
    check_finite(module, source)
    return module.eval()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
