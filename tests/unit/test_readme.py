"""Every number in README's results, and on their page, comes from a result that is checked in."""

import importlib.util
import re
import statistics
import sys
from pathlib import Path

import pytest

from upop.report.page import build, load_results

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "results/claims"
PAGE = ROOT / "docs/results.md"
METHODS = ("upop", "progressive", "unified", "mask", "magnitude")


def spread(values):
    """Mean and standard deviation in per cent, as the page says them."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def claims_block(folder):
    """The page's tables of the claims study."""
    results = load_results(folder)
    groups = {(g.method, g.target): g.runs for g in results.groups if not g.variant}
    targets = sorted({target for _, target in groups if target.startswith("prunable")})
    lines = ["| method | " + " | ".join(f"{t}: slimmed | retrained" for t in targets) + " |"]
    lines.append("|---" * (1 + 2 * len(targets)) + "|")
    for method in METHODS:
        cells = []
        for target in targets:
            runs = groups.get((method, target), ())
            cells += [spread([r.accuracy(s) for r in runs]) if len(runs) > 1 else "" for s in ("slim", "retrain")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    control = [run.accuracy("last") for run in groups["dense-continued", ""]]
    dense = results.runs[0].accuracy("dense")
    seeds = len({run.seed for run in results.runs})
    lines += [
        "",
        f"Dense: {dense:.2f}. Trained on for as long as the pruned models: {spread(control)}. n = {seeds} seeds.",
    ]
    lines += ["", "| claim | verdict | because |", "|---|---|---|"]
    for verdict in build(folder).facts["verdicts"].values():
        lines.append(f"| {verdict['text']} | {verdict['verdict']} | {verdict['reason']} |")
    return "\n".join(lines)


def verdicts(folder):
    """README's table: what became of each claim, without its differences."""
    lines = ["| claim | verdict |", "|---|---|"]
    return "\n".join(lines + [f"| {v['text']} | {v['verdict']} |" for v in build(folder).facts["verdicts"].values()])


def between(page, name):
    """What stands between two markers."""
    _, _, rest = page.read_text().partition(f"<!-- {name}: begin -->\n")
    return rest.partition(f"<!-- {name}: end -->")[0].strip()


def test_the_claims_are_those_of_the_results():
    assert between(PAGE, "claims") == claims_block(CLAIMS)
    assert between(ROOT / "README.md", "verdicts") == verdicts(CLAIMS)


def test_the_page_says_how_many_tests_there_are():
    pattern = r"(\d+) different paired t tests .*?(\d+) more at single ratios"
    said, there = (re.findall(pattern, path.read_text()) for path in (PAGE, CLAIMS / "report.md"))
    assert len(said) == 1
    assert said == there


@pytest.fixture
def overview(monkeypatch):
    spec = importlib.util.spec_from_file_location("overview", ROOT / "benchmarks/overview.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "overview", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("start", ["again", "short", "claims"])
def test_the_numbers_of_all_tools_are_those_of_the_results(overview, start):
    assert between(ROOT / overview.STARTS[start].page, "numbers") == overview.table(overview.STARTS[start])


def test_seeds_of_two_digits_are_seeds_too(overview, monkeypatch, tmp_path):
    (tmp_path / "peers").mkdir()
    one = ROOT / "results/peers/taylor_params0.5_s0.json"
    for name in ("taylor_params0.5_s0", "taylor_params0.5_s10", "choice_scratch"):
        (tmp_path / f"peers/{name}.json").write_text(one.read_text())
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    (row,) = overview.rows_of(overview.Start("README.md", (), ("peers",))).values()
    assert len(row.found[0.5]) == 2


def test_the_checked_in_report_is_that_of_the_checked_in_results():
    report = build(CLAIMS)
    assert report.markdown == (CLAIMS / "report.md").read_text()
    assert build(CLAIMS).html == report.html, "the same bytes a second time"


def test_no_checked_in_result_names_a_place_on_some_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert "/work" not in path.read_text()
        assert "/home/" not in path.read_text()
        assert "/tmp/" not in path.read_text()
        # A comparison with other tools knows its data by fingerprint alone.
        if path.name != "study.json" and not path.parent.name.startswith("peers"):
            assert any(name in path.read_text() for name in ('"data/cifar10"', '"data":"digits"')), path
