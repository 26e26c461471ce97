"""Every example that takes a share of its training runs to its end and leaves a model of half the size."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import upop

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMS = 202_698


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_loop", "accelerate_loop"])
def test_an_example_ends_with_a_smaller_saved_model(name, tmp_path, monkeypatch, capsys):
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "0.02"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    small = upop.from_pretrained(tmp_path / "digits-half")
    params = sum(p.numel() for p in small.parameters())
    assert params == pytest.approx(PARAMS / 2, rel=0.01)
    assert capsys.readouterr().out.splitlines()[-1] == f"saved: {params:,} of {PARAMS:,} parameters"


NOTEBOOK = json.loads((EXAMPLES / "upop_in_five_minutes.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs_from_top_to_bottom_and_draws_its_pictures(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPOP_SHARE", "0.05")
    pictures = []
    monkeypatch.setattr(plt, "show", lambda: (pictures.append(len(plt.gcf().axes)), plt.close()))
    space = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    assert pictures == [10, 2, 2, 1]
    found = space["found"]
    assert found["masked"] == found["slimmed"]
    small = upop.from_pretrained(tmp_path / "digits-half")
    params = sum(p.numel() for p in small.parameters())
    assert params == pytest.approx(PARAMS / 2, rel=0.01)
    assert f"{params:,} of {PARAMS:,} parameters" in capsys.readouterr().out


def test_the_notebook_is_checked_in_without_outputs():
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
