"""The report is a function of the folder: same bytes again, other numbers when a result changes, one line of error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fake_results as fake
import pytest

import upop
from upop.errors import UpopError
from upop.report.page import build, load_results
from upop.report.paired import Side, compare

SMALL = dict(seeds=(0, 1, 2), targets=("prunable=0.5", "prunable=0.8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake.write(tmp_path_factory.mktemp("study"), fake.study(**SMALL))


@pytest.fixture(scope="module")
def report(folder):
    return build(folder)


def change(folder, label, **changes):
    path = folder / label / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_second_build_is_the_same_to_the_byte(folder, report):
    again = build(folder)
    assert (again.html, again.markdown, again.facts) == (report.html, report.markdown, report.facts)
    assert str(folder) not in report.html
    assert str(folder) not in report.markdown


def test_checked_in_files_give_the_same_page_as_run_folders(tmp_path, report):
    for label, made in fake.study(**SMALL).items():
        (tmp_path / f"{label}.json").write_text(json.dumps(made))
    assert build(tmp_path).markdown == report.markdown


def test_the_page_asks_nothing_of_the_network(report):
    own = re.sub(r"<script>/\*\*.*?</script>", "", report.html, flags=re.S)
    assert len(own) < len(report.html) / 2  # plotly is gone, once
    assert "http" not in own
    assert report.html.count("plotly.js v") == 1
    assert not re.search(r'(src|href)="(?!#|data:)', own)


def test_every_claim_and_experiment_has_a_verdict(report):
    assert list(report.facts["verdicts"]) == [f"C{n}" for n in range(1, 7)] + [f"E{n}" for n in range(1, 8)]
    for found in report.facts["verdicts"].values():
        assert found["verdict"] in ("supported", "not supported", "untestable here")
        assert found["reason"] in report.html.replace("&lt;", "<")
    assert report.facts["verdicts"]["C6"]["reason"].startswith("inert")


def test_the_number_of_tests_is_that_of_all_different_ones(tmp_path):
    """unified against mask and magnitude, and again at high ratios alone; at two ratios each."""
    methods, targets = ("unified", "mask", "magnitude"), ("prunable=0.5", "prunable=0.8")
    made = {
        f"{method}-{target}-{seed}": fake.result(method=method, target=target, seed=seed)
        for seed in range(3)
        for method in methods
        for target in targets
    }
    said = r"- (\d+) different paired t tests of accuracy .* and (\d+) more at single ratios, none corrected"
    # The one at the high ratio alone is that of the row.
    assert re.findall(said, build(fake.write(tmp_path, made)).markdown) == [("3", "3")]


def test_numbers_come_from_the_results(tmp_path):
    runs = fake.study(**SMALL)
    before = build(fake.write(tmp_path, runs))
    accuracy = {**runs["mask-prunable=0.8-s0"]["accuracy"], "retrain": {"validation": 0.1111, "test": 0.1234}}
    change(tmp_path, "mask-prunable=0.8-s0", accuracy=accuracy)
    after = build(tmp_path)
    assert "11.11 / 12.34" not in before.markdown
    assert "11.11 / 12.34" in after.markdown
    assert after.facts["verdicts"]["C1"]["reason"] != before.facts["verdicts"]["C1"]["reason"]


def test_means_and_deviations_on_the_page_are_right(tmp_path):
    for seed, accuracy in enumerate((0.80, 0.81, 0.83)):
        made = fake.result(seed=seed, target="prunable=0.8")
        made["accuracy"]["retrain"]["test"] = accuracy
        fake.write(tmp_path, {f"run-{seed}": made})
    assert "81.33 ± 1.53 (3)" in build(tmp_path).markdown


def test_minutes_that_are_less_than_those_of_the_stages_are_not_shown(tmp_path):
    """As older code left them where a run was resumed: `all` began anew."""
    whole, resumed = fake.result(), fake.result(seed=1)
    resumed["seconds"] = {"search": 1000.0, "retrain": 1000.0, "all": 1200.0}
    text = build(fake.write(tmp_path, {"whole": whole, "resumed": resumed})).markdown
    assert re.search(r"^\| whole \| 0 \|.*\| 36\.3 \| – \|", text, re.M)
    assert re.search(r"^\| resumed \| 1 \|.*\| – \| – \|", text, re.M)
    assert "1.16 hours, runs added up" in text  # 2180 and 2000 seconds


def test_groups_differ_in_more_than_the_seed(folder):
    results = load_results(folder)
    groups = {(g.name, g.target): [run.seed for run in g.runs] for g in results.groups}
    assert groups["upop", "prunable=0.8"] == [0, 1, 2]
    assert groups["upop, schedule=linear", "prunable=0.8"] == [0, 1, 2]
    assert groups["upop, sparsity_attn=0, sparsity_mlp=0", "prunable=0.8"] == [0, 1, 2]
    assert groups["upop, binarise=threshold, threshold=0.5", "open"] == [0, 1, 2]
    assert groups["dense-continued", ""] == [0, 1, 2]
    assert [run.label for run in results.dense] == ["dense"]


def test_what_makes_a_variant_is_the_studys_base_where_it_says_so(tmp_path):
    runs = {f"{s}-{n}": fake.result(seed=n, schedule=s) for s in ("linear", "sine") for n in range(3)}
    entries = {label: {"differences": {}, "state": "done", "error": None} for label in runs}
    fake.write(tmp_path, runs, {"runs": entries, "dense": None, "base": {"schedule": "linear"}})
    assert [group.name for group in load_results(tmp_path).groups] == ["upop", "upop, schedule=sine"]


def test_controls_of_other_lengths_are_others_and_not_repeats(tmp_path):
    runs = {f"short-{n}": fake.continued(n) for n in range(3)}
    runs |= {f"pruned-{n}": fake.result(seed=n) for n in range(3)}
    for n in range(3):
        runs[f"long-{n}"] = fake.continued(n)
        runs[f"long-{n}"]["config"]["epochs_retrain"] = 17.0
        # How it would have pruned makes no other control.
        runs[f"long-{n}"]["config"] |= {"schedule": "linear", "structures": "dims,mlp", "normalise": "none"}
    entries = {label: {"differences": {}, "state": "done", "error": None} for label in runs}
    base = {"epochs_retrain": 8.0}
    results = load_results(fake.write(tmp_path, runs, {"runs": entries, "dense": None, "base": base}))
    assert {g.name for g in results.groups} == {"upop", "dense-continued", "dense-continued, epochs_retrain=17"}
    assert not any("repeats" in note for note in results.notes)


def test_results_that_do_not_know_of_ignored_layers_are_as_those_that_ignore_none(tmp_path):
    runs = {f"old-{seed}": fake.result(seed=seed) for seed in range(2)} | {"new-2": fake.result(seed=2)}
    runs |= {"whole-2": fake.result(seed=2), "control-0": fake.continued(0), "control-1": fake.continued(1)}
    for label, layers in (("new-2", ""), ("whole-2", "0,-1"), ("control-1", "0,-1")):
        runs[label]["config"] |= {"ignored_layers": layers}
    groups = load_results(fake.write(tmp_path, runs)).groups
    found = [(group.name, [run.seed for run in group.runs]) for group in groups]
    assert found == [("upop", [0, 1, 2]), ("upop, ignored_layers=0,-1", [2]), ("dense-continued", [0, 1])]


def test_what_upop_chose_by_itself_makes_no_variant(tmp_path):
    given = {"compensate": "auto", "lr_mask": None, "epochs_search": 4.0}
    runs = {}
    for seed in range(3):
        runs[f"search-{seed}"] = fake.result(seed=seed, compensate="none", lr_mask=2e-3)
        runs[f"search-{seed}"]["given"] = given
        for target in ("prunable=0.5", "prunable=0.8"):
            once = fake.result(seed=seed, target=target, epochs_search=0.0, compensate="least-squares", lr_mask=1.0)
            runs[f"once-{target}-{seed}"] = once | {"given": given | {"epochs_search": 0.0}}
    entries = {label: {"differences": {}, "state": "done", "error": None} for label in runs}
    base = {"epochs_search": 4.0}
    results = load_results(fake.write(tmp_path, runs, {"runs": entries, "dense": None, "base": base}))
    assert {group.name for group in results.groups} == {"upop", "one-shot"}
    assert not any("lr_mask" in note or "compensate" in note for note in results.notes)


def test_what_was_asked_for_is_a_variant_however_many_asked(tmp_path):
    runs = {}
    for seed in range(3):
        runs[f"auto-{seed}"] = fake.result(seed=seed, optimizer="adamw") | {"given": {"optimizer": None}}
        runs[f"muon-{seed}"] = fake.result(seed=seed, optimizer="muon") | {"given": {"optimizer": "muon"}}
    groups = load_results(fake.write(tmp_path, runs)).groups
    assert [group.name for group in groups] == ["upop", "upop, optimizer=muon"]


def chosen_by_upop(seed, method, **config):
    """A run of a study that says nothing of epochs: upop ranks once, methods that cannot search for one."""
    made = fake.result(seed=seed, method=method, target="prunable=0.8", **config)
    return made | {"given": {"epochs_search": None, "epochs_retrain": None, "normalise": None}}


def test_a_ranking_without_a_search_is_no_run_of_the_papers_method(tmp_path):
    made = {}
    for seed in range(3):
        made[f"once-{seed}"] = chosen_by_upop(seed, "upop", epochs_search=0, epochs_retrain=6)
        for method in ("progressive", "unified", "mask"):
            made[f"{method}-{seed}"] = chosen_by_upop(seed, method, epochs_search=1, epochs_retrain=5)
    report = build(fake.write(tmp_path, made))
    assert {"upop", "one-shot"} & {group.method for group in load_results(tmp_path).groups} == {"one-shot"}
    for claim in ("E2", "E3", "E4", "E5"):
        assert report.facts["verdicts"][claim]["verdict"] == "untestable here"
    assert "upop against unified" not in report.facts["verdicts"]["C4"]["reason"]
    assert "the paper's setting, not printed there" not in report.markdown
    assert "No claim is about one-shot" in report.markdown
    assert "epochs\\_search is not the same for all: one-shot 0, progressive 1" in report.markdown


@pytest.mark.parametrize("base", [{}, {"normalise": "none"}], ids=["no base", "a base of its own"])
def test_the_papers_setting_is_what_the_paper_set(tmp_path, base):
    made = {}
    for seed in range(3):
        for normalise in ("none", "zscore"):
            run = fake.result(seed=seed, target="prunable=0.8", normalise=normalise)
            run["accuracy"]["retrain"] = fake.both(0.7123 if normalise == "none" else 0.7789)
            made[f"{normalise}-{seed}"] = run
    entries = {label: {"differences": {}, "state": "done", "error": None} for label in made}
    text = build(fake.write(tmp_path, made, {"runs": entries, "dense": None, "base": base})).markdown
    (line,) = (line for line in text.splitlines() if "the paper's setting, not printed there" in line)
    assert "77.89 ± 0.00 % (n = 3)" in line
    assert "71.23" not in line


def test_repeated_and_unlisted_results_are_left_out_aloud(tmp_path):
    runs = {"a": fake.result(), "b": fake.result(out="elsewhere"), "stray": fake.result(seed=7)}
    listed = {label: {"differences": {}, "state": "done", "error": None} for label in ("a", "b")}
    results = load_results(fake.write(tmp_path, runs, {"runs": listed, "dense": None}))
    assert [run.label for run in results.runs] == ["a"]
    assert results.notes == (
        "stray: not in study.json, left out",
        "b: repeats the settings and seed of a, left out",
    )


def test_of_two_runs_of_the_same_settings_the_one_with_more_stages_counts(tmp_path):
    runs = {"a": fake.result(stages="search"), "b": fake.result(), "c": fake.result()}
    del runs["a"]["accuracy"]["retrain"]
    results = load_results(fake.write(tmp_path, runs))
    assert [run.label for run in results.runs] == ["b"]
    assert results.notes == tuple(f"{label}: repeats the settings and seed of b, left out" for label in "ac")


def test_failed_and_missing_runs_are_counted_and_named(tmp_path):
    runs = {
        "good": {"differences": {}, "state": "done", "error": None},
        "bad": {"differences": {}, "state": "failed", "error": "loss is not finite"},
        "gone": {"differences": {}, "state": "missing", "error": None},
    }
    fake.write(tmp_path, {"good": fake.result()}, {"runs": runs, "dense": None})
    page = build(tmp_path).markdown
    assert "runs: 1 done, 1 failed, 1 missing" in page
    assert "| bad | failed: loss is not finite |" in page


def test_one_run_alone_makes_a_page(tmp_path):
    made = fake.result(seed=3)
    del made["accuracy"]["retrain"]
    made["trajectory"] = None
    page = build(fake.write(tmp_path, {"only": made}))
    assert "No run recorded its masks over the search." in page.markdown
    assert "n = 0 paired seeds, 3 needed" in page.markdown
    assert "dense-continued not run" in page.markdown
    assert "nan" not in page.markdown.lower()


def of_model(name, accuracy, size, **config):
    made = fake.result(model=name, **config)
    made["params"] = {"before": size, "after": size // 2}
    made["accuracy"] |= {"dense": fake.both(accuracy), "retrain": fake.both(accuracy - 0.02)}
    return made


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["one seed", "two seeds"])
def test_models_of_two_sizes_are_two_rows_each_beside_its_own_dense_model(tmp_path, seeds):
    made = {
        "a": of_model("vit-small", 0.50, 100_000, seed=seeds[0]),
        "b": of_model("vit-large", 0.90, 900_000, seed=seeds[1]),
    }
    text = build(fake.write(tmp_path, made)).markdown
    assert "70.00" not in text, "the mean of two different models"
    table = text.partition("## Accuracy against size and speed")[2].partition("\n## ")[0]
    assert re.search(r"^\| upop, model=vit-small \|.*\| 0.05 \|.*\| 48.00 \(1\) \| *$", table, re.M)
    assert re.search(r"^\| upop, model=vit-large \|.*\| 0.45 \|.*\| 88.00 \(1\) \| *$", table, re.M)
    assert "Dense, model=vit-small: 50.00 % (n = 1); dense, model=vit-large: 90.00 % (n = 1)" in table
    assert "Several models or data sets" in text
    assert "One model and one data set" not in text
    assert "its runs start from" not in text


def test_runs_on_different_models_are_never_paired(tmp_path):
    made = {f"large-{seed}": of_model("vit-large", 0.90, 900_000, seed=seed) for seed in range(3)}
    made |= {f"small-{seed}": of_model("vit-small", 0.50, 100_000, seed=seed) for seed in range(2)}
    small = {"method": "magnitude"}
    made |= {f"magnitude-{seed}": of_model("vit-small", 0.50, 100_000, seed=seed, **small) for seed in range(3)}
    results = load_results(fake.write(tmp_path, made))
    comparison = compare(results.runs, Side("upop"), Side("magnitude"), stage="retrain")
    assert [(row.a.n, row.a.mean, row.b.mean) for row in comparison.rows] == [(2, 48.0, 48.0)]
    assert not [note for note in results.notes if "start from" in note]


def of_data(mark, path, **config):
    """A run on images with this fingerprint, wherever they lay."""
    made = fake.result(data=path, **config)
    return made | {"data": made["data"] | {"fingerprint": mark}, "given": {"data": path, **config}}


def test_data_are_known_by_their_images_and_not_by_their_path(tmp_path):
    made = {f"here-{seed}": of_data("a" * 64, "photos", seed=seed) for seed in range(2)}
    made["there"] = of_data("a" * 64, "/disk/photos", seed=2)
    assert [(g.name, len(g.runs)) for g in load_results(fake.write(tmp_path, made)).groups] == [("upop", 3)]
    other = {f"other-{seed}": of_data("b" * 64, "photos", seed=seed, method="mask") for seed in range(3)}
    results = load_results(fake.write(tmp_path, other))
    assert {group.name for group in results.groups} == {"upop, data=photos (aaaaaaaa)", "mask, data=photos (bbbbbbbb)"}
    assert not compare(results.runs, Side("upop"), Side("mask"), stage="retrain").rows


def test_a_part_of_the_data_is_a_variant_by_the_option_that_says_so(tmp_path):
    made = {f"all-{seed}": of_data("a" * 64, "photos", seed=seed, subset=None) for seed in range(2)}
    made["part"] = of_data("b" * 64, "photos", subset=100)
    names = {group.name for group in load_results(fake.write(tmp_path, made)).groups}
    assert names == {"upop", "upop, subset=100"}


def test_dense_models_are_known_by_their_weights(tmp_path):
    made = {method: fake.result(method=method) | {"start": method} for method in ("upop", "mask")}
    notes = load_results(fake.write(tmp_path, made)).notes
    assert "seed 0: its runs start from 2 different dense models" in notes
    made["mask"]["start"] = "upop"
    made["mask"]["config"]["model"] = "/another/machine/model"
    results = load_results(fake.write(tmp_path, made))
    assert not results.notes
    assert {group.name for group in results.groups} == {"upop", "mask"}


def test_dense_models_of_one_shape_are_seeds_of_one(tmp_path):
    made = {str(seed): of_model(f"dense-{seed}", 0.9, 900_000, seed=seed) for seed in (0, 1)}
    text = build(fake.write(tmp_path, made)).markdown
    assert "| upop | prunable=0.5 |" in text
    assert "88.00 ± 0.00 (2)" in text
    assert "One model and one data set" in text


def test_dense_models_of_several_levels_have_no_mean(tmp_path):
    """As in a study of how long the dense model was trained: every seed starts from a weak one and from a good one."""
    made = {}
    for seed in range(3):
        for epochs, level in ((2, 0.26), (30, 0.97)):
            run = fake.result(seed=seed, epochs_dense=epochs)
            run["accuracy"]["dense"] = fake.both(level + seed / 100)
            made[f"{epochs}-{seed}"] = run
    text = build(fake.write(tmp_path, made)).markdown
    assert "Dense several: 27.00 ± 1.00 % (n = 3), 98.00 ± 1.00 % (n = 3); dense-continued not run." in text
    (line,) = (line for line in text.splitlines() if "| dense model |" in line)
    assert "| several: 27.00 ± 1.00 % (n = 3), 98.00 ± 1.00 % (n = 3) |" in line


def test_dense_models_of_several_shapes_have_no_mean(tmp_path):
    made = {"small": fake.dense(), "large": fake.dense(seed=1)}
    made["small"]["config"]["model"], made["large"]["config"]["model"] = "vit-small", "vit-large"
    made["large"]["accuracy"] = {"dense": fake.both(0.9)}
    text = build(fake.write(tmp_path, made)).markdown
    assert "Dense several: 82.08 % (n = 1), 90.00 % (n = 1)" in text
    assert "86.04" not in text


def test_dense_runs_alone_are_counted_by_model_and_seed(tmp_path):
    for name in ("narrow", "wide"):
        made = fake.dense()
        (tmp_path / f"{name}.json").write_text(json.dumps({**made, "config": {**made["config"], "model": name}}))
    page = build(tmp_path).markdown
    assert "- 1 seed: " in page
    assert "- Several models or data sets: " in page


def test_a_dense_run_alone_makes_a_page(tmp_path):
    assert "82.08" in build(fake.write(tmp_path, {"dense": fake.dense()})).markdown


NASTY = "<script>alert(1)</script> & `x` | *y*"


def test_labels_are_shown_not_run(tmp_path):
    made = fake.result(seed=1)
    made["command"], made["warnings"] = NASTY, [NASTY]
    made["trajectory"]["step"] = made["trajectory"]["step"]
    (tmp_path / "a<b>&amp;.json").write_text(json.dumps(made))
    about = {"runs": {"a<b>&amp;": {"state": "done"}, NASTY: {"state": "failed", "error": NASTY}}, "dense": None}
    fake.write(tmp_path, {}, {**about, "name": NASTY, "about": NASTY})
    page = build(tmp_path)
    assert "<script>alert" not in page.html
    assert "a&lt;b&gt;&amp;amp;" in page.html
    assert "<script>" not in page.markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\`x\\` \\| \\*y\\*" in page.markdown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, r"bad/result\.json: expected a result of schema 2, got schema 1; run it again"),
        ({"status": "failed"}, r"bad/result\.json: expected status 'complete', got 'failed'"),
        ({"ratio": None}, r"bad/result\.json: expected ratio\.prunable as a number, got nothing; run it again"),
        ({"widths": {"before": {"attn": [64]}}}, r"bad/result\.json: expected widths as units per kind and layer"),
        ({"accuracy": {"dense": {"test": 0.8}}}, r"accuracy\.dense\.validation as a fraction, got nothing"),
        (
            {"accuracy": {"dense": {"test": 82.0, "validation": 0.8}}},
            r"accuracy\.dense\.test as a fraction, got 82\.0",
        ),
        ({"accuracy": []}, r"accuracy as an object, got \[\]"),
        ({"config": {"method": "upop", "target": "x"}}, r"config\.seed as a whole number, got nothing"),
        ({"trajectory": {"step": [1]}}, r"trajectory as null or step, ratio and mean_mask"),
        ({"latency": {"1": {"before": {}}}}, r"latency as milliseconds"),
        ({"start": ["x"]}, r"start as null or text"),
        ({"data": {"classes": ["a"], "fingerprint": 7}}, r"data as null or name, classes, images and fingerprint"),
    ],
)
def test_a_result_that_cannot_be_used_is_one_line(tmp_path, changes, message):
    fake.write(tmp_path, {"good": fake.result(), "bad": {**fake.result(seed=1), **changes}})
    with pytest.raises(UpopError, match=message) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bad\.json: expected readable JSON"),
        ("[]", "a JSON object, got list"),
        ('{"gap": NaN}', "the number NaN"),
    ],
)
def test_files_that_are_no_results_are_one_line(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UpopError, match=message):
        build(tmp_path)


def test_empty_and_absent_folders_say_what_to_do(tmp_path):
    with pytest.raises(UpopError, match="expected results, got none; run the study first"):
        build(tmp_path)
    with pytest.raises(UpopError, match="expected a folder with results, got none"):
        build(tmp_path / "nowhere")


def test_a_study_of_another_schema_is_refused(tmp_path):
    fake.write(tmp_path, {"a": fake.result()})
    (tmp_path / "study.json").write_text('{"schema": 9}')
    with pytest.raises(UpopError, match=r"study\.json: expected a study of schema 1, got schema 9"):
        build(tmp_path)


def test_two_results_under_one_label_are_refused(tmp_path):
    fake.write(tmp_path, {"a": fake.result()})
    (tmp_path / "a.json").write_text(json.dumps(fake.result()))
    with pytest.raises(UpopError, match="expected one result per label"):
        build(tmp_path)


ALONE = """
import sys, types
package = types.ModuleType("upop")
package.__path__ = [sys.argv[1]]  # the package without its __init__, which has torch for everyone
sys.modules["upop"] = package
import pathlib, upop.report.page
upop.report.page.build(pathlib.Path(sys.argv[2]))
print(sorted({"torch", "transformers", "accelerate", "pydantic", "datasets"} & set(sys.modules)))
"""


def test_no_torch_is_needed(tmp_path):
    fake.write(tmp_path, {"a": fake.result()})
    command = [sys.executable, "-c", ALONE, str(Path(upop.__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_published_numbers_stand_beside_ours(report):
    line = next(line for line in report.markdown.splitlines() if "retrained: mask-based" in line)
    assert "77.9 %" in line
    assert "points" not in line.split("|")[3]
    assert re.search(r"\d\d\.\d\d ± \d\.\d\d % \(n = 3\)", line)
