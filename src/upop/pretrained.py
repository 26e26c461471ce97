"""Save and load: slimmed ViTs as ordinary Hugging Face folders (safetensors + config.json, nothing pickled).

Holds the configs, which say how wide each layer is. The model classes live in
`upop.modeling` and are imported on first need: transformers' model code takes two seconds to import.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, DeiTConfig, ViTConfig

from upop.errors import ModelError


@strict
class PrunedViTConfig(ViTConfig):  # type: ignore[misc]
    """A ViT with its own width in every layer; removed blocks are simply not among `num_hidden_layers`.

    Attributes:
        attn_widths: head dims left, one number a layer, each in [1, head_dim of the dense model]; None = dense.
        value_widths: head dims of the values, where they are not those of queries and keys; None = attn_widths.
        head_counts: heads left, each in [1, num_attention_heads]; None = all.
        mlp_widths: hidden neurons left, one number a layer, each >= 1; None = dense.
    """

    model_type = "upop_vit"
    attn_widths: list[int] | None = None
    value_widths: list[int] | None = None
    head_counts: list[int] | None = None
    mlp_widths: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _prepare(self)


@strict
class PrunedDeiTConfig(DeiTConfig):  # type: ignore[misc]
    """A DeiT with its own width in every layer; see PrunedViTConfig."""

    model_type = "upop_deit"
    attn_widths: list[int] | None = None
    value_widths: list[int] | None = None
    head_counts: list[int] | None = None
    mlp_widths: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _prepare(self)


PrunedConfig = PrunedViTConfig | PrunedDeiTConfig


def _prepare(config: PrunedConfig) -> None:
    """Check the widths, and make the model classes known: whoever holds a config is about to build a model."""
    dense_head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    limits = {
        "attn_widths": dense_head_dim,
        "value_widths": dense_head_dim,
        "head_counts": config.num_attention_heads,
        "mlp_widths": config.intermediate_size,
    }
    for name, most in limits.items():
        widths = getattr(config, name)
        if widths is None:
            continue
        if len(widths) != config.num_hidden_layers or not all(1 <= w <= most for w in widths):
            raise ModelError(
                f"config.json: {name}: expected {config.num_hidden_layers} numbers in [1, {most}], got {widths}"
            )
    import upop.modeling  # noqa: F401 - registers the classes


# `AutoConfig`, and through it the Auto model classes and pipelines, know slimmed models from here on.
AutoConfig.register("upop_vit", PrunedViTConfig, exist_ok=True)
AutoConfig.register("upop_deit", PrunedDeiTConfig, exist_ok=True)


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write `model` to `folder` as config.json + model.safetensors.

    Raises ModelError for a model that cannot save itself so, or where `folder` cannot be written.
    """
    save = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise ModelError(
            f"{type(model).__name__}: expected a Hugging Face model (with save_pretrained), to write to {folder}"
        )
    if Path(folder).is_file():
        raise ModelError(f"{folder}: expected a folder to write the model to, found a file")
    try:
        save(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error


def from_pretrained(folder: str | Path) -> nn.Module:
    """The image classifier in `folder` (or of that Hub name), slimmed or dense, in eval mode, on the CPU.

    Strict: every weight must be there and fit. Remote code is never run. Raises ModelError otherwise.
    """
    from upop.modeling import load

    return load(str(folder))
