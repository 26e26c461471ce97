"""The command `upop export`: parse, call, print.

Must not compute: everything it shows comes from the library's return values.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from upop.cli.checks import check_split
from upop.cli.show import out as console
from upop.cli.show import quiet_libraries
from upop.config import make_config
from upop.errors import UpopError


def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="model folder or Hub name")],
    out: Annotated[Path, typer.Option(help="folder for the file and export.json")],
    format: Annotated[str, typer.Option(help="onnx or torch (torch.export, .pt2)")] = "onnx",
    variant: Annotated[str, typer.Option(help="fp32, bf16 (torch only) or int8")] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="as for prune; the file is checked on up to 256 images (without: noise)")
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test")] = "validation",
    subset: Annotated[str | None, typer.Option(help="as for prune")] = None,
    opset: Annotated[int | None, typer.Option(help="of ONNX; the exporter's own by default")] = None,
    min_agreement: Annotated[
        float, typer.Option(help="bf16, int8: share of the images whose most likely class must stay")
    ] = 0.95,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the export that OUT already holds")] = False,
) -> None:
    """Write a model as one file for ONNX Runtime or torch.export, and check that it gives the same answers.

    Example: upop export runs/half/model --out deploy/half --variant int8 --data cifar10
    """
    check_split(split)
    if subset is not None and data is None:
        raise UpopError("--subset: is of the images to check the file on; say --data too")
    given = {"model": model, "data": data or "none"} | ({} if subset is None else {"subset": subset})
    config = make_config(given)
    quiet_libraries()
    from upop.export import check, read_images
    from upop.export import export as export_model

    options: dict[str, Any] = {"format": format, "variant": variant, "opset": opset, "min_agreement": min_agreement}
    check(out, **options, overwrite=overwrite)
    with console.status("loading model and data"):
        images = None if data is None else read_images(config, split)
    with console.status("exporting and checking"):
        result = export_model(config.model, out, images=images, **options, overwrite=overwrite)
    source = "" if result.source_bytes is None else f", model.safetensors {result.source_bytes / 1e6:.2f} MB"
    console.print(f"{result.path}: {result.variant}, {result.bytes / 1e6:.2f} MB{source}", markup=False)
    console.print(
        f"checked on {result.images} images ({result.checked_on}) at batch {result.batch_sizes}: logits differ by "
        f"at most {result.max_difference:.1e} (largest {result.logit_scale:.1f}), top-1 agrees on "
        f"{100 * result.agreement:.1f} %",
        markup=False,
    )
