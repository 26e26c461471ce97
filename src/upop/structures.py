"""Structures: which rows and columns of which Linears belong to one prunable unit, as plain data.

Masking, ranking and slimming know structures and nothing of a model family; this module must not know one either.

Vocabulary
    structure   one prunable group of equal units in one layer, named `<kind>.<layer>`
    kind        the type of a structure: `attn` (head dims), `mlp` (hidden neurons), and others: see `upop.kinds`
    unit        the smallest thing that has a mask of its own
    lane        units that must stay in equal number in each lane: the heads, where each has head dims of its own
    width       units that stay in a lane: what the layer's shape is made of
    keep        bool [units], True = stays
    cost        parameters that removing one unit removes from the model
    ratio       fraction REMOVED, in [0, 1]
Shape suffixes: U units, D width, H heads, K head dim.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from upop.errors import ModelError, UpopError


@dataclass(frozen=True)
class Port:
    """Where the units of a structure sit in one Linear.

    The Linear's output rows (of a producer) or input columns (of a consumer) are laid out as
    (outer, units, inner), units being the structure's. The head dims of a q projection with H heads have
    `outer=H`: row `h * K + u` belongs to unit `u`.

    The rows of the first `rescaled` of the outer groups are multiplied by sqrt(kept / units) when units are cut: those
    of q, in a model that divides the attention's logits by the square root of whatever width it finds.
    """

    path: str
    outer: int = 1
    inner: int = 1
    rescaled: int = 0

    def expand(self, values_U: Tensor) -> Tensor:
        """Per-unit values [U] as per-row (or per-column) values [outer * U * inner]; differentiable."""
        return values_U.view(1, -1, 1).expand(self.outer, -1, self.inner).reshape(-1)


@dataclass(frozen=True)
class Attribute:
    """A number on a module that follows a structure's width, such as `head_dim`: `per_unit * kept ** exponent`."""

    path: str
    name: str
    per_unit: float = 1
    exponent: float = 1

    def at(self, kept: int) -> float:
        """The number for `kept` units; an int where per_unit and exponent are."""
        number: float = self.per_unit * kept**self.exponent
        return number


@dataclass(frozen=True)
class Structure:
    """One prunable group of `units` equal units.

    `producers` are the Linears whose output rows the units own (these are masked), `consumers` those whose
    input columns they own. At least `floor` units always stay.

    Attributes:
        cost: parameters that one unit removes from the whole model.
        lanes: the units are laid out as (lanes, units / lanes), and as many must stay in each lane.
        block: path of the block that the structure is in; empty where its family does not say.
        drops: the structure is a whole block: without its only unit the module at `block` goes, list entry and all.
        allows: the finer kinds that this structure can be taken apart into, see `upop.kinds`.
    """

    kind: str
    layer: int
    units: int
    cost: int
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    attributes: tuple[Attribute, ...] = ()
    floor: int = 1
    lanes: int = 1
    block: str = ""
    drops: bool = False
    allows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.layer}"

    @property
    def width(self) -> int:
        """Units in each lane."""
        return self.units // self.lanes

    @property
    def fixed(self) -> bool:
        """Whether none of the units may go."""
        return self.floor >= self.width


def linear(model: nn.Module, path: str) -> nn.Linear:
    """The plain Linear at `path`; raises ModelError for anything else (quantised and LoRA-wrapped ones too)."""
    module = model.get_submodule(path)
    if type(module) is not nn.Linear:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ModelError(f"{path}: expected a plain torch.nn.Linear, got {found}; {_make_plain(module)}")
    refuse_sharded(module, path)
    for name in ("weight", "bias"):
        # Old-style reparametrisations make them plain tensors, computed anew by a hook from others.
        if name not in module._parameters:
            raise ModelError(
                f"{path}.{name}: expected a parameter, got what torch.nn.utils.prune, weight_norm or spectral_norm "
                f"computes; take that off first: prune.remove(module, {name!r}), remove_weight_norm(module), "
                "remove_spectral_norm(module)"
            )
    # What torchao quantises stays a Linear, whose weight is another kind of tensor.
    if hasattr(type(module.weight), "__tensor_flatten__") or not module.weight.is_floating_point():
        raise ModelError(
            f"{path}.weight: expected a plain floating point tensor, got {type(module.weight).__name__} of "
            f"{module.weight.dtype}; prune before quantising, and quantise what slim() returns"
        )
    return module


