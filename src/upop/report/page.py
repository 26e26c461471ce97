"""Results on disk -> one self-contained HTML page and its Markdown twin.

A pure function of the folder's contents: no clock, no machine, no order of files; must not need torch or write files.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from upop.report import claims, provenance_sections, sections, verdicts
from upop.report.records import Results, load_results
from upop.report.sections import Section

__all__ = ["Report", "build", "load_results"]
NUMBER = re.compile(r"[+\N{MINUS SIGN}-]?\.?\d[\d.,e+-]*([ x].*)?|–|< .*")
MARKDOWN = frozenset("\\`*_|[]#~")
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """`facts`: verdicts and counts as plain data, for programs."""

    html: str
    markdown: str
    facts: Mapping[str, Any]


def build(folder: Path) -> Report:
    """Raises UpopError, one line, where a result cannot be used."""
    results = load_results(folder)
    judged = [verdicts.evaluate(claim, results) for claim in claims.CLAIMS]
    tried = [verdicts.evaluate(claim, results) for claim in claims.EXPERIMENTS]
    parts = _sections(results, judged, tried)
    title = f"upop: {results.study['name']}" if results.study.get("name") else "upop: results"
    shown = {figure.id: list(figure.choices.values()) for part in parts for figure in part.figures}
    values = {"title": title, "sections": parts, "verdicts": verdicts.VERDICTS}
    return Report(
        html=_environment(escape=True)
        .get_template("report.html.j2")
        .render(**values, plotly=get_plotlyjs(), figures=_script_json(shown)),
        markdown=_environment(escape=False).get_template("report.md.j2").render(**values),
        facts=_facts(results, [*judged, *tried]),
    )


def _sections(results: Results, judged: list[verdicts.Verdict], tried: list[verdicts.Verdict]) -> list[Section]:
    return [
        sections.overview(results),
        sections.limits(results, [*judged, *tried]),
        sections.judgements("claims", "Claims", judged, results),
        sections.judgements("experiments", "Experiments", tried, results),
        sections.tradeoff(results),
        sections.survivors(results),
        sections.trajectories(results),
        sections.schedules(results),
        sections.slimming(results),
        sections.stopping(results),
        provenance_sections.published(results),
        provenance_sections.all_runs(results),
        provenance_sections.origin(results),
    ]


def _facts(results: Results, judged: list[verdicts.Verdict]) -> dict[str, Any]:
    return {
        "runs": {"done": len(results.runs) + len(results.dense), "absent": dict(results.absent)},
        "verdicts": {v.claim.id: {"text": v.claim.text, "verdict": v.verdict, "reason": v.reason} for v in judged},
    }


def _environment(*, escape: bool) -> jinja2.Environment:
    # The loader by folder: the one by package would import all of upop, and torch with it.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown
    environment.tests["number_like"] = lambda text: len(text) <= 40 and bool(NUMBER.fullmatch(text))
    return environment


def _markdown(text: str) -> str:
    """Plain text as Markdown that shows it unchanged, also inside a table cell."""
    text = "".join("\\" + sign if sign in MARKDOWN else sign for sign in text)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
