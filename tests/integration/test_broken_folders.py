"""Every command on a folder that is broken: exit code 2, one line on stderr, nothing written."""

import sys
from pathlib import Path

import pytest

from upop import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import readers

BROKEN = {
    "prune a model": (
        ["prune", "--model", "model", "--data", "digits", "--out", "out"],
        "model/model.safetensors",
        "model/model.safetensors: damaged or cut short",
    ),
    "prune on images": (
        ["prune", "--model", "model", "--data", "images", "--out", "out"],
        "images/ant/0.png",
        "images/ant/0.png: expected an image",
    ),
    "prune by a config": (["prune", "--config", "run.toml"], "run.toml", "run.toml: expected TOML"),
    "resume": (["prune", "--resume", "results"], "results/study.json", "results: holds no whole checkpoint"),
    "analyze": (["analyze", "model"], "model/config.json", "model/config.json: expected readable JSON"),
    "eval": (
        ["eval", "model", "--data", "images"],
        "model/preprocessor_config.json",
        "preprocessor_config.json: expected",
    ),
    "bench": (
        ["bench", "model", "model", "--out", "out"],
        "model/config.json",
        "model/config.json: expected readable",
    ),
    "export": (["export", "model", "--out", "out"], "model/model.safetensors", "model/model.safetensors: damaged"),
    "report": (
        ["report", "results"],
        "results/upop-0/result.json",
        "results/upop-0/result.json: expected readable JSON",
    ),
    "report of a study": (["report", "results"], "results/study.json", "results/study.json: expected readable JSON"),
    "collect": (
        ["report", "results", "--out", "out", "--collect"],
        "results/dense/result.json",
        "expected readable JSON",
    ),
    "study": (["study", "few.toml", "--out", "out"], "few.toml", "few.toml: expected TOML"),
    "animate": (["animate", "run", "--out", "out.gif"], "run/trace.npz", "run/trace.npz: "),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    for build in (
        readers.build_images,
        readers.build_results,
        readers.build_trace,
        readers.build_config,
        readers.build_study,
    ):
        build(folder)
    return folder


@pytest.mark.parametrize("damage", [b"", b"\x00\x01 not what it was"], ids=["empty", "other"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(sound, name, damage, monkeypatch, capsys):
    arguments, file, message = BROKEN[name]
    if not damage and file.endswith(".toml"):
        message = "expected"
    content = (sound / file).read_bytes()
    before = sorted(sound.rglob("*"))
    monkeypatch.chdir(sound)
    monkeypatch.setattr(sys, "argv", ["upop", *arguments])
    (sound / file).write_bytes(damage)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        (sound / file).write_bytes(content)
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.startswith("upop: ")
    assert said.count("\n") == 1, said
    assert message in said
    assert sorted(sound.rglob("*")) == before
