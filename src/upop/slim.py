"""Slimming: a new, smaller, dense model without the pruned units.

Must not know how `keep` was decided, and must not touch the model it is given.
"""

import copy
from collections.abc import Iterator, Mapping
from types import FunctionType

from torch import Tensor, nn

from upop.errors import ModelError
from upop.families import find_family, find_structures
from upop.kinds import kinds_of
from upop.structures import check_keep, dropped_blocks, linear
from upop.surgery import Keep, drop_, set_sizes_, smaller_parameters

# What Accelerate leaves on a prepared model: a copy that kept them would count as prepared, and run in the wrong
# precision or unwrapped in several processes.
ACCELERATE_MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")


def slim(model: nn.Module, keep: Keep) -> nn.Module:
    """A new model without the units where `keep` is False; `model` stays as it is.

    `keep` maps every structure's name to bool [U], True = stays; its names say of which kinds the structures are.
    Outputs equal those of `model` with the removed units masked to 0. The attention scale stays the original
    `head_dim ** -0.5`. Peak memory is the two models'.
    Raises UpopError for a `keep` that does not fit the model.
    """
    if not isinstance(keep, Mapping) or not keep:
        raise ModelError(
            f"keep: expected structure names with bool [units] each, as search.keep() gives them, got {keep!r}"
        )
    family = find_family(model)
    refuse_closures(model)
    structures = find_structures(model, kinds_of(keep))
    check_keep(structures, keep)
    parameters = smaller_parameters(model, structures, keep)
    dropped = dropped_blocks(structures, keep)
    # Handing deepcopy the smaller parameters as already copied keeps the full-size ones from being copied at all.
    memo: dict[int, object] = {id(model.get_submodule(path)): nn.Identity() for path in dropped}
    for path, smaller in parameters.items():
        module = model.get_submodule(path)
        memo |= {id(getattr(module, name)): parameter for name, parameter in smaller.items()}
    # Masks may be attached to the original; the copy must not carry them over.
    masked = [m for s in structures for port in s.producers if "forward" in (m := linear(model, port.path)).__dict__]
    memo |= {id(module.__dict__["forward"]): None for module in masked}
    # deepcopy refuses what a hook has kept of the last forward.
    held = [tensor for module in model.modules() for tensor in _tensors_in(vars(module), set())]
    memo |= {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None}
    small = copy.deepcopy(model, memo)
    for mark in ACCELERATE_MARKS:
        vars(small).pop(mark, None)
    for module in small.modules():
        if module.__dict__.get("forward", module) is None:
            del module.__dict__["forward"]
    set_sizes_(small, structures, keep)
    drop_(small, dropped)
    family.finish_(small)
    return small


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in containers within containers that are not `seen` yet: one may hold itself."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping) and id(value) not in seen:
        seen.add(id(value))
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner, seen)


def refuse_closures(model: nn.Module) -> None:
    """Raise ModelError where a module's `forward` is a function put there: its copy would still call the original."""
    for path, module in model.named_modules():
        own = vars(module)
        prepared = module is model and "_original_forward" in own
        if isinstance(own.get("forward"), FunctionType) and not prepared:
            raise ModelError(
                f"{path or type(model).__name__}: expected the forward of its class, got a function, "
                "which a copy of the model would share with it; take it off first, or use register_forward_hook"
            )
