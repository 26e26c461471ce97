"""Promises of study files: differences only, every run once, and one clear line for what cannot be."""

from pathlib import Path

import pytest

from upop.config import ConfigError, make_config
from upop.configtext import command_line, load_config, to_toml
from upop.studyfile import find_study, load_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
BASE = """
seeds = [0, 1]
[dense]
model = "deit-digits"
epochs_dense = 1
[base]
data = "digits"
threads = 1
"""


def study(tmp_path, text, **overrides):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_study(path, tmp_path / "out", overrides)


def test_lists_multiply_and_every_seed_is_a_run(tmp_path):
    made = study(tmp_path, BASE + '[[grid]]\nmethod = ["upop", "mask"]\ntarget = ["prunable=0.5", "prunable=0.8"]\n')
    assert len(made.runs) == 8
    assert {(r.config.method, r.config.target, r.config.seed) for r in made.runs} == {
        (m, t, s) for m in ("upop", "mask") for t in ("prunable=0.5", "prunable=0.8") for s in (0, 1)
    }
    assert made.runs[0].label == "upop_prunable0.5_s0"
    assert {r.config.model for r in made.runs} == {str(tmp_path / "out/dense/model")}
    assert {r.config.stages for r in made.runs} == {"search,retrain"}


def test_a_run_in_two_grids_is_one_run(tmp_path):
    grids = '[[grid]]\nmethod = ["upop", "mask"]\n[[grid]]\nschedule = ["sine", "linear"]\n'
    labels = [run.label for run in study(tmp_path, BASE + "epochs_search = 1\n" + grids).runs]
    assert len(labels) == len(set(labels)) == 6
    assert "upop_params0.5_schedule-linear_s1" in labels


