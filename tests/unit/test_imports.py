"""Promises about the whole package: who may import whom, who prints, and the public names."""

import ast
import functools
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import upop
from upop.version import code_version

ROOT = Path(upop.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}
# Module -> what of the package it may import at the top of the file.
ALLOWED = {
    "errors": set(),
    "devices": set(),
    "structures": {"errors"},
    "ranking": {"structures", "errors", "costs", "devices"},
    "costs": {"structures", "errors", "profiling", "devices"},
    "latency": {"structures", "errors", "costs"},
    "schedules": {"structures", "errors"},
    "masks": {"structures", "errors"},
    "penalty": {"masks", "structures"},
    "kinds": {"structures", "errors", "methods"},
    "families": {"structures", "errors", "families", "kinds", "methods"},
    "surgery": {"structures"},
    "slim": {"structures", "errors", "families", "surgery", "kinds"},
    "methods": {"errors"},
    "growth": set(),
    "runtimes": {"errors"},
    "exporters": {"errors", "models", "runtimes"},
    "criteria": {"structures"},
    "targets": {"errors", "structures", "costs", "latency", "methods", "ranking"},
    "processes": {"errors"},
    "search": {
        "processes",
        "structures",
        "costs",
        "errors",
        "families",
        "masks",
        "ranking",
        "schedules",
        "slim",
        "methods",
        "growth",
        "criteria",
        "targets",
        "latency",
        "penalty",
        "scores",
    },
    "scores": {"processes", "structures", "criteria", "errors", "masks", "methods", "penalty", "ranking"},
}
# Module -> what it must not import anywhere, not even inside a function.
FORBIDDEN = {
    "search": {"data", "train", "run", "cli", "config", "pretrained", "modeling"},
    "runtimes": {"data", "plan", "run", "search", "train", "cli"},
    "processes": {"data", "train", "search", "run", "cli"},
    "train": {"search", "slim", "masks", "ranking", "run", "cli"},
    "surgery": {"families", "search", "run"},
    "families": {"search", "slim", "masks", "ranking", "train", "data", "run", "cli"},
}


@functools.cache
def tree(module):
    return ast.parse(FILES[module].read_text())


def imported(nodes):
    """Dotted names that the import statements among `nodes` bind: modules, or names in modules."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package(names):
    return {name.split(".")[1] for name in names if name.startswith("upop.")}


def matching(table):
    return [pytest.param(m, table[m.split(".")[0]], id=m) for m in FILES if m.split(".")[0] in table]


@pytest.mark.parametrize(("module", "allowed"), matching(ALLOWED))
def test_the_library_imports_downwards_only(module, allowed):
    assert of_package(imported(tree(module).body)) <= allowed


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for module in FILES:
        names = [n.removeprefix("upop.") for n in imported(tree(module).body) if n.startswith("upop.")]
        graph[module] = {name if name in FILES else name.rpartition(".")[0] for name in names} - {""}
    assert graph["search"] >= {"masks", "ranking"}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("module", "forbidden"), matching(FORBIDDEN))
def test_search_training_and_families_do_not_know_each_other(module, forbidden):
    assert not of_package(imported(ast.walk(tree(module)))) & forbidden


@pytest.mark.parametrize("module", [m for m in FILES if m.split(".")[0] not in ("cli", "__main__")])
def test_only_the_command_line_prints_exits_or_knows_a_terminal(module):
    names = {name.split(".")[0] for name in imported(ast.walk(tree(module)))}
    assert not names & {"typer", "rich", "click", "argparse"}
    assert "cli" not in of_package(imported(ast.walk(tree(module))))
    calls = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    assert not calls & {"print", "input", "exit", "quit", "sys.exit", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("command", ["report", "animate"])
def test_reports_and_animations_are_made_where_torch_is_not_installed(command, tmp_path):
    program = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name, name="torch")
sys.meta_path.insert(0, NoTorch())
from upop.cli import main
sys.argv = ["upop", "{command}", "{tmp_path}"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"upop: {tmp_path}"), "the one line that says what is missing in the folder"


def brought_by(program):
    """Every module that a fresh interpreter has imported after `program`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_upop_brings_torch_but_no_model_code_and_slimmed_models_are_known_all_the_same():
    names = [*upop.__all__, "SearchCallback"]
    found = brought_by(
        f"""import upop
assert not set(sys.modules) & {{"transformers.modeling_utils"}}
assert set({names}) <= set(dir(upop))
upop.Search
assert all(callable(getattr(upop, name)) for name in {[n for n in names if n != "SearchCallback"]})
early = set(sys.modules)
from transformers import AutoConfig
AutoConfig.for_model("upop_vit")
assert "transformers.models.vit.modeling_vit" in sys.modules
sys.modules.clear()
sys.modules.update(dict.fromkeys(early))"""
    )
    assert "torch" in found
    heavy = {"accelerate", "datasets", "matplotlib", "onnx", "pandas", "plotly", "pyarrow", "ray", "scipy", "sklearn"}
    assert not found & {*heavy, "lightning", "timm", "pydantic", "typer", "torchvision"}


@pytest.mark.parametrize("started_as", ["upop", "/usr/bin/upop", "upop.exe", "-m upop.cli"])
def test_the_command_is_ready_to_answer_before_torch_is_imported(started_as):
    words = started_as.split()
    found = brought_by(f"sys.argv, sys.orig_argv = {words[:1]!r}, {['python', *words]!r}\nimport upop.cli")
    assert not found & {"torch", "transformers", "numpy", "matplotlib", "pyarrow", "huggingface_hub"}


def test_no_model_library_is_imported_to_describe_a_family():
    for module in FILES:
        if module.startswith("families"):
            names = {name.split(".")[0] for name in imported(tree(module).body)}
            assert not names & {"transformers", "timm"}


def test_the_public_names_are_these():
    assert sorted(upop.__all__) == [
        "Analysis",
        "LatencyTable",
        "Search",
        "Target",
        "UpopError",
        "analyze",
        "from_pretrained",
        "measure_latency_table",
        "save_pretrained",
        "slim",
    ]
    assert all(hasattr(upop, name) for name in upop.__all__)


@pytest.mark.parametrize(
    ("module", "decides"), [("analysis", True), ("search", True), ("report/claims", False), ("disk", False)]
)
def test_the_version_of_the_code_follows_what_decides_results_alone(tmp_path, module, decides):
    shutil.copytree(ROOT, tmp_path / "upop", ignore=shutil.ignore_patterns("__pycache__"))
    version = code_version.__wrapped__  # it looks once a folder
    before = version(tmp_path / "upop")
    with (tmp_path / "upop" / f"{module}.py").open("a") as file:
        file.write("\nMORE = 1\n")
    assert (version(tmp_path / "upop") != before) == decides
