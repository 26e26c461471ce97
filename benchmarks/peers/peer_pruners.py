"""Torch-Pruning on a Hugging Face ViT: its settings, what its user must do by hand, and a target it can be held to.

The only module here that knows Torch-Pruning; must not train, and knows no data and no files.
"""

import copy
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upop.profiling import count_params

# Of all parameters: within CLOSE the bisection stops, further than TOLERANCE away the target counts as not met.
CLOSE, TOLERANCE = 0.002, 0.01
TRIES = 12


@dataclass(frozen=True)
class Setting:
    """One way to use Torch-Pruning.

    Attributes:
        scope: in which units are ranked: `local` (every layer loses the same share), `global` (all layers and kinds
            together), `isomorphic` (all layers, each kind for itself; Isomorphic Pruning, ECCV 2024).
        round_to: widths, here of every head and of the MLP, become multiples of it.
        embedding: whether the embedding width may go too, one width for the whole model.
        steps: Torch-Pruning's `iterative_steps`, without training in between.
        rate_of: the setting whose learning rate this one takes, instead of a choice of its own.
    """

    importance: Literal["magnitude", "taylor"]
    scope: Literal["local", "global", "isomorphic"] = "local"
    round_to: int | None = None
    embedding: bool = False
    steps: int = 1
    rate_of: str | None = None


SETTINGS: dict[str, Setting] = {
    "magnitude": Setting("magnitude"),
    # Five steps: in one, Torch-Pruning would remove whole attention layers, skips those silently, and cannot get past
    # about two thirds of the parameters.
    "magnitude-global": Setting("magnitude", "global", steps=5, rate_of="magnitude"),
    "magnitude-isomorphic": Setting("magnitude", "isomorphic", rate_of="magnitude"),
    "taylor": Setting("taylor"),
    "taylor-global": Setting("taylor", "global", steps=5, rate_of="taylor"),
    "taylor-isomorphic": Setting("taylor", "isomorphic"),
    "taylor-round8": Setting("taylor", round_to=8, rate_of="taylor"),
    "taylor-embed": Setting("taylor", embedding=True),
}


@dataclass(frozen=True)
class Pruned:
    """A pruned model, or the nearest to it that could be had.

    Attributes:
        removed: share of ALL parameters of the dense model, in [0, 1].
        pruning_ratio: Torch-Pruning's own currency, a share of channels.
        skipped: layers that would have lost every unit, and which Torch-Pruning then leaves whole without a word.
        tries: prunings from the dense model, this one among them; `seconds` (CPU) of this one alone.
    """

    model: nn.Module
    removed: float
    pruning_ratio: float
    skipped: int
    tries: int
    seconds: float

    def meets(self, target: float) -> bool:
        return not self.skipped and abs(self.removed - target) <= TOLERANCE


def prune_to(dense: nn.Module, setting: Setting, *, target: float) -> Pruned:
    """Bisect Torch-Pruning's ratio until `target` of all parameters is gone; the nearest model found.

    `dense` stays as it is; for Taylor importance it must hold gradients. A try that skips layers counts as too high a
    ratio: beyond it the parameters removed become fewer again, and a plain bisection would end up anywhere.
    """
    low, high, best = 0.0, 1.0, None
    for tries in range(1, TRIES + 1):
        # Of the parameters, Torch-Pruning's ratio removes about as much where the embedding stays: a good first try.
        ratio = target if tries == 1 else (low + high) / 2
        began = time.process_time()
        model, skipped = prune_once(dense, setting, ratio)
        seconds = time.process_time() - began
        removed = 1 - count_params(model) / count_params(dense)
        found = Pruned(model, removed, ratio, skipped, tries, seconds)
        if best is None or _miss(found, target) < _miss(best, target):
            best = found
        if not skipped and abs(removed - target) <= CLOSE:
            break
        low, high = (low, ratio) if skipped or removed > target else (ratio, high)
    assert best is not None
    return Pruned(best.model, best.removed, best.pruning_ratio, best.skipped, tries, best.seconds)


def _miss(found: Pruned, target: float) -> tuple[bool, float]:
    return bool(found.skipped), abs(found.removed - target)


def prune_once(dense: nn.Module, setting: Setting, ratio: float) -> tuple[nn.Module, int]:
    """A pruned copy that runs, and how many layers Torch-Pruning skipped. Needs a ViT of transformers 5."""
    model = _copy_with_gradients(dense)
    skipped = _step(_pruner(model, setting, ratio), setting.steps)
    repair_(model)
    model.zero_grad(set_to_none=True)
    return model, skipped


