"""A configuration as text: a TOML file, and the command line that does the same run."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

from upop.config import OF_A_SEARCH, PAPER, ConfigError, PruneConfig
from upop.errors import UpopError
from upop.reading import read_text


def load_config(path: Path) -> dict[str, Any]:
    """The values in a TOML config file; raises ConfigError where it cannot be read."""
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UpopError as error:
        raise ConfigError(str(error)) from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise ConfigError(f'{path}: expected TOML such as model = "deit-tiny-cifar" ({what})') from None
    return values


def to_toml(config: PruneConfig) -> str:
    """As a config file that `load_config` reads back; values left to be chosen are left out."""
    # Where nothing of a search was asked for, to name how it would go would be to ask for one.
    values = config.model_dump(exclude_none=True, exclude=OF_A_SEARCH if config.epochs_search is None else None)
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def command_line(config: PruneConfig) -> str:
    """The `upop prune` line that does this run: every option that is not what it would be if left out."""
    parts = ["upop", "prune"]
    for name, field in PruneConfig.model_fields.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        usual = PAPER.get(name, field.default) if config.recipe == "paper" else field.default
        if field.is_required() or value != usual:
            parts += [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(parts)
