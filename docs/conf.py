"""Settings of the documentation site: Sphinx reads this file. `make docs` builds it, strictly."""

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

from generate import command_reference, config_reference  # noqa: E402

import upop  # noqa: E402

project, author, copyright = "upop", "the upop authors", "the upop authors, Apache-2.0"
release = version = upop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "generated/*"]
highlight_language = "text"
html_theme = "furo"
html_title = f"upop {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "attrs_block"]
myst_heading_anchors = 3

# Docstrings are plain text with code in single backticks.
default_role = "code"
# `--option` stays two hyphens outside code, too.
smartquotes = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"

generated = Path(__file__).parent / "generated"
generated.mkdir(exist_ok=True)
for name, text in (("commands.md", command_reference()), ("config.md", config_reference())):
    # Only when it changes, so that a second build has nothing to do.
    if not (generated / name).exists() or (generated / name).read_text(encoding="utf-8") != text:
        (generated / name).write_text(text, encoding="utf-8")

# Pages that are made of files elsewhere: links lead to these files where the repository is read, and to pages here.
PAGES = {
    "../results/claims/report.md": "report.md",
    "../results/peers/report.md": "peers.md",
    "../results/recipe/report.md": "recipe-runs.md",
    "../results/recipe-long/report.md": "recipe-long-runs.md",
    "../results/recipe-again/report.md": "recipe-again-runs.md",
    "../benchmarks/peers/README.md": "peers-how.md",
}


def _links_to_pages(app: object, page: str, text: list[str]) -> None:
    for file, here in PAGES.items():
        text[0] = text[0].replace(f"]({file})", f"]({here})")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _links_to_pages)
