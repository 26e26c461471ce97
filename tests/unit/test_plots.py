"""The pictures of a run: all of their letters are in the picture, however few or many layers there are."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from upop import plots

RESULT = Path(__file__).parents[1] / "data/half.json"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved meanwhile."""
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


@pytest.mark.parametrize("layers", [2, 4, 6, 24])
@pytest.mark.parametrize("name", ["widths", "stages"])
def test_no_letter_of_a_picture_is_cut_off(name: str, layers: int, drawn: list[Figure], tmp_path: Path) -> None:
    result = json.loads(RESULT.read_text())
    for kinds in result["widths"].values():
        for kind, widths in kinds.items():
            kinds[kind] = (widths * 4)[:layers]
    getattr(plots, name)(result, tmp_path / "picture.png")
    (figure,) = drawn
    assert (tmp_path / "picture.png").stat().st_size > 5000
    figure.draw_without_rendering()
    letters, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # of all that is drawn, in inches
    assert letters.x0 >= 0
    assert letters.y0 >= 0
    assert letters.x1 <= width
    assert letters.y1 <= height
