"""What upop tells its user when something is wrong: one line, and an exit code of 2 from the command line.

Holds exceptions only; it must not import anything of the package.
"""

import difflib
from collections.abc import Iterable


class UpopError(ValueError):
    """Bad input: the message says where, what was expected, what came and what to do."""


class DataError(UpopError):
    """Images, labels or data sets that cannot be used as they are."""


class ModelError(UpopError):
    """A model, model folder or model name that cannot be used as it is."""


class TargetError(UpopError):
    """A pruning target that cannot be met."""


class TrainingError(UpopError):
    """Training that cannot go on, such as a loss that is no longer finite."""


STOPPED = 75  # exit code, EX_TEMPFAIL: come again, as clusters that take machines away want to hear it


class StopError(UpopError):
    """A run was asked to stop, by a signal, and says how to go on."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The beginning of an error's message, at most so many characters, on one line."""
    return " ".join(str(error).split())[:most]


def said(error: BaseException, most: int = 200) -> str:
    """What an error of a library is and says, in one line that is not too long."""
    text = one_line(error, most)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shortened(value: object) -> str:
    """A value as it is shown in a message: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
