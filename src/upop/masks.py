"""Masks: one value per unit, multiplied onto the weight rows and biases of the Linears that produce the units.

`m * (W x + b) = (m W) x + m b`, so nothing is stored or multiplied per token, and autograd's gradient for `m` is the
row-wise dot product that masking the activation would give. Must not decide anything: values are set from outside.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.errors import ModelError
from upop.structures import Port, Structure, linear, refuse_sharded


@dataclass
class _MaskedForward:
    """Stands in for one Linear's `forward` while masks are attached."""

    module: nn.Linear
    path: str
    terms: list[tuple[Tensor, Port]]

    def __deepcopy__(self, memo: dict[int, object]) -> "_MaskedForward":
        # Masked as the original is, now and later: an average of the weights lags behind, its masks do not.
        return _MaskedForward(copy.deepcopy(self.module, memo), self.path, self.terms)

    def __call__(self, input: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if not self.terms:  # a copy of a model whose masks are off by now
            return F.linear(input, weight, bias)
        if input.device != weight.device:
            # A replica holds this very object, and with it the weights and masks of the original.
            raise ModelError(
                f"masked Linear: its weights are on {weight.device}, its input on {input.device}; nn.DataParallel "
                "copies a model without its masks: use DistributedDataParallel, one process per GPU (torchrun)"
            )
        # In the weights' own precision: a float32 scale would lift bfloat16 weights out of the model's dtype.
        rows = torch.ones((), dtype=weight.dtype, device=weight.device)
        for mask_U, port in self.terms:
            rows = rows * port.expand(mask_U.to(device=weight.device, dtype=weight.dtype))
        masked = weight * rows.unsqueeze(-1)
        # Backward wants the masked weight again. It is computed again then: kept, it would be a second copy of the
        # model's weights. (Autocast keeps its bfloat16 copy of either; a compiler decides for itself.)
        keep_hooks = _recomputed(masked, weight, rows) if _keeps_weights(masked) else contextlib.nullcontext()
        with keep_hooks:
            return F.linear(input, masked, None if bias is None else bias * rows)


def _keeps_weights(masked: Tensor) -> bool:
    """Whether backward would keep `masked` itself."""
    kind = masked.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not masked.requires_grad or cast or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # its tensors have no storage to compare
        return False
    # Hooks around us (gradient checkpointing, save_on_cpu) see to it themselves; ours would keep all else from them.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _recomputed(masked: Tensor, weight: Tensor, rows: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where autograd saves `masked`, however it is transposed, it saves how to compute it."""
    place = masked.untyped_storage()._cdata  # not `masked`: what the hooks hold, the graph holds

    def pack(saved: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...]]:
        same = saved.untyped_storage()._cdata == place
        return (tuple(saved.shape), saved.stride()) if same else saved

    def unpack(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return (weight * rows.unsqueeze(-1)).as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Masks:
    """Mask values of a model, attached to it until `detach()`.

    `values[name]` is float32 [U], starts at 1, and collects its gradient in `.grad` like any leaf tensor. The values
    are no parameters of the model: its parameter names, state dict and optimizers do not see them. `storage` holds
    the same numbers, structure after structure, one tensor for each device that the model is on.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure]) -> None:
        self.values: dict[str, Tensor] = {}
        self.storage: dict[torch.device, Tensor] = {}
        forwards: dict[str, _MaskedForward] = {}
        places = {s.name: linear(model, s.producers[0].path).weight.device for s in structures}
        for device in dict.fromkeys(places.values()):
            sizes = {s.name: s.units for s in structures if places[s.name] == device}
            self.storage[device] = torch.ones(sum(sizes.values()), dtype=torch.float32, device=device)
            parts = torch.split(self.storage[device], list(sizes.values()))
            self.values |= {name: part.detach().requires_grad_() for name, part in zip(sizes, parts, strict=True)}
        self.values = {s.name: self.values[s.name] for s in structures}
        for s in structures:
            mask = self.values[s.name]
            for port in s.producers:
                module = linear(model, port.path)
                _refuse_foreign_forward(module, port.path)
                forwards.setdefault(port.path, _MaskedForward(module, port.path, [])).terms.append((mask, port))
        self._forwards = list(forwards.values())
        for forward in self._forwards:
            # On the instance, so that names, classes and other instances stay as they are.
            forward.module.forward = forward  # type: ignore[method-assign]

    def check(self) -> None:
        """Raise ModelError where weights have been sharded over processes since the masks were attached."""
        for forward in self._forwards:
            refuse_sharded(forward.module, forward.path)

    def refuse_others(self, model: nn.Module) -> None:
        """Raise ModelError where `model` has masks of another search, of other kinds, as well."""
        for module in model.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, _MaskedForward) and forward.terms and forward not in self._forwards:
                raise ModelError(
                    f"{forward.path}: masked by another search; cut for both, upop.slim(model, {{**one.keep(), "
                    "**other.keep()}), or detach() the other"
                )

    def detach(self) -> None:
        """Take the masks off: the model computes with its own weights again, bit for bit. Idempotent."""
        for forward in self._forwards:
            forward.module.__dict__.pop("forward", None)
            forward.terms.clear()
        self._forwards = []

    def unreached(self) -> list[str]:
        """Names of the structures whose masks no backward has reached since gradients were last cleared."""
        return [name for name, mask in self.values.items() if mask.grad is None]

    def gradients(self) -> dict[str, Tensor] | None:
        """The collected gradients [U], float32, and clears them; None where no backward has reached all masks."""
        if self.unreached():
            return None
        found = {name: mask.grad.float() for name, mask in self.values.items() if mask.grad is not None}
        for mask in self.values.values():
            mask.grad = None
        return found

    @torch.no_grad()
    def set_(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite all mask values, in place, so that optimizers and compiled graphs keep their tensors."""
        for name, mask in self.values.items():
            mask.copy_(values[name])


def _refuse_foreign_forward(module: nn.Module, path: str) -> None:
    there = module.__dict__.get("forward")
    if there is not None and not (isinstance(there, _MaskedForward) and not there.terms):
        raise ModelError(
            f"{path}: its forward is already replaced (another search, or a library's hook); detach that first"
        )
