"""Kinds: what can be a unit. Finer and coarser units than the paper's, made of the structures that a family describes.

A family describes head dims and hidden neurons; the other kinds follow from these. Must not know model families.

    attn    head dims of a layer, the same ones in q, k, v and all heads: the paper's
    dims    head dims of a layer, each head its own, as many in each
    qk, v   the same, for the logits (q and k) and for the values apart; in place of `attn` or `dims`
    head    whole heads
    mlp     hidden neurons
    block   whole blocks: depth
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from upop.errors import ModelError
from upop.methods import KINDS, check_known, check_owners, parse_kinds
from upop.structures import Port, Structure, linear, make_structure


def kinds_of(names: Iterable[str]) -> tuple[str, ...]:
    """The kinds of structures of these names, `<kind>.<layer>`."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def refine(model: nn.Module, structures: Sequence[Structure], kinds: Sequence[str] | str) -> tuple[Structure, ...]:
    """The structures of `kinds` that follow from those a family describes, in layer order.

    A layer whose q and k already differ in width from v stays apart: it is `qk` and `v` where `attn` or `dims` is
    asked for. Raises ModelError where the model does not allow a kind, UpopError for unknown kinds, and where two of
    them own the same head dims of a layer.
    """
    kinds = parse_kinds(kinds) if isinstance(kinds, str) else kinds
    described = kinds_of(s.name for s in structures)
    check_known(kinds, tuple(dict.fromkeys([*KINDS, *described])))
    if "attn" in described:
        # Beside attn or dims, qk and v may be those of layers that were taken apart before.
        check_owners([kind for kind in kinds if kind not in ("qk", "v") or kind not in described])
    result: list[Structure] = []
    for number, s in enumerate(structures):
        if s.kind == "attn":
            result += _attention(model, s, kinds)
        elif s.kind in ("qk", "v"):
            result += [s] if {s.kind, "attn", "dims"} & set(kinds) else []
            if s.kind == "v" and "head" in kinds:
                _check_allowed(s, "head")
                result.append(_heads(model, structures[number - 1], s))
        elif s.kind in kinds:
            result.append(s)
        if "block" in kinds and (number + 1 == len(structures) or structures[number + 1].block != s.block):
            result.append(_block(model, s, structures))
    missing = [kind for kind in kinds if kind not in {s.kind for s in result}]
    if missing and not (set(missing) <= {"attn", "dims"} and any(s.kind == "qk" for s in result)):
        raise ModelError(f"structures: expected a model with units of kind {missing[0]!r}, found none")
    return tuple(result)


def _attention(model: nn.Module, s: Structure, kinds: Sequence[str]) -> list[Structure]:
    """The kinds that a layer's head dims, `s`, are asked for as."""
    wanted = [kind for kind in ("head", "attn", "dims", "qk", "v") if kind in kinds]
    if {"attn", "dims"} & set(wanted):
        # Named beside them, qk and v are those of other layers, which were taken apart before.
        wanted = [kind for kind in wanted if kind not in ("qk", "v")]
    for kind in wanted:
        _check_allowed(s, kind)
    make = {
        "attn": lambda: s,
        "dims": lambda: _own_dims(model, s, "dims", s.producers, s.consumers),
        "qk": lambda: _own_dims(model, s, "qk", s.producers[:2], ()),
        "v": lambda: replace(_own_dims(model, s, "v", s.producers[2:], s.consumers), attributes=()),
        "head": lambda: _heads(model, s),
    }
    return [make[kind]() for kind in wanted]


def _check_allowed(s: Structure, kind: str) -> None:
    allowed = dict.fromkeys((s.kind, *s.allows))
    if kind not in allowed:
        raise ModelError(
            f"structures: kind {kind!r}: {s.producers[0].path}: this model's attention does not allow it, only "
            f"{', '.join(allowed)}"
        )


def _own_dims(
    model: nn.Module, s: Structure, kind: str, producers: Sequence[Port], consumers: Sequence[Port]
) -> Structure:
    """Head dims of which each head has its own: one lane a head."""
    heads = s.consumers[0].outer

    def apart(port: Port) -> Port:
        return replace(port, outer=port.outer // heads, rescaled=port.rescaled // heads)

    return make_structure(
        model,
        kind=kind,
        layer=s.layer,
        units=heads * s.units,
        producers=[apart(port) for port in producers],
        consumers=[apart(port) for port in consumers],
        attributes=s.attributes,
        lanes=heads,
        block=s.block,
    )


def _heads(model: nn.Module, s: Structure, v: Structure | None = None) -> Structure:
    """Whole heads of the attention whose head dims are `s`, or `s` (q and k) and `v`."""
    heads = s.lanes if v is not None else s.consumers[0].outer
    parts = [s] if v is None else [s, v]
    return make_structure(
        model,
        kind="head",
        layer=s.layer,
        units=heads,
        producers=[Port(port.path, inner=part.units // part.lanes) for part in parts for port in part.producers],
        consumers=[Port(port.path, inner=part.units // part.lanes) for part in parts for port in part.consumers],
        block=s.block,
    )


def _block(model: nn.Module, s: Structure, structures: Sequence[Structure]) -> Structure:
    """The block that `s` is in as one unit: masked where its branches end, dropped as a whole."""
    if not s.block:
        raise ModelError(
            "structures: kind 'block': expected a family that says where its blocks are, this one does not; "
            "leave the kind out"
        )
    ends = dict.fromkeys(port.path for each in structures if each.block == s.block for port in each.consumers)
    cost = sum(p.numel() for p in model.get_submodule(s.block).parameters())
    producers = tuple(Port(path, inner=linear(model, path).out_features) for path in ends)
    return Structure("block", s.layer, 1, cost, producers, (), floor=0, block=s.block, drops=True)
