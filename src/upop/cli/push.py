"""The command `upop push`: parse, call, print.

Must not compute: everything it shows comes from the library's return values.
"""

from pathlib import Path
from typing import Annotated

import typer

from upop.cli.show import out, quiet_libraries


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="model folder, or the folder of a run")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub")],
    public: Annotated[bool, typer.Option("--public", help="a new repository is open to everyone")] = False,
) -> None:
    """Upload a model, its card and the code that loads it to the Hugging Face Hub; private unless told otherwise.

    Example: upop push runs/half me/deit-base-half
    """
    quiet_libraries()
    from upop.card import CARD
    from upop.publish import model_folder
    from upop.publish import push as upload

    with out.status("uploading"):
        address = upload(folder, repository, private=not public)
    out.print(address, markup=False)
    if not (model_folder(folder) / CARD).exists():
        out.print(f"{folder} has no {CARD}: write one on the Hub; the folders of runs have theirs", markup=False)
