"""Slimming: cut pruned units out of the weights and return a new, smaller, dense model.

Must not know how `keep` was decided, and must not touch the model it is given.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from upop.families import find_family
from upop.structures import Structure, check_keep, linear

Keep = Mapping[str, Tensor]


def slim(model: nn.Module, keep: Keep) -> nn.Module:
    """A new model without the units where `keep` is False; `model` stays as it is.

    `keep` maps every structure's name to bool [U], True = stays. Outputs equal those of `model` with the removed
    units masked to 0. The attention scale stays the original `head_dim ** -0.5`. Peak memory is the two models'.
    Raises UpopError for a `keep` that does not fit the model.
    """
    family = find_family(model)
    structures = family.find(model)
    check_keep(structures, keep)
    # Handing deepcopy the sliced parameters as already copied keeps the full-size ones from being copied at all.
    memo: dict[int, object] = {}
    for path, module_keep in _kept(structures, keep).items():
        module = linear(model, path)
        for name, parameter in _sliced(module, *module_keep).items():
            memo[id(getattr(module, name))] = parameter
        # Masks may be attached to the original; the copy must not carry them over.
        if "forward" in module.__dict__:
            memo[id(module.__dict__["forward"])] = None
    small = copy.deepcopy(model, memo)
    for path in _kept(structures, keep):
        small.get_submodule(path).__dict__.pop("forward", None)
    _set_sizes_(small, structures, keep)
    family.finish_(small)
    return small


def cut_(model: nn.Module, keep: Keep) -> None:
    """Like `slim`, in place and without changing the model's class or config: for building a pruned model's shell."""
    structures = find_family(model).find(model)
    check_keep(structures, keep)
    for path, module_keep in _kept(structures, keep).items():
        module = linear(model, path)
        for name, parameter in _sliced(module, *module_keep).items():
            setattr(module, name, parameter)
    _set_sizes_(model, structures, keep)


def _kept(structures: Sequence[Structure], keep: Keep) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Path of a Linear -> indices of (rows, columns) that stay; None = all."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for s in structures:
        for ports, found in ((s.producers, rows), (s.consumers, columns)):
            for port in ports:
                wanted = port.expand(keep[s.name].cpu())
                found[port.path] = found[port.path] & wanted if port.path in found else wanted
    return {
        path: (
            rows[path].nonzero().squeeze(1) if path in rows else None,
            columns[path].nonzero().squeeze(1) if path in columns else None,
        )
        for path in dict.fromkeys([*rows, *columns])
    }


@torch.no_grad()
def _sliced(module: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> dict[str, nn.Parameter]:
    weight, bias = module.weight, module.bias
    cut = weight.detach()
    if rows is not None:
        cut = cut[rows.to(cut.device)]
    if columns is not None:
        cut = cut[:, columns.to(cut.device)]
    # clone(): where nothing is cut the result must still not share memory with the original.
    result = {"weight": nn.Parameter(cut.clone().contiguous(), requires_grad=weight.requires_grad)}
    if bias is not None:
        cut = bias.detach() if rows is None else bias.detach()[rows.to(bias.device)]
        result["bias"] = nn.Parameter(cut.clone(), requires_grad=bias.requires_grad)
    return result


def _set_sizes_(model: nn.Module, structures: Sequence[Structure], keep: Keep) -> None:
    for s in structures:
        width = int(keep[s.name].sum())
        for attribute in s.attributes:
            setattr(model.get_submodule(attribute.path), attribute.name, attribute.per_unit * width)
        for port in (*s.producers, *s.consumers):
            module = linear(model, port.path)
            module.out_features, module.in_features = module.weight.shape
