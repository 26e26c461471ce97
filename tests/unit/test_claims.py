"""Verdicts against numbers worked out by hand: pairing, tests, intervals, and each rule's three outcomes."""

import math

import fake_results as fake
import pytest

from upop.report import claims, verdicts
from upop.report.paired import Side, compare, rectangle, stat, t_test
from upop.report.records import Results, Run
from upop.report.verdicts import NOT_SUPPORTED, SUPPORTED, UNTESTABLE, Contrast, combine, evaluate, judge

A, B = Side("unified"), Side("mask")


def run(method, seed, accuracy, target="prunable=0.8", stage="retrain", **config):
    """A run whose test accuracy at `stage` is `accuracy` per cent."""
    made = fake.result(method=method, seed=seed, target=target, **config)
    made["accuracy"][stage]["test"] = accuracy / 100
    variant = tuple((key, value) for key, value in sorted(config.items()))
    return Run(f"{method}-{target}-{seed}", made, variant)


def control(seed, accuracy):
    made = fake.continued(seed)
    made["accuracy"]["retrain"]["test"] = accuracy / 100
    return Run(f"continued-{seed}", made)


def sides(differences, target="prunable=0.8"):
    """unified above mask by `differences` points, one per seed."""
    runs = []
    for seed, difference in enumerate(differences):
        runs += [run("unified", seed, 70 + difference, target), run("mask", seed, 70, target)]
    return runs


def results(runs):
    return Results({}, tuple(runs), (), {}, ())


def verdict(runs, contrast=None):
    contrast = contrast or Contrast(A, B)
    comparison = compare(runs, contrast.a, contrast.b, stage=contrast.stage, at_least=contrast.at_least)
    return judge(comparison, contrast)


def test_the_paired_t_test_is_that_of_a_textbook():
    # Differences 1, 2, 3: mean 2, sd 1, t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom.
    p, half_width = t_test([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)  # closed form for 2 degrees
    assert half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (2.5, None)])
def test_differences_without_spread_give_no_nan_and_no_certainty(value, p):
    assert t_test([value] * 3) == (p, 0.0)


def test_equal_differences_say_nothing_of_how_sure_they_are():
    why = "no spread: all 3 seeds differ by exactly +2.50 points, so that no test says how sure that is"
    assert verdict(sides([2.5, 2.5, 2.5])) == (UNTESTABLE, why)
    runs = [run("upop", seed, 70.0) for seed in range(3)]
    for made in runs:
        made.data["widths"]["after"]["attn"] = [16] * 6
        made.data["widths"]["after"]["mlp"] = [384] * 6
    part = claims.adapts(results(runs))
    assert (part.verdict, part.reason[:10]) == (UNTESTABLE, "no spread:")


def test_the_deviation_of_one_value_is_none_and_of_two_has_divisor_one():
    assert stat([4.0]) == verdicts.Stat(4.0, None, 1)
    assert stat([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))


def test_a_clear_difference_supports_the_claim_and_flipped_is_the_opposite():
    runs = sides([3.0, 3.2, 2.8])
    word, reason = verdict(runs)
    assert word == SUPPORTED
    assert reason.startswith("+3.00 points (95 % interval +2.50 to +3.50, p = .001, n = 3")
    word, reason = verdict(runs, Contrast(B, A))
    assert word == NOT_SUPPORTED
    assert reason.startswith("opposite: \N{MINUS SIGN}3.00 points")


def test_no_difference_told_apart_says_what_could_have_been_told():
    word, reason = verdict(sides([1.0, 2.0, -1.5]))
    # sd of (1, 2, -1.5) is 1.8028; 4.30265 * 1.8028 / sqrt 3 = 4.478.
    assert word == NOT_SUPPORTED
    assert "no difference told apart: +0.50 points" in reason
    assert "under 4.48 could not have been told" in reason


def test_two_pairs_are_too_few():
    assert verdict(sides([3.0, 3.1])) == (UNTESTABLE, "n = 2 paired seeds, 3 needed")
    assert verdict([]) == (UNTESTABLE, "n = 0 paired seeds, 3 needed")


def test_only_seeds_on_both_sides_are_paired():
    runs = [*sides([3.0, 3.2, 2.8]), run("unified", 9, 10.0), run("mask", 8, 99.0)]
    comparison = compare(runs, A, B, stage="retrain")
    assert comparison.seeds == (0, 1, 2)
    assert comparison.rows[0].a.mean == pytest.approx(73.0)
    assert comparison.rows[0].b.n == 3


def test_each_seeds_differences_are_averaged_over_the_ratios():
    runs = [*sides([1.0, 2.0, 3.0], "prunable=0.5"), *sides([5.0, 6.0, 10.0], "prunable=0.9")]
    comparison = compare(runs, A, B, stage="retrain")
    assert comparison.targets == ("prunable=0.5", "prunable=0.9")
    assert comparison.overall.mean == pytest.approx((3.0 + 4.0 + 6.5) / 3)
    assert comparison.overall.n == 3


