"""Methods: UPop, its two halves and the baselines, as values of one search; and the kinds of units it may rank.

A method says by what units are ranked, whether all kinds compete, and whether the losers shrink or fall at once. Must
not rank, prune or train by itself, and needs no torch.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from upop.errors import UpopError, nearest

Score = Literal["gradient", "mask", "magnitude", "taylor", "random", "none"]
Shrink = Literal["progressive", "once"]
NORMALISE = ("zscore", "minmax", "rank", "none")  # names of upop.ranking.NORMALISERS
KINDS = ("attn", "dims", "qk", "v", "head", "mlp", "block")  # of units, see upop.kinds
DEFAULT_KINDS = ("attn", "mlp")
_LAYERS = re.compile(r"\s*(-?\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*")


@dataclass(frozen=True)
class Method:
    """What makes one method differ from another.

    Attributes:
        score: what ranks units; the search turns it so that the LARGEST goes first.
            `gradient` accumulated signed mask gradients (paper, Algorithm 1); `mask` |mask| after training by the
            ordinary optimizer, smallest first (paper, section 3.1); `magnitude` L2 norm of a unit's weights, smallest
            first; `taylor` accumulated |mask * gradient|, smallest first (Molchanov et al., 2019); `random`; `none`
            prunes nothing.
        unified: all layers and kinds compete in one ranking; otherwise each kind gives up the same share.
        shrink: `progressive` lets masks of the losers sink over the search and re-decides who loses; `once` cuts at
            the end what was untouched (or trained) until then.
    """

    score: Score
    unified: bool
    shrink: Shrink
    about: str


# Method -> the score of `upop.oneshot` that ranks for it where there is no search.
ONE_SHOT: dict[str, Literal["taylor", "magnitude", "random"]] = {
    "upop": "taylor",
    "taylor": "taylor",
    "magnitude": "magnitude",
    "random": "random",
}

METHODS: dict[str, Method] = {
    "upop": Method("gradient", True, "progressive", "unified and progressive: the paper's method"),
    "progressive": Method("gradient", False, "progressive", "progressive alone: a uniform ratio for every kind"),
    "unified": Method("mask", True, "once", "unified alone: trained masks in one z-scored ranking, cut once"),
    "mask": Method("mask", False, "once", "mask-based: trained masks, a uniform ratio for every kind, cut once"),
    "magnitude": Method("magnitude", True, "once", "smallest weights, cut once after the same training"),
    "taylor": Method("taylor", True, "once", "smallest first-order effect on the loss, cut once"),
    "random": Method("random", True, "once", "random units, cut once"),
    "dense-continued": Method("none", True, "once", "the same training, nothing pruned: the control"),
}


def parse_kinds(text: str) -> tuple[str, ...]:
    """`attn,mlp` as kinds. Raises UpopError for unknown kinds, and for two that own the same head dims."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    check_known(kinds)
    check_owners(kinds)
    if len({"qk", "v"} & set(kinds)) == 1:
        raise UpopError("structures: expected qk and v together, as qk,v")
    return kinds


def parse_layers(text: str) -> tuple[int, ...]:
    """`0,11` or `0-2,-1` as layers, negative ones counted from the end; nothing where empty. Raises UpopError."""
    layers: list[int] = []
    for part in text.split(",") if text.strip() else []:
        found = _LAYERS.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if found is None or (found[2] and not 0 <= first <= last):
            raise UpopError(f"ignored_layers: expected layers such as 0,11 or 0-2,-1, got {part.strip()!r}")
        layers += range(first, last + 1)
    return tuple(dict.fromkeys(layers))


def parse_align(text: str) -> dict[str, int]:
    """`attn=8,mlp=64` as kind -> multiple; `none` as nothing. Raises UpopError for anything else."""
    found = {}
    for part in text.split(",") if text != "none" else []:
        kind, _, number = (piece.strip() for piece in part.partition("="))
        if kind not in KINDS or not number.isdecimal() or int(number) < 1:
            raise UpopError(
                f"align: expected auto, none, or multiples such as attn=8,mlp=64, got {part.strip()!r}"
                + nearest(kind, KINDS)
            )
        found[kind] = int(number)
    return found


def check_known(kinds: Sequence[str], known: Collection[str] = KINDS) -> None:
    """Raise UpopError unless there are kinds, all of them `known`."""
    for kind in kinds or [""]:
        if kind not in known:
            raise UpopError(f"structures: expected some of {', '.join(known)}, got {kind!r}{nearest(kind, known)}")


def check_owners(kinds: Sequence[str]) -> None:
    """Raise UpopError where two of the kinds own the same head dims of a layer."""
    owners = [kind for kind in ("attn", "dims") if kind in kinds]
    if split := [kind for kind in ("qk", "v") if kind in kinds]:
        owners.append(" and ".join(split))
    if len(owners) > 1:
        raise UpopError(f"structures: {' and '.join(owners)} own the same head dims; expected one of attn, dims, qk,v")
