"""Export: a trained model as one file that other programs run, checked against the model it was made from.

Must not train, and must not leave behind a file that failed its check.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from upop.config import PruneConfig
from upop.data import Batches, MemorySplit
from upop.disk import delete, disk_errors
from upop.errors import ModelError, UpopError
from upop.exporters import usage, write
from upop.folder import provenance
from upop.models import LoadedModel, load_model
from upop.plan import read_data
from upop.runtimes import INPUT, OUTPUT, check_choice, export_copy, onnx_session, quiet, require_onnx

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
VARIANTS = ("fp32", "bf16", "int8")
RECORD = "export.json"
NAMES = (*FORMATS.values(), "model.onnx.data", RECORD)  # all that an export leaves
FP32_TOLERANCE = 1e-4  # largest difference of float32 logits, as a fraction of the largest logit
MIN_AGREEMENT = 0.95
ONE_LOGIT_TOLERANCE = 0.1  # as a fraction of the largest
FEWEST_IMAGES, MOST_IMAGES = 3, 256
SINGLES, BATCH = 16, 32  # images checked one by one, and the batch size of all others

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Export:
    """An exported model and how it compares with the PyTorch model in float32.

    Attributes:
        path: the file to load; `<path>.data` lies beside it where weights take more than 2 GB.
        opset: of ONNX; None for format torch.
        bytes: of all its files; source_bytes: of the model.safetensors it was made from, None where there is none.
        images: how many it was checked on; `checked_on`: `data`, or `noise` where no images were given.
        batch_sizes: at which it was checked.
        max_difference: of any logit; logit_scale: the largest logit, for comparison.
        agreement: fraction in [0, 1] of the images whose most likely class is the same; of a model with one logit, of
            those whose logit is, to a tenth of the largest.
    """

    path: Path
    format: str
    variant: str
    opset: int | None
    bytes: int
    source_bytes: int | None
    images: int
    checked_on: str
    batch_sizes: tuple[int, ...]
    max_difference: float
    logit_scale: float
    agreement: float


def export(
    source: str | Path | LoadedModel,
    out: str | Path,
    *,
    format: str = "onnx",
    variant: str = "fp32",
    images: Tensor | None = None,
    opset: int | None = None,
    min_agreement: float = MIN_AGREEMENT,
    overwrite: bool = False,
) -> Export:
    """Write the model of `source` to the folder `out`, as model.onnx or model.pt2, with export.json beside it.

    The file takes `pixel_values`, float32 [batch, 3, H, W], of any batch, and gives `logits`, float32
    [batch, classes]; it holds the labels and how images are normalised. Before it gets its name it is loaded and run.

    Args:
        source: a model folder, Hub name or loaded model.
        format: `onnx`, for ONNX Runtime and others, or `torch`, for torch.export.load.
        variant: `fp32`; `bf16` (torch only); `int8`: weights in 8 bits, with onnx activations too.
        images: float32 [N, 3, H, W], 3 to 256 of them, normalised, to check it on. None = noise, for fp32 only.
        opset: of ONNX; None = the exporter's default.
        min_agreement: fraction in [0, 1] of the images whose most likely class bf16 and int8 must keep; it bounds by
            how much accuracy can change. fp32 must keep the logits, to 1e-4 of the largest.
        overwrite: replace the export that `out` holds.

    Raises UpopError, and leaves `out` as it was, for what cannot be exported and for a file that fails its check.
    """
    out = Path(out)
    check(out, format=format, variant=variant, opset=opset, min_agreement=min_agreement, overwrite=overwrite)
    if images is None and variant != "fp32":
        raise UpopError(f"variant {variant}: expected images to check it on, got none; give --data")
    loaded = source if isinstance(source, LoadedModel) else load_model(str(source))
    pixels = _noise(loaded.image_size) if images is None else _checked(images, loaded.image_size)
    with _all_or_nothing(out) as work:
        file = work / FORMATS[format]
        used = write(loaded, file, variant=variant, images=pixels, opset=opset)
        sizes, *found = _compare(loaded.model, _loaded(file), pixels)
        result = Export(
            path=out / file.name,
            format=format,
            variant=variant,
            opset=used,
            bytes=sum(part.stat().st_size for part in work.iterdir()),
            source_bytes=None if isinstance(source, LoadedModel) else _source_bytes(Path(source)),
            images=len(pixels),
            checked_on="noise" if images is None else "data",
            batch_sizes=sizes,
            max_difference=found[0],
            logit_scale=found[1],
            agreement=found[2],
        )
        _judge(result, min_agreement)
        (work / RECORD).write_text(_record(result, loaded), encoding="utf-8")
    return result


def read_images(config: PruneConfig, split: str) -> Tensor:
    """Up to 256 images [N, 3, H, W] of a split of `config.data`, evenly spread, as `config.model` wants them.

    Raises UpopError where the data has no such split.
    """
    check_choice("split", split, ("validation", "test"))
    loaded = load_model(config.model)
    data = read_data(config, loaded)
    found = {"validation": data.validation, "test": data.test}[split]
    if found is None:
        raise UpopError(f"{config.data}: has no {split} split; use --split validation")
    # Spread, since folders come sorted by class.
    picks = torch.linspace(0, len(found) - 1, min(MOST_IMAGES, len(found))).round().long()
    pixels = found.images[picks] if isinstance(found, MemorySplit) else torch.stack([found[i] for i in picks.tolist()])
    batches = Batches(
        MemorySplit(pixels, found.labels[picks]),
        batch_size=len(picks),
        size=loaded.image_size,
        mean=loaded.mean,
        std=loaded.std,
        num_classes=len(data.classes),
    )
    images, _ = next(iter(batches))
    return images


def check(out: Path, *, format: str, variant: str, opset: int | None, min_agreement: float, overwrite: bool) -> None:
    """Raise UpopError for an `export` that can be known to fail before anything is loaded."""
    check_choice("format", format, FORMATS)
    check_choice("variant", variant, VARIANTS)
    if not 0 <= min_agreement <= 1:
        raise UpopError(f"min_agreement: expected a fraction in [0, 1], got {min_agreement}")
    if format == "torch" and opset is not None:
        raise UpopError(f"opset {opset}: format torch has none; leave it out, or use --format onnx")
    if format == "onnx":
        require_onnx()
        if variant == "bf16":
            raise UpopError(
                "variant bf16: ONNX Runtime cannot compute in bfloat16 on the CPU; use --variant int8, or "
                "--format torch"
            )
    elif variant == "int8" and find_spec("torchao") is None:
        raise UpopError('variant int8 of format torch: torchao not installed; run: pip install "upop[torchao]"')
    _check_folder(out, overwrite=overwrite)


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if out.suffix in (".onnx", ".pt2") or out.is_file():
        raise UpopError(f"out {out}: expected a folder, for the model and {RECORD}; choose another name")
    held = sorted(p.name for p in out.iterdir() if not p.name.endswith(".partial")) if out.exists() else []
    foreign = [name for name in held if name not in NAMES]
    if foreign:
        raise UpopError(f"out {out}: holds {foreign[0]}, which no export wrote; choose a new or empty folder")
    if held and not overwrite:
        raise UpopError(f"out {out}: already holds an export; choose another folder, or say --overwrite")


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write to; its files move to `out` at the end, and on failure `out` is as it was before."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    work = None
    try:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            for cut_off in out.glob(".export-*.partial"):
                delete(cut_off)
            work = Path(tempfile.mkdtemp(prefix=".export-", suffix=".partial", dir=out))
            yield work
            # The record comes last: where it is, all is.
            files = sorted(work.iterdir(), key=lambda file: file.name == RECORD)
            for file in files:
                file.replace(out / file.name)
            for name in {*NAMES} - {file.name for file in files}:
                (out / name).unlink(missing_ok=True)
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                folder.rmdir()


def _loaded(file: Path) -> Runner:
    """The exported file as a function from images to logits."""
    if file.suffix == ".pt2":
        with quiet():
            program = torch.export.load(file).module()
        return lambda images: program(images)
    session = onnx_session(file)
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _compare(model: nn.Module, exported: Runner, images: Tensor) -> tuple[tuple[int, ...], float, float, float]:
    """Batch sizes used, the largest difference of logits, the largest logit, and the top-1 agreement."""
    singles = min(SINGLES, len(images) // 3)
    chunks = [*torch.split(images[:singles], 1), *torch.split(images[singles:], BATCH)]
    original = export_copy(model)
    with torch.inference_mode():
        expected = torch.cat([original(chunk) for chunk in chunks])
        got = torch.cat([exported(chunk) for chunk in chunks])
    if got.shape != expected.shape:
        raise ModelError(f"the exported model gives {[*got.shape]} logits, expected {[*expected.shape]}")
    sizes = tuple(sorted({len(chunk) for chunk in chunks}))
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    # One logit is no choice between classes: its value counts.
    one = expected.shape[-1] == 1
    same = (got - expected).abs() <= ONE_LOGIT_TOLERANCE * scale if one else got.argmax(-1) == expected.argmax(-1)
    return sizes, difference, scale, float(same.float().mean())


def _judge(result: Export, min_agreement: float) -> None:
    where = f"{result.path}: {result.variant} logits"
    most = FP32_TOLERANCE * result.logit_scale
    # Not `>`: what is not a number must fail too.
    if result.variant == "fp32" and not result.max_difference <= most:
        raise ModelError(
            f"{where} differ from PyTorch's by {result.max_difference:.1e}, expected at most {most:.1e}; nothing was "
            f"written; try another --opset or --format {'torch' if result.format == 'onnx' else 'onnx'}"
        )
    if result.variant != "fp32" and not (math.isfinite(result.max_difference) and result.agreement >= min_agreement):
        raise ModelError(
            f"{where} give PyTorch's answer for {100 * result.agreement:.1f} % of {result.images} images, "
            f"expected at least {100 * min_agreement:g} %; nothing was written; use --variant fp32, or lower "
            "--min-agreement"
        )


def _record(result: Export, loaded: LoadedModel) -> str:
    values = asdict(result) | {"path": result.path.name} | {"usage": usage(loaded)}
    origin = provenance(torch.device("cpu"))
    for package in ("onnx", "onnxruntime", "torchao"):
        if find_spec(package) is not None:
            origin["versions"][package] = metadata.version(package)
    return json.dumps(values | origin, indent=2, ensure_ascii=False) + "\n"


def _source_bytes(folder: Path) -> int | None:
    file = folder / "model.safetensors"
    return file.stat().st_size if file.is_file() else None


def _noise(size: int) -> Tensor:
    return torch.randn(SINGLES, 3, size, size, generator=torch.Generator().manual_seed(0))


def _checked(images: Tensor, size: int) -> Tensor:
    """`images` if they are what the model takes; raises UpopError otherwise."""
    wanted = (3, size, size)
    if images.shape[1:] != wanted or not FEWEST_IMAGES <= len(images) <= MOST_IMAGES:
        raise UpopError(
            f"images: expected {FEWEST_IMAGES} to {MOST_IMAGES} of {[*wanted]}, to check the export on, got "
            f"{[*images.shape]}"
        )
    return images.detach().float().cpu()
