"""Who watches a run: the command line, a notebook, nobody."""

from typing import Protocol

from upop.train import Progress


class Observer(Protocol):
    """What a run tells whoever watches it."""

    def stage(self, name: str, about: str) -> None:
        """A stage begins."""

    def progress(self, progress: Progress) -> None:
        """An optimizer step is done."""

    def epoch(self, number: int, accuracy: float) -> None:
        """An epoch is done; accuracy in [0, 1] on the validation split."""


class Nobody:
    """Watches nothing."""

    def stage(self, name: str, about: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def epoch(self, number: int, accuracy: float) -> None: ...