def refuse_sharded(module: nn.Linear, path: str) -> None:
    """Raise ModelError where the weight at `path` is spread over processes."""
    if hasattr(module.weight, "full_tensor"):
        raise ModelError(
            f"{path}: expected a whole weight in every process, got a DTensor (fully_shard, tensor parallelism); use "
            "DistributedDataParallel"
        )


def _make_plain(module: nn.Module) -> str:
    """What to do about a layer that stands where a Linear should."""
    if type(module).__module__.startswith("peft."):
        return "merge the adapters first: model = peft_model.merge_and_unload()"
    return "merge adapters, and prune before quantising: quantise what slim() returns"


def make_structure(
    model: nn.Module,
    *,
    kind: str,
    layer: int,
    units: int,
    producers: Sequence[Port],
    consumers: Sequence[Port],
    attributes: Sequence[Attribute] = (),
    lanes: int = 1,
    block: str = "",
    allows: Sequence[str] = (),
) -> Structure:
    """A Structure whose unit cost is derived from, and checked against, the shapes in `model`.

    Raises ModelError where a Linear's size is not `outer * units * inner`.
    """
    cost = 0
    for port in producers:
        module = linear(model, port.path)
        _check_size(port, "out_features", module.out_features, units)
        cost += port.outer * port.inner * (module.in_features + (module.bias is not None))
    for port in consumers:
        module = linear(model, port.path)
        _check_size(port, "in_features", module.in_features, units)
        cost += port.outer * port.inner * module.out_features
    return Structure(
        kind,
        layer,
        units,
        cost,
        tuple(producers),
        tuple(consumers),
        tuple(attributes),
        lanes=lanes,
        block=block,
        allows=tuple(allows),
    )


def _check_size(port: Port, what: str, size: int, units: int) -> None:
    expected = port.outer * units * port.inner
    if size != expected:
        raise ModelError(
            f"{port.path}.{what}: expected {port.outer} x {units} x {port.inner} = {expected}, got {size}; "
            "the layer is not laid out as its family says"
        )


def leave_whole(structures: Sequence[Structure], layers: Sequence[int]) -> tuple[Structure, ...]:
    """The same structures, those of `layers` with all of their units as floor; negative layers count from the end.

    Raises UpopError for a layer that the model has not, and where no other is left.
    """
    try:
        wanted = [operator.index(layer) for layer in layers]
    except TypeError:
        raise UpopError(f"ignored_layers: expected layers such as (0, -1) or '0,-1', got {layers!r}") from None
    known = sorted({s.layer for s in structures})
    # By their numbers: a family may have left a layer out.
    numbers = dict(zip(known, known, strict=True)) | {n - len(known): layer for n, layer in enumerate(known)}
    for layer in wanted:
        if layer not in numbers:
            raise UpopError(
                f"ignored_layers: expected layers from {known[0]} to {known[-1]}, or -1 to -{len(known)} from the "
                f"end, got {layer}" + ("" if len(known) > known[-1] else f"; there are {', '.join(map(str, known))}")
            )
    whole = {numbers[layer] for layer in wanted}
    if whole and whole == set(known):
        raise UpopError("ignored_layers: expected a layer that may be pruned, got all of them")
    return tuple(replace(s, floor=s.width) if s.layer in whole else s for s in structures)


def whole_layers(structures: Sequence[Structure]) -> list[int]:
    """The layers of which something could go, but nothing may."""
    could = {s.layer for s in structures if s.width > 1 or s.drops}
    return sorted(could - {s.layer for s in structures if not s.fixed})


def prunable_cost(structures: Iterable[Structure]) -> int:
    """Parameters that belong to some unit."""
    return sum(s.units * s.cost for s in structures)


def removable_cost(structures: Iterable[Structure]) -> int:
    """Parameters that can go while every structure keeps its floor."""
    return sum((s.units - s.floor) * s.cost for s in structures)


