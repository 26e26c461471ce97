"""Every number in README's results table comes from a result that is checked in."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "results").glob("*.json"))


def row(result):
    """README's row for a pruning run: the one place that says how a result reads."""
    accuracy, params, macs, latency = (result[key] for key in ("accuracy", "params", "macs", "latency"))
    stages = [f"{100 * accuracy[stage]['test']:.2f}" for stage in ("dense", "search", "slim", "retrain")]
    size = [
        f"{values['before'] / unit:.2f} → {values['after'] / unit:.2f}"
        for values, unit in ((params, 1e6), (macs, 1e6))
    ]
    times = [f"{found['before']['median_ms'] / found['after']['median_ms']:.2f}" for found in latency.values()]
    return "| " + " | ".join([result["config"]["target"], *stages, *size, *times]) + " |"


def test_there_are_results():
    assert any("retrain" in json.loads(path.read_text())["accuracy"] for path in RESULTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_says_what_the_result_says(path):
    result = json.loads(path.read_text())
    assert result["status"] == "complete"
    if "retrain" in result["accuracy"]:
        assert row(result) in (ROOT / "README.md").read_text()
        assert result["accuracy"]["search"] == result["accuracy"]["slim"]
