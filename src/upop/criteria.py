"""Criteria: what units are ranked by where no gradient of the search does it. Pure functions of a model's weights.

Must not know masks or time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upop.structures import Structure, linear


def weight_norms(model: nn.Module, structures: Sequence[Structure]) -> dict[str, Tensor]:
    """L2 norm [U], float64 on the CPU, of everything that removing a unit removes: rows, biases and columns."""
    result = {}
    for s in structures:
        squares = torch.zeros(s.units, dtype=torch.float64)
        for port in s.producers:
            module = linear(model, port.path)
            rows = module.weight.detach().double().square().sum(1)
            if module.bias is not None:
                rows = rows + module.bias.detach().double().square()
            squares += rows.cpu().view(port.outer, s.units, port.inner).sum((0, 2))
        for port in s.consumers:
            columns = linear(model, port.path).weight.detach().double().square().sum(0)
            squares += columns.cpu().view(port.outer, s.units, port.inner).sum((0, 2))
        result[s.name] = squares.sqrt()
    return result


def random_scores(structures: Sequence[Structure], seed: int) -> dict[str, Tensor]:
    """Uniform in [0, 1) per unit [U], float64; the same for the same seed and structures."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, generator=generator, dtype=torch.float64) for s in structures}