def reachable_ratio(structures: Iterable[Structure], base: int) -> float:
    """Largest ratio of `base` parameters that floors allow, rounded DOWN to four decimals: a target that is met."""
    return removable_cost(structures) * 10_000 // base / 10_000


def removed_cost(structures: Iterable[Structure], keep: Mapping[str, Tensor]) -> int:
    """Parameters that slimming by `keep` removes."""
    return sum(int((~keep[s.name]).sum()) * s.cost for s in structures)


def of_each(structures: Sequence[Structure], flat: Tensor) -> dict[str, Tensor]:
    """Numbers of all units [n], structure after structure, as structure name -> [U]."""
    parts = torch.split(flat, [s.units for s in structures])
    return {s.name: part for s, part in zip(structures, parts, strict=True)}


def widths(structures: Iterable[Structure]) -> dict[str, list[int]]:
    """Kind -> units in a lane, one number a layer."""
    found: dict[str, list[int]] = {}
    for s in structures:
        found.setdefault(s.kind, []).append(s.width)
    return found


def kept_widths(structures: Sequence[Structure], keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Kind -> units that stay in a lane, one number a layer; 0 in blocks that go as a whole."""
    gone = dropped_blocks(structures, keep)
    found: dict[str, list[int]] = {}
    for s in structures:
        found.setdefault(s.kind, []).append(0 if is_within(s.block, gone) else int(keep[s.name].sum()) // s.lanes)
    return found


def dropped_blocks(structures: Iterable[Structure], keep: Mapping[str, Tensor]) -> list[str]:
    """Paths of the blocks that go as a whole."""
    return [s.block for s in structures if s.drops and not bool(keep[s.name].any())]


def is_within(path: str, blocks: Iterable[str]) -> bool:
    """Whether the module at `path` is one of `blocks` or inside one."""
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def refuse_shared(model: nn.Module, structures: Sequence[Structure]) -> None:
    """Raise ModelError where a weight or bias belongs to units, and to something else of the model as well."""
    owners: dict[str, set[str]] = {}
    for s in structures:
        for port in (*s.producers, *s.consumers):
            owners.setdefault(port.path, set()).add(s.name)
    # A module that is in the model twice has two paths, and its family may have described either.
    modules = list(model.named_modules(remove_duplicate=False))
    owned = {id(module): (path, owners[path]) for path, module in modules if path in owners}
    first: dict[int, tuple[str, set[str]]] = {}
    for path, module in modules:
        place = path, owners.get(path) or owned.get(id(module), ("", set[str]()))[1]
        for parameter in module.parameters(recurse=False):
            other = first.setdefault(id(parameter), place)
            if other[1] != place[1]:
                raise ModelError(
                    f"{path}: expected weights of its own, got those of {other[0]}: units cannot be cut out of one "
                    "without the other; give it a copy"
                )


def check_keep(structures: Sequence[Structure], keep: Mapping[str, Tensor]) -> None:
    """Raise UpopError unless `keep` has one bool vector of the right size, floor respected, per structure."""
    names = [s.name for s in structures]
    assert max(Counter(names).values(), default=0) <= 1, "structure names must be unique"
    if unknown := sorted(set(keep) - set(names)):
        raise UpopError(f"keep[{unknown[0]!r}]: no such structure; this model has {names[0]} .. {names[-1]}")
    for s in structures:
        if s.name not in keep:
            raise UpopError(f"keep: expected an entry for every structure, {s.name!r} is missing")
        value = keep[s.name]
        if not isinstance(value, Tensor):
            raise UpopError(f"keep[{s.name!r}]: expected a bool tensor [{s.units}], got {type(value).__name__}")
        if value.dtype != torch.bool or value.shape != (s.units,):
            raise UpopError(
                f"keep[{s.name!r}]: expected a bool tensor [{s.units}], got {value.dtype} {list(value.shape)}"
            )
        if int(value.sum()) < s.floor:
            raise UpopError(f"keep[{s.name!r}]: at least {s.floor} unit(s) must stay, got {int(value.sum())}")
        if s.lanes > 1 and len(counts := set(value.view(s.lanes, -1).sum(1).tolist())) > 1:
            raise UpopError(
                f"keep[{s.name!r}]: expected as many units to stay in each of {s.lanes} heads, got {sorted(counts)}"
            )
