"""What waits for a GPU: its commands are ones that the programs take, and it can be worked off in several calls."""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import typer

from upop import cli
from upop.config import PruneConfig, make_config
from upop.configtext import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "benchmarks/gpu.py"))


def call(gpu, monkeypatch, tmp_path, *arguments):
    """The exit code of the script with a folder of its own."""
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *places, *arguments])
    return gpu["main"]()


def give(gpu, tmp_path, *steps):
    """The script with these steps, (name, Python, minutes), in place of its own."""
    made = []
    for name, code, minutes in steps:
        program = tmp_path / f"{name}.py"
        program.write_text(code)
        made.append(gpu["Step"](name, f"python {program}", minutes))
    gpu["main"].__globals__["STEPS"] = tuple(made)


def test_every_command_is_one_that_its_program_takes(gpu, monkeypatch, tmp_path, capsys):
    assert call(gpu, monkeypatch, tmp_path, "--list") == 0
    commands = [line.split(": ", 1)[1].split() for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == len(gpu["STEPS"])
    helps: dict[str, str] = {}
    for command in commands:
        if command[:2] == ["-m", "upop"]:
            name, *rest = command[2:]
            values = typer.main.get_command(cli.app).commands[name].make_context(name, rest).params
            if name == "prune":
                given = {n: v for n, v in values.items() if n in PruneConfig.model_fields and v is not None}
                make_config(load_config(Path(values["config"])) | given)
        else:
            options = [word for word in command[1:] if word.startswith("--")]
            if command[0] not in helps:
                monkeypatch.setattr(sys, "argv", [command[0], "--help"])
                with pytest.raises(SystemExit, match="0"):
                    runpy.run_path(str(ROOT / command[0]), run_name="__main__")
                helps[command[0]] = capsys.readouterr().out
            assert set(options) <= set(re.findall(r"--[a-z-]+", helps[command[0]])), command


def test_a_step_that_is_done_is_not_done_again_and_one_that_failed_is(gpu, monkeypatch, tmp_path):
    log = tmp_path / "log"
    note = f'open("{log}", "a").write("%s\\n")'
    give(gpu, tmp_path, ("good", note % "good", 1), ("bad", note % "bad" + "; raise SystemExit(3)", 1))
    assert call(gpu, monkeypatch, tmp_path) == 1
    assert call(gpu, monkeypatch, tmp_path) == 1
    assert log.read_text().split() == ["good", "bad", "bad"]
    assert set(json.loads((tmp_path / "out/done.json").read_text())) == {"good"}
    assert call(gpu, monkeypatch, tmp_path, "--only", "good") == 0


def test_a_step_out_of_time_is_asked_to_stop_and_what_it_kept_is_brought_home(gpu, monkeypatch, tmp_path):
    run = tmp_path / "runs/full/upop_params0.9_s0"
    another = tmp_path / "runs/demo/result.json"
    another.parent.mkdir(parents=True)
    another.write_text("{}")
    keep = (
        "import pathlib, signal, time; "
        f'd = pathlib.Path("{run}"); d.mkdir(parents=True, exist_ok=True); '
        'signal.signal(signal.SIGTERM, lambda *_: ((d / "result.json").write_text("{}"), exit(75))); '
        '(d / "begun").touch(); time.sleep(60)'
    )
    give(gpu, tmp_path, ("long", keep, 2 / 60), ("next", "pass", 1))
    assert call(gpu, monkeypatch, tmp_path) == 1
    assert (run / "begun").exists()
    assert (tmp_path / "out/full/upop_params0.9_s0.json").read_text() == "{}"
    assert not list((tmp_path / "out").rglob("demo*")), "is none of a step's"
    assert set(json.loads((tmp_path / "out/done.json").read_text())) == {"next"}


def test_paths_may_have_spaces(gpu):
    places = {"data": "my data", "runs": Path("my runs"), "out": Path("o"), "device": "cuda"}
    words = [word for step in gpu["STEPS"] for word in step.words(argparse.Namespace(**places))]
    assert {"my data", "my runs/full"} <= set(words)
    assert "my" not in words


def test_nothing_is_begun_in_the_last_minute(gpu, monkeypatch, tmp_path):
    give(gpu, tmp_path, ("one", f'open("{tmp_path / "begun"}", "w")', 1))
    assert call(gpu, monkeypatch, tmp_path, "--minutes", "1") == 1
    assert not (tmp_path / "begun").exists()
