"""Every example that takes a share of its training runs to its end and leaves a model of half the size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import upop

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMS = 202_698


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_loop", "accelerate_loop"])
def test_an_example_ends_with_a_smaller_saved_model(name, tmp_path):
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "0.02"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    small = upop.from_pretrained(tmp_path / "digits-half")
    params = sum(p.numel() for p in small.parameters())
    assert params == pytest.approx(PARAMS / 2, rel=0.01)
    assert done.stdout.splitlines()[-1] == f"saved: {params:,} of {PARAMS:,} parameters"