def _pruner(model: nn.Module, setting: Setting, ratio: float) -> Any:
    import torch_pruning as tp

    importances = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    return tp.pruner.BasePruner(
        model,
        _example(model),
        importance=importances[setting.importance](),
        pruning_ratio=ratio,
        pruning_ratio_dict=_attention_ratios(model, setting, ratio),
        global_pruning=setting.scope != "local",
        isomorphic=setting.scope == "isomorphic",
        round_to=setting.round_to,
        iterative_steps=setting.steps,
        ignored_layers=_ignored(model, setting),
        unwrapped_parameters=_unwrapped(model),
        # Without it, dims are taken from single heads, and the heads no longer have one width.
        num_heads=_heads(model),
        # Its defaults are shared between all pruners of a process, grow with each, and keep their models alive.
        in_channel_groups={},
        out_channel_groups={},
        output_transform=lambda output: output.logits.sum(),
    )


def _step(pruner: Any, steps: int) -> int:
    """Prune; returns how many groups of layers the last step skipped because nothing would have been left of them."""
    skipped = [0]
    check = pruner.DG.check_pruning_group

    def counted(group: Any) -> bool:
        fits = bool(check(group))
        skipped[0] += not fits
        return fits

    pruner.DG.check_pruning_group = counted
    for _ in range(steps):
        skipped[0] = 0
        pruner.step()
    return skipped[0]


def repair_(model: nn.Module) -> None:
    """What Torch-Pruning leaves to its user: without it the pruned model's forward raises.

    `head_dim` follows the width. `scaling` must NOT: the softmax scale stays that of the original head width, for
    which the weights that are left were trained. (transformers computes it once, when the model is built.)
    """
    for block in _blocks(model):
        block.attention.head_dim = block.attention.q_proj.out_features // block.attention.num_attention_heads


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Number of heads of every projection whose outputs are theirs."""
    attentions = [block.attention for block in _blocks(model)]
    return {p: a.num_attention_heads for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)}


def _attention_ratios(model: nn.Module, setting: Setting, ratio: float) -> dict[nn.Module, float]:
    """For rounding: the attention's own ratio, short of the last multiple.

    Torch-Pruning rounds the number of dims to go up, to the whole head from 7/8 on, and then skips the layer silently.
    """
    if setting.round_to is None:
        return {}
    attentions = [block.attention for block in _blocks(model)]
    most = 1 - setting.round_to / attentions[0].head_dim
    return {attention.q_proj: min(ratio, most) for attention in attentions}


def _ignored(model: nn.Module, setting: Setting) -> list[nn.Module]:
    """Layers whose outputs stay: the classifier's, and what defines the embedding width unless that may go.

    Inputs of an ignored layer are pruned all the same, which is wanted: they are head dims and MLP neurons.
    """
    stays = [model.get_submodule("classifier")]
    if not setting.embedding:
        stays.append(model.get_submodule("vit.embeddings.patch_embeddings.projection"))
        stays += [linear for block in _blocks(model) for linear in (block.attention.o_proj, block.mlp.fc2)]
    return stays


def _unwrapped(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters outside any layer, with the axis of the embedding width; what it guesses too, with a warning.

    As pairs: the dict that Torch-Pruning's docstring asks for raises.
    """
    embeddings: Any = model.get_submodule("vit.embeddings")
    return [(embeddings.cls_token, 2), (embeddings.position_embeddings, 2)]


def _blocks(model: nn.Module) -> Any:
    return model.get_submodule("vit.layers")


def _example(model: Any) -> Tensor:
    size = model.config.image_size
    return torch.zeros(1, model.config.num_channels, size, size, device=model.device)


def _copy_with_gradients(model: nn.Module) -> nn.Module:
    """deepcopy leaves gradients behind, and Taylor importance is made of them."""
    twin = copy.deepcopy(model)
    for new, old in zip(twin.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return twin


def widths(model: nn.Module) -> dict[str, list[int]]:
    """Head dims and MLP neurons per layer, and the embedding width."""
    blocks = _blocks(model)
    return {
        "attn": [int(block.attention.head_dim) for block in blocks],
        "mlp": [int(block.mlp.fc1.out_features) for block in blocks],
        "embedding": [int(blocks[0].mlp.fc1.in_features)],
    }
