"""Options and config files say the same things, and say clearly what is wrong with them."""

import tomllib
from pathlib import Path

import pytest

from upop.config import PAPER, ConfigError, PruneConfig, given_values, is_given, make_config
from upop.configtext import load_config, to_toml

NEEDED = {"model": "deit-digits", "data": "digits"}


def test_a_saved_config_reads_back_as_the_same_config(tmp_path):
    config = make_config({**NEEDED, "lr": 3e-4, "mixup": 0.8, "flip": False, "out": 'a "quoted" é folder'})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert make_config(load_config(path)) == config


def test_a_resolved_config_leaves_nothing_to_be_chosen_but_what_is_off():
    resolved = make_config(NEEDED).resolve(trained=True, device_type="cpu")
    values = resolved.model_dump()
    open_values = {key for key, value in values.items() if value in (None, "auto")}
    off = {"validation", "subset", "tracker", "threshold", "max_drop", "tolerance", "threads"}
    assert open_values == off | {"lr_mask", "sparsity_mlp", "align"}, "the last three are the plan's to fill in"
    assert tomllib.loads(to_toml(resolved))["lr"] == values["lr"]


def test_pretrained_weights_get_a_learning_rate_that_keeps_them():
    assert make_config(NEEDED).resolve(trained=True, device_type="cpu").lr <= 1e-4


def test_the_papers_setting_has_a_name_and_options_win_over_it():
    paper = make_config(NEEDED | {"recipe": "paper"}).resolve(trained=True, device_type="cuda")
    assert {key: getattr(paper, key) for key in PAPER} == PAPER
    assert paper.epochs_retrain == 5 * paper.epochs_search
    own = make_config(NEEDED | {"recipe": "paper", "align": "attn=8", "epochs_search": 2.5})
    assert (own.align, own.epochs_search, own.epochs_retrain) == ("attn=8", 2.5, 5)
    with pytest.raises(ConfigError, match=r"recipe: .*'best' or 'paper', got 'papre'"):
        make_config(NEEDED | {"recipe": "papre"})


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, (0, 6)),
        ({"method": "magnitude"}, (0, 6)),
        ({"normalise": "none", "compensate": "none", "distill": 0.5}, (0, 6)),
        ({"epochs_search": 3}, (3, 5)),
        ({"epochs_retrain": 20}, (0, 20)),
        ({"recipe": "paper"}, (1, 5)),
        ({"method": "mask"}, (1, 5)),
        ({"method": "dense-continued"}, (1, 5)),
        ({"target": "open", "max_drop": 0.01}, (1, 5)),
        ({"tolerance": 0.01}, (1, 5)),
        ({"max_drop": 0.01}, (1, 5)),
        ({"schedule": "sine"}, (1, 5)),
        ({"schedule": "sine", "epochs_search": 0}, (0, 6)),
        ({"schedule": "linear"}, (1, 5)),
        ({"lr_search": 1e-3}, (1, 5)),
        ({"sparsity_mlp": 0.0}, (1, 5)),
    ],
)
def test_units_are_ranked_without_a_search_unless_something_that_is_asked_for_needs_one(options, epochs):
    config = make_config(NEEDED | options)
    # Written down whole, as a checkpoint does, it means the same: no option is asked for by being written.
    for same in (config, make_config(config.model_dump())):
        resolved = same.resolve(trained=True, device_type="cpu")
        assert (resolved.epochs_search, resolved.epochs_retrain) == epochs


@pytest.mark.parametrize("goal", ["max_drop", "tolerance"])
def test_a_ranking_keeps_to_no_accuracy(goal):
    with pytest.raises(ConfigError, match=rf"{goal}: needs a search, got a one-shot ranking"):
        make_config(NEEDED | {"epochs_search": 0, goal: 0.02})


@pytest.mark.parametrize(("method", "shrink"), [("upop", "progressive"), ("mask", "once"), ("magnitude", "once")])
def test_the_papers_baselines_cut_as_they_do(method, shrink):
    config = make_config(NEEDED | {"recipe": "paper", "method": method})
    assert config.resolve(trained=True, device_type="cpu").shrink == shrink


