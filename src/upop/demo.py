"""The run that `upop demo` shows: real handwritten digits from scikit-learn, a small DeiT, two minutes."""

import tomllib
from pathlib import Path

from upop.config import PruneConfig
from upop.reading import read_text


def demo_config(folder: Path) -> PruneConfig:
    """The demo's configuration, writing to `folder`."""
    return PruneConfig(
        model="deit-digits",
        data="digits",
        target="params=0.5",
        out=str(folder),
        epochs_dense=40,
        epochs_search=12,
        epochs_retrain=20,
        batch_size=64,
        flip=False,
    )


def is_demo(folder: Path) -> bool:
    """Whether a folder holds this very run, complete or stopped."""
    try:
        found = tomllib.loads(read_text(folder / "config.toml"))
    except (OSError, ValueError):
        return False
    wanted = (
        demo_config(folder).resolve(trained=False, device_type=str(found.get("device"))).model_dump(exclude={"out"})
    )
    # What depends on the model's units and the number of steps is left open here.
    return all(found.get(name) == value for name, value in wanted.items() if value not in (None, "auto"))