def test_a_ratio_with_too_few_seeds_leaves_the_test_but_not_the_table():
    runs = [*sides([1.0, 2.0, 3.0], "prunable=0.5"), *sides([5.0, 6.0], "prunable=0.9")]
    comparison = compare(runs, A, B, stage="retrain")
    assert [row.target for row in comparison.rows] == ["prunable=0.5", "prunable=0.9"]
    assert (comparison.targets, comparison.seeds) == (("prunable=0.5",), (0, 1, 2))
    assert "prunable=0.9 not in the test" in judge(comparison, Contrast(A, B))[1]


def test_the_rectangle_drops_the_target_with_fewest_seeds():
    cells = [(s, t) for t, seeds in {"p=0.5": (0, 1, 2), "p=0.8": (0, 1, 2), "p=0.9": (0,)}.items() for s in seeds]
    assert rectangle(cells) == (("p=0.5", "p=0.8"), (0, 1, 2))
    assert rectangle([]) == ((), ())


def test_pairs_whose_ratios_differ_are_not_compared():
    runs = sides([3.0, 3.2, 2.8])
    for made in runs:
        if made.method == "mask":
            made.data["ratio"]["prunable"] = 0.7
    word, reason = verdict(runs)
    assert word == UNTESTABLE
    assert "3 pairs left out because their achieved ratios differ" in reason


def test_a_verdict_says_how_many_pairs_were_left_out():
    runs = sides([3.0, 3.2, 2.8, 3.1])
    runs[-1].data["ratio"]["prunable"] = 0.7
    word, reason = verdict(runs)
    assert word == SUPPORTED
    assert reason.endswith("n = 3; 1 pair left out because their achieved ratios differ)")


def test_ratios_are_compared_in_what_the_target_is_about():
    runs = sides([3.0, 3.2, 2.8], "macs=0.5")
    for made in runs:
        made.data["ratio"]["prunable"] = 0.6 if made.method == "mask" else 0.5
    assert verdict(runs)[0] == SUPPORTED
    for made in runs:
        made.data["macs"] = {"before": 100, "after": 40 if made.method == "mask" else 50}
    assert verdict(runs)[0] == UNTESTABLE


def test_a_target_that_says_what_is_left_is_as_high_as_what_came_out():
    runs = sides([3.0, 3.2, 2.8], "params=5M")
    for made in runs:
        made.data["ratio"] |= {"params": 0.1, "prunable": 0.1}
    assert verdict(runs, Contrast(A, B, at_least=0.8))[0] == UNTESTABLE
    assert verdict(runs, Contrast(A, B, at_least=0.1))[0] == SUPPORTED
    upop = [run("upop", seed, 70.0, "params=5M") for seed in range(3)]
    for made in upop:
        made.data["ratio"]["params"] = 0.1
    assert not claims.levels(results([*upop, *(control(seed, 70.0) for seed in range(3))]), "upop")
    for made in upop:
        made.data["ratio"]["params"] = 0.85
    assert len(claims.levels(results([*upop, *(control(seed, 70.0) for seed in range(3))]), "upop")) == 1


def test_every_ratio_means_every_ratio():
    runs = [*sides([-0.5, -0.6, -0.4], "prunable=0.5"), *sides([9.0, 9.1, 9.2], "prunable=0.9")]
    assert verdict(runs)[0] == SUPPORTED
    word, reason = verdict(runs, Contrast(A, B, every=True))
    assert word == NOT_SUPPORTED
    assert reason.startswith("not at every ratio, not at prunable=0.5")


def test_variants_do_not_stand_for_their_method():
    runs = [*sides([3.0, 3.2, 2.8]), run("unified", 0, 1.0, schedule="linear")]
    assert verdict(runs)[1].startswith("+3.00")


def test_runs_are_not_compared_with_themselves():
    runs = [run("upop", seed, 70.0, sparsity_attn=0.0, sparsity_mlp=0.0) for seed in range(3)]
    runs = [Run(r.label, r.data) for r in runs]  # no loss is this study's standard
    assert verdict(runs, Contrast(Side("upop"), Side("upop", claims.OFF)))[0] == UNTESTABLE


def claim(name):
    return next(c for c in (*claims.CLAIMS, *claims.EXPERIMENTS) if c.id == name)


def with_and_without_sparsity(off):
    runs = [run("upop", seed, 70.0 + seed) for seed in range(3)]
    return runs + [run("upop", s, 70.0 + s + off, sparsity_attn=0.0, sparsity_mlp=0.0) for s in range(3)]


def test_c6_calls_the_loss_inert_only_when_all_is_equal():
    found = evaluate(claim("C6"), results(with_and_without_sparsity(0.0)))
    assert found.verdict == NOT_SUPPORTED
    assert found.reason == "inert: accuracies and widths are exactly equal in all 3 pairs"
    found = evaluate(claim("C6"), results(with_and_without_sparsity(0.01)))
    assert "inert" not in found.reason
    runs = with_and_without_sparsity(0.0)
    runs[0].data["widths"]["after"]["attn"][0] += 1
    assert "inert" not in evaluate(claim("C6"), results(runs)).reason


