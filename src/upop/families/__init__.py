"""Families: where the prunable structures of a kind of model are. One small module per library.

A family describes; it must not mask, rank or cut. Import of a family must not import its library. A family of one's
own, in ten lines: docs/families.md.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from torch import nn

from upop.errors import ModelError
from upop.families import hf, timm, torchvision
from upop.families.parts import attention, blocks, fused_attention, gated_mlp, mlp, packed_mlp
from upop.kinds import refine
from upop.methods import parse_layers
from upop.structures import Structure, leave_whole, refuse_shared

__all__ = [
    "FAMILIES",
    "Family",
    "attention",
    "blocks",
    "find_family",
    "find_structures",
    "fused_attention",
    "gated_mlp",
    "mlp",
    "packed_mlp",
    "register_family",
]


# What to do with a slimmed model that no folder can describe.
OTHERWISE = "save its state_dict() and the keep, and load them into upop.slim(dense_model, keep)"


def refuse_saving_(model: nn.Module) -> None:
    """Make a slimmed model that no library could load again refuse `save_pretrained`, where it has one."""
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = partial(_refuse_saving, type(model).__name__)  # type: ignore[assignment]


def _refuse_saving(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise ModelError(
        f"{name}: expected a slimmed model that a folder can describe (see docs/families.md), got one of another "
        f"family; {OTHERWISE}"
    )


@dataclass(frozen=True)
class Family:
    """A kind of model that upop can prune.

    Attributes:
        name: shown to users.
        matches: whether a model belongs to the family.
        find: the model's structures, in layer order; raises ModelError for a model it cannot prune.
        finish_: called on a freshly slimmed model, so that it can describe itself (class, config) when saved; by
            default it will refuse to be saved as a Hugging Face folder, which could not be loaded again.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    find: Callable[[nn.Module], tuple[Structure, ...]]
    finish_: Callable[[nn.Module], None] = refuse_saving_

    @property
    def saves(self) -> bool:
        """Whether slimmed models can be saved as folders and loaded again."""
        return self.finish_ is not refuse_saving_


def _adopt_hf_(model: nn.Module) -> None:
    # On first need: families do not import transformers.
    from upop.pretrained import adopt_

    adopt_(model)


FAMILIES: list[Family] = [
    Family("Hugging Face ViT and DeiT", hf.VIT.matches, hf.VIT.find, _adopt_hf_),
    Family("Hugging Face DINOv2", hf.DINOV2.matches, hf.DINOV2.find, _adopt_hf_),
    Family("Hugging Face CLIP and SigLIP vision towers", hf.CLIP.matches, hf.CLIP.find, _adopt_hf_),
    Family("Hugging Face BEiT", hf.BEIT.matches, hf.BEIT.find, _adopt_hf_),
    Family("models of timm's VisionTransformer blocks", timm.matches, timm.find_structures),
    Family("torchvision's VisionTransformer", torchvision.matches, torchvision.find_structures),
]


def register_family(family: Family) -> None:
    """Make upop know `family`. It is asked before all others; one of the same name is replaced."""
    FAMILIES[:] = [family, *(known for known in FAMILIES if known.name != family.name)]


def find_family(model: nn.Module) -> Family:
    """The family that `model` belongs to; raises ModelError that names what stands in the way."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a torch.nn.Module, got {type(model).__name__}; upop.from_pretrained loads a folder"
        )
    if (inside := _wrapped(model)) is not None:
        raise ModelError(f"{type(model).__name__}: expected the model itself, got a wrapper of it; {inside}")
    for family in FAMILIES:
        if family.matches(model):
            return family
    raise ModelError(
        f"{type(model).__name__}: unsupported model; expected one of: {', '.join(f.name for f in FAMILIES)}; "
        f"unsupported modules: {_modules_with_weights(model)}{_advice(model)}"
    )


def find_structures(
    model: nn.Module, kinds: Sequence[str] | str | None = None, ignored_layers: Sequence[int] | str = ()
) -> tuple[Structure, ...]:
    """The prunable structures of `model`, in layer order: those its family describes, or of `kinds` (upop.kinds).

    `kinds` may be a text such as `attn,mlp`, and `ignored_layers`, of which no unit may go, one such as `0,-1`. Raises
    ModelError for unsupported models and kinds that this one does not allow, UpopError for layers that it has not.
    """
    found = find_family(model).find(model)
    found = found if kinds is None else refine(model, found, kinds)
    refuse_shared(model, found)
    ignored = parse_layers(ignored_layers) if isinstance(ignored_layers, str) else ignored_layers
    return leave_whole(found, ignored)


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


def _wrapped(model: nn.Module) -> str | None:
    """What to pass in place of a wrapper that training puts around a model; None where there is none."""
    if isinstance(model, nn.DataParallel):
        return (
            "nn.DataParallel copies the model without its masks: use DistributedDataParallel, one process per GPU "
            "(torchrun), and pass its .module"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "pass its .module, and train through the wrapper as before"
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return "pass the model that was compiled (its ._orig_mod), and train through the compiled one as before"
    if type(model).__name__ == "FullyShardedDataParallel":
        return "FSDP spreads each weight over processes: use DistributedDataParallel, and pass its .module"
    return None


def _advice(model: nn.Module) -> str:
    """What to do about an unsupported model."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return "; it carries adapters of peft: merge them first, model = peft_model.merge_and_unload()"
    for path, module in model.named_modules():
        if path and any(family.matches(module) for family in FAMILIES):
            return f"; its part {path}, a {type(module).__name__}, is one: search and slim that"
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if path and (layer := torchvision.torch_layer(model, path)) is not None:
                return (
                    f"; {path} is part of a {layer}, which reads its parameters: write that layer with Linears for q, "
                    "k and v, then describe the model, see docs/families.md"
                )
            return (
                f"; {path or 'the model'} is a torch.nn.MultiheadAttention, whose head dims cannot be cut (q, k and v "
                "are one Parameter as wide as the model): upop.families.torchvision.split_attentions_ makes them "
                "Linears; then describe the model, see docs/families.md"
            )
    return "; to describe it yourself, see upop.families.register_family and docs/families.md"
