"""Publish: a model folder on the Hugging Face Hub.

Uploads what loading reads and the card, nothing else that lies there.
"""

from pathlib import Path

from upop.errors import ModelError, one_line, said
from upop.hub import LOGIN, SUBFOLDERS, WANTED
from upop.pretrained import CODE
from upop.vetting import vet

UPLOADED = (*WANTED, CODE)


def push(folder: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload the model in `folder`, a model folder or a run's, to `owner/name` on the Hub; returns its address.

    The repository is made where there is none, private unless told otherwise; one that is there stays as visible as
    it is. Raises ModelError, one line that says what to do, for a folder without a sound model, and where the Hub is
    not to be had or refuses.
    """
    source = model_folder(Path(folder))
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ModelError(f"{repository}: expected owner/name, as on the Hub; such as me/deit-tiny-half")
    vet(source)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        hub = huggingface_hub.HfApi(library_name="upop")
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=source,
            allow_patterns=list(UPLOADED),
            ignore_patterns=SUBFOLDERS,
            commit_message="A model pruned with upop",
        )
    except HFValidationError as error:
        raise ModelError(f"{repository}: {one_line(error, 200)}") from None
    except Exception as error:  # the network's, the server's, the disk's: each with an exception of its own
        raise ModelError(f"{repository}: {source} could not be uploaded: {_reason(error)}") from error
    return str(address)


def model_folder(folder: Path) -> Path:
    """`folder`, or its `model/` where it is that of a run. Raises ModelError where there is neither."""
    for found in (folder, folder / "model"):
        if (found / "config.json").is_file():
            return found
    raise ModelError(f"{folder}: expected a model folder, or that of a complete run, found neither")


def _reason(error: BaseException) -> str:
    """What an error of huggingface_hub means for somebody who uploads, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"the Hub does not let you write there; {LOGIN} and a token that may write"
    return f"{said(error)}; check the network and try again"
