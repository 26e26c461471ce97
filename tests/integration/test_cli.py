"""The command line as a user meets it: what it shows, and one clear line with exit code 2 for everything wrong."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from upop import cli

QUICK = [
    *("--model", "deit-digits-2layers", "--data", "digits", "--subset", "300"),
    *("--epochs-dense", "1", "--epochs-search", "1", "--epochs-retrain", "1", "--latency-seconds", "0.05"),
]


@pytest.fixture
def upop(monkeypatch, capsys, tmp_path):
    """Runs `upop ARGUMENTS` in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["upop", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def refused(upop, tmp_path):
    """Runs a command that must be refused: exit code 2, one line on stderr, nothing new on the disk."""

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, _, message = upop(*arguments)
        assert code == 2, message
        assert message.startswith("upop: ")
        assert message.count("\n") == 1, message
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return call


def test_help_names_every_command_and_every_option(upop):
    code, text, _ = upop()
    assert code == 0
    for command in ("prune", "analyze", "eval", "demo", "view"):
        assert command in text
    assert "..." not in text.partition("Commands:")[2], "every command is told in one line"
    _, text, _ = upop("prune", "--help")
    for option in ("--model", "--target", "--epochs-search", "--dry-run", "--no-flip", "--gradient-order"):
        assert option in text


def test_version(upop):
    import upop as package

    assert upop("--version") == (0, f"upop {package.__version__}\n", "")


def test_analyze_shows_units_costs_and_the_reachable_range(upop):
    code, text, _ = upop("analyze", "deit-small")
    assert code == 0
    for fact in ("22,050,664", "21,265,920", "9,234", "769", "params=0.958", "GMACs"):
        assert fact in text


def test_dry_run_prints_the_plan_and_leaves_nothing(upop, tmp_path):
    code, text, _ = upop("prune", *QUICK, "--dry-run", "--out", "planned")
    assert code == 0
    for fact in ("parameters: 231,274 -> 115,637", "dense 2 steps", "images: digits: train 300", "lr_search = 0.0025"):
        assert fact in text
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_and_options_say_the_same_and_options_win(upop, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "deit-digits"\ndata = "digits"\nsubset = 300\nseed = 3\nbatch_size = 50\n')
    code, text, _ = upop("prune", "--config", path, "--batch-size", 100, "--dry-run")
    assert code == 0
    assert "seed = 3" in text
    assert "batch_size = 100" in text


def test_options_may_complete_what_a_config_file_begins(upop, refused, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "deit-digits"\ndata = "digits"\nsubset = 300\ntarget = "open"\n')
    code, text, _ = upop("prune", "--config", path, "--max-drop", 0.01, "--dry-run")
    assert (code, "max_drop = 0.01" in text) == (0, True)
    assert f"{path}: target: open needs one of threshold" in refused("prune", "--config", path)
    assert "learning" not in refused("prune", "--config", path, "--max-drop", 2)


def test_prune_ends_with_a_table_and_eval_agrees(upop, tmp_path):
    code, text, _ = upop("prune", *QUICK, "--out", "run")
    assert code == 0
    for row in ("dense", "after search, masked", "slimmed", "retrained", "parameters", "milliseconds, batch 64"):
        assert row in text
    result = json.loads((tmp_path / "run/result.json").read_text())
    code, text, _ = upop("eval", "run/model", "--data", "digits")
    assert code == 0
    assert "parameters" in text
    # A second run into the same folder is refused, unless told to overwrite, and never over its own model.
    code, _, message = upop("prune", *QUICK, "--out", "run")
    assert (code, "already holds a run" in message) == (2, True)
    code, _, message = upop("prune", "--model", "run/dense", "--data", "digits", "--out", "run", "--overwrite")
    assert (code, "which this run reads" in message) == (2, True)
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    code, _, _ = upop("prune", *QUICK, "--stages", "dense", "--out", "run", "--overwrite")
    assert code == 0
    assert not (tmp_path / "run/slim").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--data", "digits"], "model: missing; expected Hub name, local folder, or built-in shape"),
        (["prune", "deit-digits"], r"unexpected extra argument\(s\) \(deit-digits\); see upop prune --help"),
        (["eval", "deit-digits"], "Missing .*data; see upop eval --help"),
        (["prune", "--model", "deit-tiny-cifra", "--data", "digits"], "did you mean 'deit-tiny-cifar'"),
        (["prune", "--model", "no/such/folder", "--data", "digits"], "no/such/folder"),
        (["prune", *QUICK, "--target", "params=0.99"], "params=0.99: cannot be met; reachable here is params=0 to"),
        (["prune", *QUICK, "--target", "parms=0.5"], "did you mean 'params'"),
        (["prune", *QUICK, "--target", "params=half"], "expected a fraction removed or what is left after '='"),
        (["prune", *QUICK, "--target", "params=1.5"], "0 <= x < 1, or what is left, .* got 1.5"),
        (["prune", *QUICK, "--lr", "-1"], "lr: .*greater than 0"),
        (["prune", *QUICK, "--batch-size", "many"], "options: batch_size: .*integer.*got 'many'"),
        (["prune", *QUICK, "--epoch-search", "3"], "epoch-search.*epochs-search"),
        (["prune", *QUICK, "--tracker", "tensorbord"], "tracker 'tensorbord'"),
        (["prune", *QUICK, "--tracker", "tensorbord", "--dry-run"], "did you mean 'tensorboard'"),
        (["prune", *QUICK, "--config", "absent.toml"], "absent.toml: cannot be read"),
        (["prune", "--model", "deit-digits", "--data", "cifar11"], "cifar11.*cifar10"),
        (["eval", "deit-digits", "--data", "digits", "--split", "tset"], "--split: expected validation or test"),
        (["analyse", "deit-tiny"], "analyse"),
        (["export", "deit-digits", "--out", "x", "--split", "train"], "--split: expected validation or test"),
        (["export", "deit-digits", "--out", "x", "--subset", "9"], "--subset: .* say --data too"),
        (["prune", *QUICK, "--align", "attn=32"], "align: attn=32: expected less than the 32 units"),
        (["prune", *QUICK, "--structures", "head", "--target", "params=0.1"], "add a finer kind to the structures"),
    ],
)
def test_bad_options_are_refused_in_one_line(refused, arguments, message):
    assert re.search(message, refused(*arguments))


def test_an_unknown_key_in_a_config_file_names_the_nearest(refused, tmp_path):
    (tmp_path / "run.toml").write_text('model = "deit-digits"\ndata = "digits"\nepoch_search = 3\n')
    assert "run.toml: unknown key 'epoch_search'; did you mean 'epochs_search'?" in refused(
        "prune", "--config", "run.toml"
    )


def test_an_unsupported_model_names_its_modules(refused, tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    message = refused("prune", "--model", "swin", "--data", "digits")
    assert "SwinForImageClassification: unsupported model" in message
    assert "Linear x" in message


def test_a_head_that_does_not_fit_the_data_is_refused_or_replaced(refused, upop, tmp_path, make_model):
    make_model("vit", labels=7).save_pretrained(tmp_path / "seven")
    message = "its head has 7 labels, the data 10 classes"
    assert message in refused("eval", "seven", "--data", "digits")
    assert message in refused("prune", "--model", "seven", "--data", "digits", "--stages", "search,retrain")
    code, _, error = upop("prune", "--model", "seven", "--data", "digits", "--dry-run")
    assert code == 0, error


def _image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (shade, 90, 255 - shade)).save(path)


@pytest.fixture
def images(tmp_path):
    for kind in range(2):
        for number in range(40):
            _image(tmp_path / f"images/kind{kind}/{number:02}.png", 100 * kind + number)
    return tmp_path / "images"


def test_an_own_image_folder_is_pruned_on(upop, images):
    options = ["--model", "deit-digits", *QUICK[6:], "--batch-size", "16"]
    code, text, error = upop("prune", *options, "--data", images, "--out", "run")
    assert code == 0, error
    assert "retrained" in text


def test_broken_images_are_named_and_skipped_only_when_asked(refused, upop, images):
    (images / "kind0/05.png").write_bytes((images / "kind0/05.png").read_bytes()[:40])
    arguments = ["prune", "--model", "deit-digits", "--data", images, "--batch-size", 16]
    assert "05.png" in refused(*arguments)
    code, _, error = upop(*arguments, "--skip-bad", "--dry-run")
    assert code == 0, error


def test_a_folder_without_images_is_refused(refused, tmp_path):
    (tmp_path / "empty/cats").mkdir(parents=True)
    assert "empty" in refused("prune", "--model", "deit-digits", "--data", tmp_path / "empty")


def test_a_folder_with_other_files_is_not_overwritten(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert "holds thesis.txt, which no run of upop wrote" in refused("prune", *QUICK, "--out", "mine", "--overwrite")


def test_a_file_in_place_of_the_folder_is_refused(refused, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken is a file" in refused("prune", *QUICK, "--out", "taken/run")


def test_a_data_folder_is_not_overwritten_by_its_own_run(refused, images):
    arguments = ["prune", "--model", "deit-digits", "--data", images, "--out", images.parent]
    assert "which this run reads" in refused(*arguments, "--overwrite")


def test_the_folder_above_a_data_set_is_refused(refused, images):
    assert "2 classes or more" in refused("prune", "--model", "deit-digits", "--data", images.parent)


def test_a_full_disk_is_one_line_and_no_result(upop, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, message = upop("prune", *QUICK, "--out", "run")
    assert code == 2
    assert "cannot be written (No space left on device)" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.skipif(not Path("/sys").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_cannot_be_made_is_one_line(refused):
    assert "/sys/run: cannot be written" in refused("prune", *QUICK, "--out", "/sys/run")


def test_a_truncated_model_is_refused(refused, tmp_path, make_model):
    make_model("vit").save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cut/model.safetensors: damaged or cut short" in refused("analyze", "cut")


def test_a_loss_that_breaks_ends_in_one_line_with_the_step(upop, tmp_path):
    arguments = [*QUICK, "--optimizer", "adamw", "--lr", "1e30", "--clip", "0", "--precision", "fp32", "--out", "run"]
    code, _, message = upop("prune", *arguments)
    assert code == 2
    assert "at step" in message
    assert "no epoch was complete before that" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run/result.json").exists()


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setenv("UPOP_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["upop", "analyze", "deit-tinny"])
    with pytest.raises(ValueError, match="did you mean 'deit-tiny'"):
        cli.main()


def test_the_installed_command_works_without_a_terminal(tmp_path):
    program = "import atexit, runpy, sys; atexit.register(lambda: print('brought', *sys.modules)); "
    program += "runpy.run_module('upop.cli', run_name='__main__')"
    command = [sys.executable, "-c", program, "analyze", "deit-digits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0
    assert "parameters" in done.stdout
    assert done.stderr == ""
    # What a command has no use for, nobody is to wait for.
    brought = done.stdout.partition("brought ")[2].split()
    assert not {"datasets", "pandas", "matplotlib", "onnx", "plotly"} & set(brought)


def test_nobody_waits_for_garbage_to_be_collected_at_the_end_of_a_command():
    asked = "import atexit, gc, sys; atexit.register(lambda: print('kept', gc.get_freeze_count()))"
    script = f"{asked}; sys.argv = ['upop', '--version']; from upop.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout.partition("kept ")[2]) > 10_000


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("import upop; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, ""),
        ("from upop import cli; cli.app = stop; cli.main()", 130, "upop: interrupted; what was written so far stays"),
    ],
    ids=["while it is imported", "later"],
)
def test_ctrl_c_shows_no_traceback(where, code, said):
    script = "import os, signal, sys; sys.argv = ['upop']\n"
    script += f"def stop(**_): os.kill(os.getpid(), signal.SIGINT); signal.pause()\n{where}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (code, said)


def test_a_program_whose_package_imports_upop_is_not_taken_for_the_command(tmp_path):
    """`python -m theirs.train` keeps its Ctrl-C, and transformers know slimmed models in it."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import upop"
    )
    look = "import signal, sys; print(signal.getsignal(signal.SIGINT).__name__, 'upop.pretrained' in sys.modules)"
    (tmp_path / "theirs" / "train.py").write_text(look)
    run = [sys.executable, "-m", "theirs.train", "upop"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "default_int_handler True", done.stderr


def test_the_demo_is_a_valid_run():
    from upop.demo import demo_config

    config = demo_config(Path("runs/demo"))
    assert config.stages == "dense,search,retrain"


def test_the_demo_replaces_its_own_run_unasked_and_no_other(tmp_path, monkeypatch):
    from upop import run
    from upop.configtext import to_toml
    from upop.demo import demo_config
    from upop.plan import make_plan

    said = []
    monkeypatch.setattr(run, "prune", lambda config, *, overwrite, observer: said.append(overwrite) or 1 / 0)
    for change in ({}, {"seed": 1}, {"lr": 0.01}):
        plan = make_plan(demo_config(tmp_path).model_copy(update=change))
        (tmp_path / "config.toml").write_text(to_toml(plan.config))
        with pytest.raises(ZeroDivisionError):
            cli.demo(tmp_path)
    assert said == [True, False, False]


def save_dinov2(folder):
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_labels=10
    )
    Dinov2ForImageClassification(config).save_pretrained(folder)


def test_other_families_than_vit_are_pruned_saved_and_evaluated(upop, tmp_path):
    save_dinov2(tmp_path / "dino")
    data = ("--data", "digits", "--subset", "300")
    stages = ("--stages", "dense,search", "--epochs-dense", "0.5", "--epochs-search", "0", "--target", "macs=0.4")
    code, _, message = upop("prune", "--model", "dino", *data, *stages, "--structures", "qk,v,mlp", "--out", "out")
    assert code == 0, message
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["model_type"] == "upop_dinov2"
    assert len(config["value_widths"]) == 2
    code, text, _ = upop("eval", "out/model", *data)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert f"{100 * result['accuracy']['slim']['test']:.2f} %" in text
    assert f"{result['params']['after']:,} parameters" in text
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"| {result['params']['before']:,} | {result['params']['after']:,} |" in card
    assert "a model of one's own (`dino`)" in card
    code, _, message = upop("push", "out", "me/half")
    assert (code, message.count("\n")) == (2, 1)
    assert "me/half: out/model could not be uploaded: HF_HUB_OFFLINE is set" in message


def test_a_model_whose_slimmed_form_cannot_be_saved_is_refused_before_any_training(refused, tmp_path):
    from upop.families import Family, hf, register_family

    register_family(Family("mine", hf.DINOV2.matches, hf.DINOV2.find))
    save_dinov2(tmp_path / "dino")
    message = refused("prune", "--model", tmp_path / "dino", "--data", "digits", "--out", tmp_path / "out")
    assert "slimmed models of the class Dinov2ForImageClassification cannot be saved" in message


def test_resuming_takes_no_other_option(refused, tmp_path):
    assert "leave out all other options" in refused("prune", "--resume", tmp_path, "--seed", "1")
    assert "holds no whole checkpoint" in refused("prune", "--resume", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study", "smok"), "did you mean 'smoke'?"),
        (("study", "smoke", "--executor", "rays"), "executor: expected one of local, processes, ray, slurm"),
        (("study", "smoke", "--workers", "0"), "workers: expected 1 or more, got 0"),
        (("report", "nothing-here"), "nothing-here"),
        (("animate", "nothing-here"), "expected the folder of a run"),
        (("prune", "--model", "deit-digits", "--data", "digits", "--method", "upp"), "did you mean 'upop'?"),
        (("prune", "--model", "deit-digits", "--data", "digits", "--target", "open"), "needs one of threshold"),
    ],
)
def test_studies_reports_and_pictures_refuse_in_one_line(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_report_replaces_reports_alone(upop, refused, tmp_path):
    folder = Path(__file__).parents[2] / "results" / "crossed"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/report.md").write_text("# My own")
    message = refused("report", folder, "--out", "docs")
    assert message == "upop: docs/report.md: is no report of upop; choose another folder with --out\n"
    assert (tmp_path / "docs/report.md").read_text() == "# My own"
    for _ in range(2):
        assert upop("report", folder, "--out", "mine")[0] == 0


def test_a_home_that_no_shell_has_expanded_is_found(upop, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    results = Path(__file__).parents[2] / "results" / "crossed"
    assert upop("report", results, "--out=~/mine")[0] == 0
    assert upop("report", results, "--out", "~/mine too")[0] == 0
    assert sorted(path.name for path in tmp_path.rglob("report.md")) == ["report.md"] * 2
    assert (tmp_path / "home/mine/report.md").exists()
    assert upop("analyze", "~/no model")[2].startswith(f"upop: model '{tmp_path}/home/no model'")


def test_a_run_is_taken_up_where_its_paths_lead_somewhere(upop, refused, tmp_path, monkeypatch):
    begun = tmp_path / "where it began"
    for name in ("a", "b"):
        for number in range(12):
            file = begun / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(file)
    monkeypatch.chdir(begun)
    options = ["--model", "deit-digits-2layers", "--data", "photos", "--out", "half way", "--batch-size", "8"]
    options += ["--stages", "dense", "--epochs-dense", "2", "--latency-seconds", "0.02"]
    with monkeypatch.context() as patch:
        patch.setattr(cli.Watcher, "progress", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert upop("prune", *options)[0] == 75
    _, _, message = upop("prune", "--model", "deit-digits-2layers", "--data", "photos", "--out", "half way")
    assert "go on with --resume 'half way', or start over" in message
    monkeypatch.chdir(tmp_path)
    message = refused("prune", "--resume", begun / "half way")
    assert f"expected photos here, which this run reads; it was begun in {begun}: go on from there" in message
    monkeypatch.chdir(begun)
    assert upop("prune", "--resume", "half way")[0] == 0
