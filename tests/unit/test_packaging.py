"""What is published: the wheel holds the package and what it needs to run, and nothing else."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import upop

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
        yield file


def test_the_wheel_holds_the_package_its_studies_templates_and_licence_and_nothing_else(wheel):
    source = ROOT / "src/upop"
    wanted = {f"upop/{path.relative_to(source).as_posix()}" for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    wanted |= {f"upop/studies/{path.name}" for path in ROOT.glob("studies/*.toml")}
    about = f"upop-{upop.__version__}.dist-info"
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    wanted |= {f"{about}/{name}" for name in names}
    assert set(wheel.namelist()) == wanted
    assert {"upop/py.typed", "upop/studies/smoke.toml", "upop/templates/animate.html.j2"} <= wanted
    assert all(re.search(r"\.(py|toml|j2|typed|html|css|js)$", name) for name in wanted if not name.startswith(about))


def test_the_wheel_says_what_it_needs_and_offers(wheel):
    metadata = wheel.read(f"upop-{upop.__version__}.dist-info/METADATA").decode()
    offered = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert {"timm", "onnx", "ray", "slurm", "lightning", "tensorboard", "docs", "dev"} <= offered
    needed = {re.split(r"[>=<;\[ ]", line)[0] for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)}
    assert {"torch", "transformers", "typer"} <= needed


def test_versions_agree():
    assert PROJECT["version"] == upop.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == upop.__version__
    assert f"## {upop.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_one_that_citation_tools_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("UPop: Unified and Progressive Pruning")
    assert paper["authors"][0] == {"given-names": "Dachuan", "family-names": "Shi"}
    assert paper["year"] == 2023


def test_every_extra_is_pinned_for_those_who_test_it():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    for name, needs in PROJECT["optional-dependencies"].items():
        if name == "timm":  # needs torchvision, which does not import beside the CPU build of torch
            continue
        assert {re.split(r"[>=<\[]", need)[0].lower() for need in needs} <= pinned, name
