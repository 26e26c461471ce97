"""What README and the documentation show is run: Python as it stands, commands by the program itself.

A block that is not run stands in NOT_RUN, with its reason; a page's Python blocks run in order, in one namespace.
"""

import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from upop import cli
from upop.analysis import analyze
from upop.config import PruneConfig, make_config
from upop.methods import parse_align, parse_kinds
from upop.studyfile import find_study, load_study
from upop.targets import Target

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")])
PAGES += [ROOT / "benchmarks/peers/README.md"]
COMMANDS = typer.main.get_command(cli.app).commands

# (page, first line of the block) -> why it is not run.
NOT_RUN = {
    ("docs/data.md", "photos/"): "a folder, drawn",
    (
        "docs/quickstart.md",
        "                      validation accuracy  test accuracy",
    ): "one run's numbers, as it printed them",
}
# What stands for something that is not here: (page, text there, text that is run).
INSTEAD = [
    ("docs/own-loop.md", "zip(images, digits.target)", "zip(images[:200], digits.target)"),
    ("docs/own-loop.md", "max_steps=30", "max_steps=3"),
    ("docs/own-loop.md", "save_steps=10", "save_steps=1"),
    ("docs/own-loop.md", "checkpoint-10", "checkpoint-1"),
    # Enough work a pass, and enough passes, for a busy machine to see that less of the model is faster at all.
    ("docs/faster.md", "batch=8, image_size=224", "batch=64, image_size=32, seconds=1"),
    ("docs/faster.md", "latency=0.5", "latency=0.1"),
]


def relative(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    """The fenced blocks of a page in one of these languages, '' being none."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    found = [token for token in tokens if token.type == "fence"]
    return [token.content for token in found if token.info.strip() in languages]


def skipped(page, block):
    return (relative(page), block.splitlines()[0]) in NOT_RUN


def lines(block):
    """The commands of a block as words: continued lines joined, comments gone."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def pages_with(*languages):
    return [pytest.param(p, id=relative(p)) for p in PAGES if blocks(p, *languages)]


def commands():
    for page in PAGES:
        for block in blocks(page, "", "bash"):
            if skipped(page, block) or is_shown_output(block):
                continue
            for words in lines(block):
                yield pytest.param(words, id=f"{relative(page)}: {' '.join(words)[:60]}")


def is_shown_output(block):
    """A command, an empty line, and what it prints."""
    return block.startswith("upop ") and "\n\n" in block


def check_upop(words):
    """Parse `upop ...` as the program does, and check the values that it checks before it looks at any file."""
    assert words[0] in COMMANDS, words
    values = COMMANDS[words[0]].make_context(words[0], list(words[1:])).params
    if words[0] == "prune" and values["resume"] is None:
        config = make_config({n: v for n, v in values.items() if n in PruneConfig.model_fields and v is not None})
        assert config.open_ended or Target.parse(config.target)
    if words[0] == "analyze":
        parse_kinds(values["structures"])
        parse_align(values["align"])
    if words[0] == "study" and values["name"] != "NAME":
        find_study(values["name"])


def check_pip(words):
    for word in words:
        for extra in re.findall(r"\[(.*)\]", word):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extra.split(",")) <= set(known), word


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_that_is_shown_is_one_that_the_program_takes(words):
    while "=" in words[0]:  # settings of the environment
        words = words[1:]
    match words:
        case ["upop", *rest]:
            check_upop(rest)
        case ["accelerate" | "torchrun", *rest]:
            module = next(n for n, word in enumerate(rest) if word in ("upop", "upop.cli"))
            check_upop(rest[module + 1 :])
        case ["pip", "install", *rest]:
            check_pip(rest)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["python", file, *_]:
            assert (ROOT / file).is_file()
        case _:
            pytest.fail(f"{words}: not checked; give it a rule here, or the block a reason in NOT_RUN")


def test_every_block_is_in_a_language_that_is_run_or_has_a_reason():
    found = set()
    for page in PAGES:
        shown = blocks(page, "text")
        assert len(shown) == len([b for b in shown if skipped(page, b)]), f"{relative(page)}: no reason in NOT_RUN"
        found |= {(relative(page), block.splitlines()[0]) for block in blocks(page, "text", "")}
        tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
        info = {token.info.strip() for token in tokens if token.type == "fence"}
        unknown = {name for name in info if not name.startswith("{")} - {"", "bash", "text", "python", "toml"}
        assert not unknown, f"{relative(page)}: nothing here runs {unknown}"
    assert set(NOT_RUN) <= found, "a reason for a block that is gone"


@pytest.mark.parametrize("page", pages_with("toml"))
def test_a_file_that_is_shown_is_one_that_the_program_reads(page, tmp_path):
    for block in blocks(page, "toml"):
        if "[[grid]]" in block:
            (tmp_path / "study.toml").write_text(block)
            assert load_study(tmp_path / "study.toml", tmp_path / "out", {}).runs
        else:
            make_config({"model": "?", "data": "?"} | tomllib.loads(block))


