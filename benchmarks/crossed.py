"""Why does a search end elsewhere than a one-shot ranking: by the units it chooses, or by how it removes them?

The two runs that crossing them gives, beside the two that `upop prune` does itself (`results/recipe-again`):

    at-once      the units that a finished search chose, cut off the dense model's own weights at once, made up for by
                 least squares, and retrained for as long as search and retraining took
    shrinking    the units that a one-shot ranking chooses, in the order in which its rounds give them up, shrunk to
                 zero over an epoch of training as the search does it, and retrained for the rest

    python benchmarks/crossed.py at-once --search runs/recipe-again/upop_params0.9_s0 --out runs/crossed/at-once_s0
    python benchmarks/crossed.py shrinking --search runs/recipe-again/upop_params0.9_s0 --out runs/crossed/shrinking_s0

All options are those of the finished search's own run, its seed included.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upop import cutting, ranking
from upop.config import PruneConfig, make_config
from upop.configtext import load_config
from upop.errors import UpopError
from upop.families import find_structures
from upop.plan import Plan
from upop.run import prune
from upop.stages import Stages
from upop.structures import Structure
from upop.trace import load_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["at-once", "shrinking"])
    parser.add_argument("--search", type=Path, required=True, help="folder of a finished run with a search")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    try:
        result = at_once(args.search, args.out) if args.how == "at-once" else shrinking(args.search, args.out)
    except UpopError as error:
        parser.error(str(error))
    print(args.how, args.search, {name: found["validation"] for name, found in result["accuracy"].items()})


def at_once(search: Path, out: str) -> dict[str, Any]:
    """Cut what `search` chose off the dense model at once, and retrain for as long as the whole of that run."""
    given = of_run(search)
    epochs = (given.epochs_search or 0) + (given.epochs_retrain or 0)
    config = changed(given, out, epochs_search=0, epochs_retrain=epochs, compensate="least-squares")

    def chosen(plan: Plan, accelerator: Accelerator, model: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
        keep = chosen_by(search, find_structures(model, plan.kinds))
        return keep, cutting.compensated(plan, accelerator, model, keep)

    with patch("upop.stages.one_shot", chosen):
        return prune(config)


def shrinking(search: Path, out: str) -> dict[str, Any]:
    """Shrink what a one-shot ranking chooses as the search of `search` shrinks its own choice, and retrain."""
    # The smallest go first; nothing that the model learns meanwhile changes what they are.
    config = changed(of_run(search), out, method="magnitude", shrink="progressive", normalise="none")
    of_stages = Stages.search

    def shrink(self: Stages, model: nn.Module, *, teacher: nn.Module) -> nn.Module:
        survived = rounds_survived(self.run.plan, self.run.accelerator, model)
        with patch("upop.scores.weight_norms", lambda *_: survived):
            return of_stages(self, model, teacher=teacher)

    with patch.object(Stages, "search", shrink):
        return prune(config)


def rounds_survived(plan: Plan, accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Per unit [U], float64: rounds of a one-shot ranking that it outlives; below 1/2, how far off its end was."""
    structures = find_structures(model, plan.kinds)
    survived = {s.name: torch.zeros(s.units, dtype=torch.float64) for s in structures}
    alive = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}

    def noting(found: Sequence[Structure], scores: Mapping[str, Tensor], *rest: Any, **more: Any) -> dict[str, Tensor]:
        keep = ranking.select(found, scores, *rest, **more)
        # The largest score goes first.
        ranks = torch.split(ranking.rank(-torch.cat([scores[s.name] for s in found])), [s.units for s in found])
        for s, rank in zip(found, ranks, strict=True):
            survived[s.name][alive[s.name]] = survived[s.name][alive[s.name]].floor() + rank[alive[s.name]] / 2
            alive[s.name] = keep[s.name]
            survived[s.name] += alive[s.name]
        return keep

    ranked_by = plan.config.model_copy(update={"method": "upop", "normalise": "zscore", "compensate": "least-squares"})
    with patch("upop.cutting.select", noting):
        cutting.one_shot(replace(plan, config=ranked_by), accelerator, model)
    return survived


def chosen_by(search: Path, structures: Sequence[Structure]) -> dict[str, Tensor]:
    """What a finished search kept, bool [U] per structure, from the last frame of its trace."""
    trace = load_trace(search / "trace.npz")
    last = torch.from_numpy(trace.masks[-1] == 255)
    return {s.name: last[span] for s, span in zip(structures, trace.spans, strict=True)}


def of_run(folder: Path) -> PruneConfig:
    """The configuration of a finished run; the model that it began with is looked for where it said."""
    return make_config(load_config(folder / "config.toml"), str(folder))


def changed(config: PruneConfig, out: str, **options: Any) -> PruneConfig:
    return make_config(config.model_dump(exclude_none=True) | options | {"out": out}, "crossed.py")


if __name__ == "__main__":
    main()