@pytest.mark.parametrize("names", [("my_photos", "my-photos"), ("sets/1", "sets1"), ("фото", "кадры")], ids=ascii)
def test_two_runs_of_one_label_are_refused(tmp_path, names):
    text = BASE + f'[[grid]]\nmethod = "upop"\n[[grid]]\ndata = ["{names[0]}", "{names[1]}"]\n'
    message = (
        rf"\[\[grid\]\] 2: data: expected .* {names[0]!r} and {names[1]!r}, whose runs would both be upop_.*_s0; "
    )
    with pytest.raises(ConfigError, match=message) as refused:
        study(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_a_ranking_and_a_search_are_two_runs(tmp_path):
    grids = '[[grid]]\nmethod = "upop"\n[[grid]]\nschedule = ["sine", "linear"]\n'
    runs = study(tmp_path, BASE + grids).runs
    assert [(run.config.one_shot, run.config.schedule) for run in runs[::2]] == [
        (True, "sine"),
        (False, "sine"),
        (False, "linear"),
    ]


def test_runs_and_the_dense_model_share_what_they_must(tmp_path):
    made = study(tmp_path, BASE + '[[grid]]\nmethod = "upop"\n', data="cifar10")
    assert made.dense.config.data == made.runs[0].config.data == "cifar10"
    assert made.dense.config.threads is None, "it runs alone: all cores unless its own table says otherwise"
    assert made.dense.config.stages == "dense"


def test_the_command_of_a_run_makes_the_same_configuration(tmp_path):
    import shlex

    grids = '[[grid]]\nmethod = "mask"\nflip = false\nsparsity_attn = 0.0\n[[grid]]\nschedule = "sine"\n'
    grids += '[[grid]]\nrecipe = "paper"\nalign = "auto"\ncompensate = "auto"\n'
    made = study(tmp_path, BASE + grids)
    assert len(made.runs) == 6
    for run in made.runs:
        words = shlex.split(command_line(run.config))
        assert words[:2] == ["upop", "prune"]
        values, rest = {}, words[2:]
        while rest:
            flag = rest.pop(0)
            if flag.startswith("--no-"):
                values[flag[5:]] = False
            elif not rest or rest[0].startswith("--"):
                values[flag[2:].replace("-", "_")] = True
            else:
                values[flag[2:].replace("-", "_")] = rest.pop(0)
        assert make_config(values) == run.config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = []\n" + BASE.replace("seeds = [0, 1]", "") + "[[grid]]\n", r"mine.toml: seeds: expected different"),
        (BASE.replace("[0, 1]", "[0, 0]") + "[[grid]]\n", r"seeds: expected different whole numbers.*got \[0, 0\]"),
        (BASE, r"mine.toml: expected a table \[\[grid\]\]"),
        (BASE + "[[grid]]\nmethod = []\n", r"\[\[grid\]\] 1: method: expected at least one value, got an empty list"),
        (BASE + '[[grid]]\nmethod = ["upop", "upop"]\n', r"\[\[grid\]\] 1: method: expected different values"),
        (BASE + '[[grid]]\nmethod = "upp"\n', r"\[\[grid\]\] 1: method: .*got 'upp'; did you mean 'upop'\?"),
        (BASE + '[[grid]]\nmetod = "upop"\n', r"\[\[grid\]\] 1: unknown key 'metod'; did you mean 'method'\?"),
        (BASE + '[[grid]]\nschedule = "sin"\n', r"schedule: expected one of .* did you mean 'sine'\?"),
        (BASE + '[[grid]]\nbinarise = "threshold"\n', r"threshold: expected together with binarise"),
        (BASE + "[[grid]]\nmax_drop = 0.1\ntolerance = 0.1\n", r"got max_drop and tolerance"),
        (BASE + '[[grid]]\ntarget = "open"\n', r"target: open needs one of threshold, max_drop, tolerance"),
        (BASE + '[[grid]]\nmodel = "deit-tiny"\n', r"model is the same for all runs of a study"),
        ("sedes = [1]\n" + BASE + "[[grid]]\n", r"unknown key 'sedes'; did you mean 'seeds'\?"),
        ('[base]\nmodel = "deit-digits"\n[[grid]]\n', r"expected data in \[base\]"),
        ('[base]\ndata = "digits"\n[[grid]]\n', r"expected model in \[base\] or a table \[dense\]"),
        ("grid = 3\n" + BASE, r"expected grid as \[\[grid\]\] tables"),
        ("seeds = [0\n", r"mine.toml: expected TOML"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        study(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_an_unknown_study_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'smok': expected a file .*one of .*claims.*; did you mean 'smoke'\?"):
        find_study("smok")
    with pytest.raises(ConfigError, match=r"no.toml: cannot be read"):
        load_study(Path("no.toml"), Path("out"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_along_can_be_read_and_say_what_they_are(path, tmp_path):
    made = load_study(path, tmp_path)
    assert all(made.texts[key] for key in ("about", "hardware", "wall_clock", "expected"))
    assert f"upop study {path.stem}" in path.read_text().partition("[dense]")[0]
    # Fewer are a look, and must be called that.
    assert len(made.seeds) >= 3 or "One seed." in made.texts["about"]


def test_the_documentation_names_every_study_that_comes_along():
    table = (Path(__file__).parents[2] / "docs/studies.md").read_text().partition("| study | question |")[2]
    assert not [path.stem for path in STUDIES if f"`{path.stem}`" not in table]


def test_the_claims_study_covers_every_claim_and_experiment(tmp_path):
    made = load_study(find_study("claims"), tmp_path)
    configs = [run.config for run in made.runs]
    assert {c.method for c in configs} >= {"upop", "unified", "progressive", "mask", "magnitude", "dense-continued"}
    assert {c.target for c in configs} >= {"prunable=0.5", "prunable=0.8", "prunable=0.9", "prunable=0.95", "open"}
    assert len({c.schedule for c in configs}) == 6
    assert {c.normalise or "zscore" for c in configs} >= {"zscore", "none"}
    assert {"threshold"} < {c.binarise for c in configs}
    assert any(c.sparsity_attn == 0 for c in configs)
    assert any(c.max_drop for c in configs)
    assert any(c.tolerance for c in configs)


def test_the_command_of_a_study_finds_its_file_and_its_data(tmp_path):
    made = study(tmp_path, BASE + '[[grid]]\nmethod = "upop"\n', data="my photos")
    assert made.texts["command"] == "upop study mine.toml --data 'my photos'"
    assert load_study(find_study("smoke"), tmp_path / "out").texts["command"] == "upop study smoke"


def test_load_config_reads_what_a_run_saved(tmp_path):
    config = make_config({"model": "deit-digits", "data": "digits", "epochs_search": 0.5})
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert make_config(load_config(tmp_path / "c.toml")) == config


def test_what_the_dense_model_needs_of_the_data_and_the_machine_reaches_it(tmp_path):
    (tmp_path / "few.toml").write_text(
        '[dense]\nmodel = "deit-digits"\n[base]\ndata = "digits"\nskip_bad = true\nthreads = 1\n[[grid]]\nseed = 0\n'
    )
    dense = load_study(tmp_path / "few.toml", tmp_path / "out").dense
    assert dense is not None
    assert (dense.config.skip_bad, dense.config.threads) == (True, None)
    dense = load_study(tmp_path / "few.toml", tmp_path / "out", {"threads": "2"}).dense
    assert dense is not None
    assert dense.config.threads == 2


def test_labels_say_which_layers_a_run_ignores(tmp_path):
    grid = '[[grid]]\nseed = 0\nignored_layers = ["", "1,2", "12", "0,-1", "0-1"]\n'
    parts = [
        run.label.removesuffix("_s0").partition("ignored-layers-")[2] for run in study(tmp_path, BASE + grid).runs
    ]
    assert parts == ["", "1+2", "12", "0+-1", "0+1"]
