"""Schedules: how much of the target ratio is pruned at which progress of the search.

Pure functions from progress u in [0, 1] to a fraction s(u) of the target, s(0) = 0 and s(1) = 1 exactly.
They must not know of steps, models or masks.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def sine(u: float) -> float:
    """s(u) = sin(pi u / 2) = sqrt((1 - cos(pi u)) / 2): the paper's (Algorithm 1, line 8)."""
    return math.sin(math.pi * u / 2)


def linear(u: float) -> float:
    """s(u) = u."""
    return u


def cosine(u: float) -> float:
    """s(u) = (1 - cos(pi u)) / 2: slow at both ends."""
    return (1 - math.cos(math.pi * u)) / 2


def cubic(u: float) -> float:
    """s(u) = 1 - (1 - u)^3: fast first (Zhu and Gupta, 2017)."""
    return 1 - (1 - u) ** 3


def sigmoid(u: float, steepness: float = 10.0) -> float:
    """s(u) = (g(u) - g(0)) / (g(1) - g(0)) with the logistic g(u) = 1 / (1 + exp(-steepness (u - 1/2)))."""
    low, high = _logistic(-steepness / 2), _logistic(steepness / 2)
    return (_logistic(steepness * (u - 0.5)) - low) / (high - low)


def exponential(u: float, rate: float = 5.0) -> float:
    """s(u) = (1 - exp(-rate u)) / (1 - exp(-rate)): exponential decay towards the target."""
    return math.expm1(-rate * u) / math.expm1(-rate)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


SCHEDULES: dict[str, Schedule] = {
    "sine": sine,
    "linear": linear,
    "cosine": cosine,
    "cubic": cubic,
    "sigmoid": sigmoid,
    "exponential": exponential,
}
