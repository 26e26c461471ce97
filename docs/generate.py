"""Reference pages made of the program itself: its commands and their options, and the keys of a configuration."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

from upop.cli import app
from upop.config import PruneConfig

PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def command_reference() -> str:
    """Every command with its arguments and options, in the words of its `--help`, as Markdown."""
    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        context = command.make_context(f"upop {name}", [], resilient_parsing=True)
        about, _, example = (command.help or "").partition("Example:")
        usage = " ".join([f"upop {name}", *command.collect_usage_pieces(context)])
        parts.append(f"## upop {name}\n\n{about.strip()}\n\n```text\n{usage}\n```\n")
        if example:
            parts.append(f"For example:\n\n```text\n{example.strip()}\n```\n")
        records = [parameter.get_help_record(context) for parameter in command.params if parameter.name != "help"]
        rows = [f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in filter(None, records)]
        parts.append("\n".join(["| | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def config_reference() -> str:
    """Every key of a run's configuration, as a Markdown table."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in PruneConfig.model_fields.items():
        bounds = [
            f"{sign} {getattr(m, key):g}" for m in field.metadata for key, sign in BOUNDS.items() if _has(m, key)
        ]
        kind = ", ".join([_kind(field.annotation), *bounds])
        default = "chosen" if field.default is None else f"`{_toml(field.default)}`"
        default = "required" if field.is_required() else default
        lines.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _has(metadata: object, key: str) -> bool:
    return getattr(metadata, key, None) is not None


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        kinds = [part for part in get_args(annotation) if part is not NoneType]
        return "number" if float in kinds else _kind(kinds[0])
    return PLAIN.get(annotation, "text")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
