"""The run that `upop demo` shows: real handwritten digits from scikit-learn, a small DeiT, two minutes."""

from pathlib import Path

from upop.config import PruneConfig


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
