"""Promises of upop.schedules: exact ends, never backwards, the paper's formula."""

import itertools
import math

import pytest

from upop.schedules import SCHEDULES

GRID = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_are_exact(name):
    assert SCHEDULES[name](0.0) == 0.0
    assert SCHEDULES[name](1.0) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_never_goes_back_and_stays_in_range(name):
    values = [SCHEDULES[name](u) for u in GRID]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert all(0 <= v <= 1 for v in values)


def test_sine_is_the_papers_formula():
    for u in GRID:
        assert SCHEDULES["sine"](u) == pytest.approx(math.sqrt((1 - math.cos(math.pi * u)) / 2), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("linear", lambda u: u),
        ("cosine", lambda u: math.sin(math.pi * u / 2) ** 2),
        ("cubic", lambda u: u**3 - 3 * u**2 + 3 * u),
        ("sigmoid", lambda u: (1 + math.tanh(5 * (u - 0.5)) / math.tanh(2.5)) / 2),
        ("exponential", lambda u: (1 - math.exp(-5 * u)) / (1 - math.exp(-5))),
    ],
)
def test_the_other_schedules_are_their_documented_formulas(name, formula):
    for u in GRID:
        assert SCHEDULES[name](u) == pytest.approx(formula(u), abs=1e-12)


def test_the_study_names_six_schedules():
    assert set(SCHEDULES) == {"sine", "linear", "cosine", "cubic", "sigmoid", "exponential"}
