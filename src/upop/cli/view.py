"""The command `upop view`: parse, call, print.

Must not compute: everything it shows comes from the library's return values.
"""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from upop.cli.show import out as console
from upop.cli.show import quiet_libraries
from upop.errors import UpopError


def view(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="output folder of prune, or model folders")],
    data: Annotated[str | None, typer.Option(help="as for prune: offers some of its test images to click on")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; 0: any that is free")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """A page on this machine: drop a picture, and see what dense and pruned models say of it, and how fast.

    Example: upop view runs/half --data cifar10
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UpopError(f"--device: expected auto, cpu or cuda, got {device!r}")
    quiet_libraries()
    from upop.plan import device_type
    from upop.view import find_folders, load_viewed, samples
    from upop.viewserver import ViewServer

    found = find_folders([str(folder) for folder in folders])
    with console.status("loading models"):
        models = load_viewed(found, device=device_type(device))
    with console.status("loading data"):
        pictures = samples(data) if data is not None else []
    with ViewServer(models, pictures, port=port) as server:
        for model in models:
            console.print(f"{model.name}: {model.folder}, {model.params:,} parameters", markup=False)
        console.print(f"{server.url} answers on this machine only; Ctrl-C ends it", markup=False)
        if show:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("ended")
