"""Surgery: which rows and columns stay, as smaller parameters, and the sizes that go with them.

Works on structures alone. `slim` decides what is copied; this module must not know model families.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from upop.structures import Structure, check_keep, dropped_blocks, is_within, linear

Keep = Mapping[str, Tensor]


def cut_(model: nn.Module, structures: Sequence[Structure], keep: Keep) -> None:
    """Cut the units where `keep` is False out of `model`, in place; its class and config stay.

    Raises UpopError for a `keep` that does not fit.
    """
    check_keep(structures, keep)
    for path, parameters in smaller_parameters(model, structures, keep).items():
        module = linear(model, path)
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
    set_sizes_(model, structures, keep)
    drop_(model, dropped_blocks(structures, keep))


def smaller_parameters(
    model: nn.Module, structures: Sequence[Structure], keep: Keep
) -> dict[str, dict[str, nn.Parameter]]:
    """Path of each Linear that structures cut -> its `weight` (and `bias`) with only what stays, as copies."""
    structures = staying(structures, keep)
    gains = _gains(structures, keep)
    return {
        path: _sliced(linear(model, path), rows, columns, gains.get(path))
        for path, (rows, columns) in _kept(structures, keep).items()
    }


def staying(structures: Sequence[Structure], keep: Keep) -> list[Structure]:
    """The structures whose rows and columns are cut: those of blocks that stay. Blocks are dropped, not cut."""
    dropped = dropped_blocks(structures, keep)
    return [s for s in structures if not s.drops and not is_within(s.block, dropped)]


def drop_(model: nn.Module, paths: Sequence[str]) -> None:
    """Take the modules at `paths` out of the lists they are in; the later ones move up."""
    for path in reversed(paths):
        parent, _, index = path.rpartition(".")
        holder = model.get_submodule(parent)
        assert isinstance(holder, nn.ModuleList | nn.Sequential), "blocks are in a list"
        del holder[int(index)]


def set_sizes_(model: nn.Module, structures: Sequence[Structure], keep: Keep) -> None:
    """Make every number that follows a width (in_features, out_features, head_dim) say the new one."""
    for s in staying(structures, keep):
        width = int(keep[s.name].sum()) // s.lanes
        for attribute in s.attributes:
            setattr(model.get_submodule(attribute.path), attribute.name, attribute.at(width))
        for port in (*s.producers, *s.consumers):
            module = linear(model, port.path)
            module.out_features, module.in_features = module.weight.shape


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


def _gains(structures: Sequence[Structure], keep: Keep) -> dict[str, Tensor]:
    """Path of a Linear -> factors, float64, one a row that STAYS, where a structure's port asks for rescaling."""
    gains: dict[str, Tensor] = {}
    for s in structures:
        kept = int(keep[s.name].sum())
        for port in s.producers:
            if port.rescaled:
                outer = torch.ones(port.outer, kept * port.inner, dtype=torch.float64, device="cpu")
                outer[: port.rescaled] = (kept / s.units) ** 0.5
                assert port.path not in gains, "one structure alone may own rows that are rescaled"
                gains[port.path] = outer.reshape(-1)
    return gains


@torch.no_grad()
def _sliced(
    module: nn.Linear, rows: Tensor | None, columns: Tensor | None, gains: Tensor | None
) -> dict[str, nn.Parameter]:
    weight, bias = module.weight, module.bias
    cut = weight.detach()
    if rows is not None:
        cut = cut[rows.to(cut.device)]
    if gains is not None:
        cut = _rescaled(cut, gains.unsqueeze(1))
    if columns is not None:
        cut = cut[:, columns.to(cut.device)]
    result = {"weight": nn.Parameter(cut, requires_grad=weight.requires_grad)}
    if bias is not None:
        # Indexing copies; a bias of which nothing is cut must not share memory with the original either.
        cut = bias.detach().clone() if rows is None else bias.detach()[rows.to(bias.device)]
        if gains is not None:
            cut = _rescaled(cut, gains)
        result["bias"] = nn.Parameter(cut, requires_grad=bias.requires_grad)
    return result


def _rescaled(values: Tensor, gains: Tensor) -> Tensor:
    # Rounded once, at the end: a factor in bfloat16 would be off by up to 0.4 %.
    precise = torch.promote_types(values.dtype, torch.float32)
    return (values.to(precise) * gains.to(values.device, precise)).to(values.dtype)