@pytest.fixture
def upop(monkeypatch, capsys, tmp_path):
    """Runs `upop WORDS` in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["upop", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out

    return call


def test_output_that_is_shown_is_what_the_command_prints(upop):
    shown = [block for page in PAGES for block in blocks(page, "") if is_shown_output(block)]
    assert shown
    for block in shown:
        command, _, output = block.partition("\n\n")
        printed = upop(*shlex.split(command)[1:])
        assert set(output.splitlines()) <= set(printed.splitlines())


def loop_of_ones_own(make_model, images):
    """What README takes for granted: a model, batches, an optimizer."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    model = make_model("vit").train()
    batch = (images(4), torch.arange(4))
    samples = [{"pixel_values": image, "labels": 1} for image in images(8)]
    arguments = transformers.TrainingArguments(
        "trainer", max_steps=3, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False
    )
    import upop

    return {
        "upop": upop,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": [batch],
        "loader_of_three_epochs": [batch] * 3,
        "cross_entropy": cross_entropy,
        "Trainer": transformers.Trainer,
        "arguments": arguments,
        "data": samples,
    }


def model_and_steps(make_model, images):
    import upop

    return {"model": make_model("vit"), "steps": 10, "upop": upop}


def slimmed_folder(make_model, images):
    import transformers

    import upop

    model = make_model("vit")
    search = upop.Search(model, target=upop.Target(params=0.5), steps=1)
    model(images(2)).logits.sum().backward()
    search.step()
    upop.save_pretrained(search.slim(), "half")
    size = {"height": 32, "width": 32}
    Path("half/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True})
    )
    names = ("AutoModelForImageClassification", "pipeline")
    return {"upop": upop} | {name: getattr(transformers, name) for name in names}


def exported_model(make_model, images):
    import numpy as np
    from PIL import Image

    from upop.export import export

    make_model("vit").save_pretrained("dense")
    export("dense", Path("deploy/half"), format="onnx", variant="fp32", images=None)
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save("photo.png")
    return {}


# Pages whose blocks are alternatives, not one program.
APART = ("README.md",)
GIVEN = {
    "README.md": loop_of_ones_own,
    "docs/faster.md": model_and_steps,
    "docs/families.md": slimmed_folder,
    "docs/export.md": exported_model,
}


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_that_is_shown_runs(page, tmp_path, monkeypatch, make_model, images):
    monkeypatch.chdir(tmp_path)
    given = GIVEN.get(relative(page), lambda *_: {})
    names = given(make_model, images)
    for number, block in enumerate(blocks(page, "python")):
        if number and relative(page) in APART:
            names = given(make_model, images)
        for _, there, here in (entry for entry in INSTEAD if entry[0] == relative(page)):
            block = block.replace(there, here)
        exec(compile(block, f"{relative(page)}, block {number + 1}", "exec"), names)
        if "small" in names:
            half = analyze(names["model"]).params / 2
            assert sum(p.numel() for p in names["small"].parameters()) == pytest.approx(half, rel=0.01)


def test_the_quickstart_leads_from_a_folder_of_images_to_an_onnx_file(upop, tmp_path):
    """Its blocks, one after the other, as a newcomer types them; only with less training and timing."""
    page = ROOT / "docs/quickstart.md"
    exec(blocks(page, "python")[0], {})
    typed = [words[1:] for block in blocks(page, "") for words in lines(block) if words[0] == "upop"]
    assert len(typed) < 10
    less = {
        "prune": ["--subset", "100", "--latency-seconds", "0.02"],
        "bench": ["--seconds", "0.05", "--runtimes", "eager", "--dtypes", "float32"],
    }
    for words in typed:
        short = [
            "1" if before.startswith("--epochs") else word for before, word in zip(["", *words], words, strict=False)
        ]
        upop(*short, *less.get(words[0], []))
    result = json.loads((tmp_path / "runs/half/result.json").read_text())
    assert result["params"]["after"] == pytest.approx(result["params"]["before"] / 2, rel=0.01)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "deploy/model.onnx")
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    assert labels == [f"digit-{n}" for n in range(10)]


def test_the_pictures_are_those_that_the_code_draws(tmp_path):
    runpy.run_path(str(ROOT / "docs/pictures/draw.py"))["draw"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in ROOT.glob("docs/pictures/*.svg")}
    shown = {name for page in PAGES for name in re.findall(r"\(pictures/(.*?)\)", page.read_text())}
    assert shown == drawn


def test_the_reference_has_every_command_option_and_key():
    program = runpy.run_path(str(ROOT / "docs/generate.py"))
    commands, config = program["command_reference"](), program["config_reference"]()
    for name, command in COMMANDS.items():
        assert f"## upop {name}\n" in commands
        for option in (o for p in command.params if p.param_type_name == "option" for o in p.opts):
            assert option in commands
    for name in PruneConfig.model_fields:
        assert f"| `{name}` |" in config
