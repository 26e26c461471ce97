"""The Hub: its models, downloaded to a local folder, and what goes wrong on the way, in one line that says what to do.

Must not read what is in the files, nor load a model.
"""

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

from upop.errors import ModelError, said
from upop.folder import digest

# No pickles, no code: only what loading reads, and the card, for its licence.
WANTED = (
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model*.safetensors",
    "model*.index.json",
)
SUBFOLDERS = "*/*"  # to be left out: in the Hub's patterns a star stands for slashes as well
LOGIN = "log in with `hf auth login`"


def fetch(name: str) -> Path:
    """The local folder `name`, or the files of the model that the Hub calls so, from its cache where they are there.

    Requests that fail are tried again, as huggingface_hub does it, for a minute or two. Raises ModelError.
    """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=SUBFOLDERS))
    except HFValidationError:
        raise ModelError(f"{name}: no such local folder, and no name that the Hub could know; check it") from None
    except Exception as error:  # the network's, the server's, the disk's: each with an exception of its own
        where = "offline, HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
        raise ModelError(
            f"{name}: no such local folder, and not to be had from the Hub ({where}): {reason(error)}"
        ) from error
    for file in folder.glob("model*.safetensors"):
        _check_digest(file)
    return folder


def reason(error: BaseException) -> str:
    """What an error of huggingface_hub or datasets means, and what to do; in one line."""
    for cause in _chain(error):
        if known := _known(cause):
            return known
    return f"{said(error)}; check the network and try again, or give a local folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from: libraries wrap what tells most."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known(error: BaseException) -> str | None:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"its owner gives access to those who ask; ask on its page there, then {LOGIN}"
    absent = isinstance(error, errors.RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError"
    if absent or status in (401, 403, 404):
        return f"there is none of that name, or it is private; check the name, or {LOGIN}"
    if status == 429:
        return f"it answers 429, too many requests; wait some minutes, or {LOGIN}"
    if status is not None and status >= 500:
        return f"it answers {status}; try again later, or give a local folder"
    # datasets only names it.
    if isinstance(error, errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error):
        return "it is not in the cache; unset HF_HUB_OFFLINE, or give a local folder"
    if isinstance(error, json.JSONDecodeError):
        return "it answers with something else than JSON, as networks do that want you to sign in first"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{said(error)}; free space, or set HF_HOME to a folder elsewhere"
    return None


def _check_digest(file: Path) -> None:
    """Large files lie in the cache under their sha256: raise ModelError for what is not what it should be."""
    blob = file.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and digest(blob) != blob.name:
        raise ModelError(f"{file}: damaged on the way, its digest is not the Hub's; delete {blob} and try again")
