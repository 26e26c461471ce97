"""The version of the code that decides results: equal for equal code, whatever its comments and layout.

Reads source files as text; must not import what it looks at.
"""

import ast
import functools
import hashlib
from pathlib import Path

# What shows, moves or plans results, and cannot change them.
SHOWING = {
    "allocator",
    "animate",
    "bench",
    "benchrun",
    "card",
    "cli",
    "collect",
    "configtext",
    "demo",
    "disk",
    "executors",
    "export",
    "exporters",
    "folder",
    "lock",
    "meters",
    "observer",
    "plots",
    "publish",
    "report",
    "study",
    "studyfile",
    "trace",
    "tracking",
    "version",
    "view",
    "viewserver",
}


@functools.cache
def code_version(root: Path = Path(__file__).parent) -> str:
    """A short hash over the syntax trees, less docstrings, of all modules under `root` that decide results."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0].removesuffix(".py") not in SHOWING:
            digest.update(name.as_posix().encode())
            digest.update(ast.dump(_without_docstrings(ast.parse(path.read_bytes()))).encode())
    return digest.hexdigest()[:16]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return tree