@pytest.mark.parametrize(
    ("name", "key", "base", "others"),
    [
        ("E4", "schedule", "linear", ("cubic",)),
        ("C5", "normalise", "rank", ("none",)),
        ("E5", "normalise", "minmax", ("none", "rank")),
    ],
)
def test_a_value_that_a_claim_names_is_that_of_its_runs_whatever_the_base(name, key, base, others):
    """The base is better than all others, and not what the claim is about."""
    runs = [Run(f"base-{s}", run("upop", s, 75.0 + s / 10, **{key: base}).data) for s in range(3)]
    runs += [run("upop", s, 70.0 - s / 5, **{key: other}) for other in others for s in range(3)]
    assert evaluate(claim(name), results(runs)).verdict == UNTESTABLE
    named = {"schedule": "sine", "normalise": "zscore"}[key]
    runs += [run("upop", s, 80.0 + s / 5, **{key: named}) for s in range(3)]
    found = evaluate(claim(name), results(runs))
    assert found.verdict == SUPPORTED
    assert f"against {key}={others[0]}" in {part.short for part in found.parts}


def collapsing(unified, mask):
    runs = [control(seed, 84.0) for seed in range(3)]
    for seed in range(3):
        runs += [run("unified", seed, unified + seed / 10), run("mask", seed, mask - seed / 10)]
    return results(runs)


@pytest.mark.parametrize(
    ("unified", "mask", "expected"),
    [(80.0, 60.0, SUPPORTED), (80.0, 79.0, NOT_SUPPORTED), (60.0, 80.0, NOT_SUPPORTED), (30.0, 20.0, NOT_SUPPORTED)],
)
def test_c2_asks_who_collapses(unified, mask, expected):
    assert evaluate(claim("C2"), collapsing(unified, mask)).verdict == expected


def test_c2_needs_the_dense_control():
    without = results([r for r in collapsing(80.0, 60.0).runs if r.method != "dense-continued"])
    assert evaluate(claim("C2"), without).verdict == UNTESTABLE


@pytest.mark.parametrize(("below", "collapsed"), [(9.9, False), (10.1, True)])
def test_a_method_collapses_ten_points_below_the_control(below, collapsed):
    runs = [r for seed in range(3) for r in (control(seed, 84.0), run("unified", seed, 84.0 - below))]
    (level,) = claims.levels(results(runs), "unified")
    assert level.collapsed is collapsed


def test_at_chance_is_a_collapse_however_weak_the_control():
    runs = [r for seed in range(3) for r in (control(seed, 16.0), run("unified", seed, 14.9))]
    (level,) = claims.levels(results(runs), "unified")  # ten classes: chance is 10 %
    assert level.collapsed


def test_c4_needs_a_small_drop_too():
    def runs(slim):
        made = []
        for seed in range(3):
            for method, value in {"upop": slim, "progressive": slim, "unified": 20.0, "mask": 20.0}.items():
                made.append(run(method, seed, value + seed * value / 100, stage="slim"))
        return results(made)

    assert evaluate(claim("C4"), runs(80.0)).verdict == SUPPORTED
    found = evaluate(claim("C4"), runs(40.0))
    assert found.verdict == NOT_SUPPORTED
    assert "dense to slimmed" in found.reason


def test_one_part_that_fails_settles_a_claim():
    assert combine([SUPPORTED, UNTESTABLE, NOT_SUPPORTED]) == NOT_SUPPORTED
    assert combine([SUPPORTED, UNTESTABLE]) == UNTESTABLE
    assert combine([SUPPORTED]) == SUPPORTED
    assert combine([]) == UNTESTABLE


@pytest.mark.parametrize(
    ("drops", "expected"), [((0.02, 0.03, 0.049), SUPPORTED), ((0.02, 0.03, 0.06), NOT_SUPPORTED)]
)
def test_e7_holds_every_run_to_its_budget(drops, expected):
    runs = []
    for seed, drop in enumerate(drops):
        made = fake.open_ended(seed, max_drop=0.05)
        made["accuracy"]["slim"]["validation"] = made["accuracy"]["dense"]["validation"] - drop
        runs.append(Run(f"budget-{seed}", made, (("max_drop", 0.05),)))
    assert evaluate(claim("E7"), results(runs)).verdict == expected


def test_every_claim_is_untestable_without_runs():
    for c in (*claims.CLAIMS, *claims.EXPERIMENTS):
        assert evaluate(c, results([])).verdict == UNTESTABLE


def test_an_open_ended_run_is_paired_with_what_came_out_at_its_ratio():
    runs = []
    for seed in range(3):
        threshold = fake.open_ended(seed, binarise="threshold", threshold=0.0)
        threshold["ratio"]["prunable"] = 0.79
        variant = (("binarise", "threshold"), ("threshold", 0.0))
        runs += [run("upop", seed, 70.0 + seed, "prunable=0.8"), run("upop", seed, 80.0, "prunable=0.5")]
        runs.append(Run(f"threshold-{seed}", threshold, variant))
    sides = claim("E6").contrasts[0]
    comparison = compare(runs, sides.a, sides.b, stage="retrain")
    assert [row.target for row in comparison.rows] == ["prunable=0.8"]
    assert (comparison.overall.n, comparison.unequal) == (3, 3)