def test_options_of_stages_that_are_not_run_do_not_make_another_run():
    dense = make_config(NEEDED | {"stages": "dense", "lr": 0.02})
    found = given_values(dense) | {"epochs_search": 1, "epochs_retrain": 5, "normalise": "zscore"}
    assert is_given(found, dense)
    assert not is_given(found | {"lr": 0.01}, dense)
    assert not is_given(found, make_config(NEEDED | {"lr": 0.02}))
    assert not is_given(given_values(dense) | {"of_another_time": 3}, dense)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"epochs_search": 0}, "zscore"),
        ({"epochs_search": 0, "stages": "search"}, "none"),
        ({"epochs_search": 0, "stages": "dense,search"}, "none"),
        ({"epochs_search": 0, "stages": "search", "method": "magnitude"}, "zscore"),
        ({"stages": "search", "epochs_search": 1}, "zscore"),
        ({"epochs_search": 0, "normalise": "none"}, "none"),
        ({"epochs_search": 0, "stages": "search", "normalise": "rank"}, "rank"),
    ],
)
def test_effects_on_the_loss_are_ranked_as_they_are_only_where_nothing_is_retrained(options, how):
    resolved = make_config(NEEDED | options).resolve(trained=True, device_type="cpu")
    assert resolved.normalise == how


def test_what_the_user_says_is_never_replaced():
    chosen = make_config({**NEEDED, "lr": 0.5, "lr_search": 0.25, "optimizer": "adamw", "epochs_dense": 7})
    resolved = chosen.resolve(trained=False, device_type="cpu")
    assert (resolved.lr, resolved.lr_search, resolved.optimizer, resolved.epochs_dense) == (0.5, 0.25, "adamw", 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch_search": 3}, "unknown key 'epoch_search'; did you mean 'epochs_search'"),
        ({"lr": -1}, "lr: .*greater than 0, got -1"),
        ({"lr": float("nan")}, "lr: .*finite"),
        ({"structures": "dims,qk,v"}, r"^run\.toml: structures: dims and qk and v own the same head dims"),
        ({"epochs_search": "abc"}, "epochs_search: expected a number, as 3 or 0.5, got 'abc'"),
        ({"epochs_retrain": "0,5"}, "epochs_retrain: expected a number, as 3 or 0.5, got '0,5'"),
        ({"stages": "retrain", "distill": 1}, "run.toml: distill: needs the dense model, .* use search,retrain"),
        ({"stages": "retrain", "distill_features": 0.5}, "distill_features: needs the dense model"),
        ({"stages": "dense,serch"}, "stages: expected some of dense, search, retrain, got 'serch'.*'search'"),
        ({"stages": "dense,retrain"}, "expected a search between dense and retrain"),
        ({"schedule": "sin"}, "schedule: expected one of sine, .*did you mean 'sine'"),
        ({"batch_size": "many"}, "batch_size: .*got 'many'"),
        ({"precision": "fp8"}, "precision: .*'bf16'.*got 'fp8'"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_config({**NEEDED, **values}, where="run.toml")
    assert str(caught.value).startswith("run.toml: ")
    assert "\n" not in str(caught.value)


def test_missing_values_are_named():
    with pytest.raises(ConfigError, match="options: data: missing; expected cifar10, a Hub data set"):
        make_config({"model": "deit-digits"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model = ", r"broken\.toml: expected TOML"),
        (b"\xff\xfe\x00", r"broken\.toml: expected text in UTF-8, got byte 0xff at 0; save it as UTF-8"),
        (b"model = " + b"[" * 100_000, r"broken\.toml: expected TOML.*nested too deeply"),
        (b"seed = " + b"9" * 5000, r"broken\.toml: expected TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_of_an_editor_on_windows_is_read(tmp_path):
    (tmp_path / "run.toml").write_text('# Größe\nmodel = "m"\n', encoding="utf-8-sig", newline="\r\n")
    assert load_config(tmp_path / "run.toml") == {"model": "m"}


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        load_config(tmp_path / "absent.toml")


def test_every_field_says_what_it_is_for():
    assert all(info.description for info in PruneConfig.model_fields.values())


@pytest.mark.parametrize(
    ("device", "precision", "kernel"), [("cpu", "bf16", "eager"), ("cpu", "fp32", "sdpa"), ("cuda", "bf16", "sdpa")]
)
def test_the_attention_kernel_is_the_one_that_trains_faster_unless_one_is_asked_for(device, precision, kernel):
    values = {"model": "m", "data": "d", "out": "o", "precision": precision}
    assert make_config(values).resolve(trained=True, device_type=device).attention == kernel
    asked = make_config(values | {"attention": "eager"})
    assert asked.resolve(trained=True, device_type=device).attention == "eager"


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.toml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_hold(path):
    config = make_config(load_config(path))
    head = path.read_text(encoding="utf-8").partition("\nmodel")[0]
    assert f"--config configs/{path.name} " in head, "says how it is used"
    assert config.data == "cifar10"
    assert config.compile
