"""The ways a model is deployed: plain PyTorch, torch.compile, ONNX Runtime; each as one function to call.

Must not change the models it runs, measure them, or leave files behind.
"""

import contextlib
import copy
import itertools
import logging
import os
import re
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upop.errors import ModelError, UpopError, nearest

RUNTIMES = ("eager", "compile", "onnx")
DTYPES = ("float32", "bfloat16")
INPUT, OUTPUT = "pixel_values", "logits"
MOST_IN_ONE_FILE = 2**31 - 2**20  # bytes of weights; protobuf holds 2 GB in all
FREE_BATCH = ({0: torch.export.Dim("batch")},)  # dynamic shapes of the one input
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_numbers = itertools.count()


class Logits(nn.Module):
    """`model` as images [B, C, H, W] in float32 or its own dtype -> logits [B, classes] in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def forward(self, pixel_values: Tensor) -> Tensor:
        # A cast to the dtype it has would still be an operator of an exported graph.
        own = pixel_values if pixel_values.dtype == self.dtype else pixel_values.to(self.dtype)
        output: Any = self.model(own)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{type(self.model).__name__}: expected an image classifier, which gives logits, got "
                f"{type(output).__name__}; run a model with a classification head"
            )
        return logits if logits.dtype == torch.float32 else logits.float()


def make_runner(
    model: nn.Module, images: Tensor, *, runtime: str = "eager", dtype: str = "float32", threads: int | None = None
) -> Callable[[], Tensor]:
    """A function that does one forward pass of `images` and returns the logits [B, classes], in float32.

    Compiling and exporting happen here, once; the function runs a copy of `model` as it is now, in eval mode. To
    compare runtimes, time one after the other: in turns, the waiting threads of one slow the other.

    Args:
        images: [B, C, H, W], float32, normalised.
        runtime: one of RUNTIMES. `onnx` runs on the CPU, or on CUDA where the model is there.
        dtype: of the weights, one of DTYPES; images are cast to it beforehand, as part of no pass.
        threads: CPU threads of a pass; None = torch.get_num_threads(), in every runtime.

    Raises UpopError for an unknown runtime or dtype, one that cannot be had here, and a model that cannot be compiled
    or exported.
    """
    check_choice("runtime", runtime, RUNTIMES)
    check_choice("dtype", dtype, DTYPES)
    if threads is not None and threads < 1:
        raise UpopError(f"threads: expected at least 1, got {threads}")
    if runtime == "onnx":
        if dtype != "float32":
            raise UpopError("runtime onnx: expected dtype float32, ONNX Runtime lacks bfloat16; use eager or compile")
        return _onnx_runner(model, images, threads or torch.get_num_threads())
    device = next(model.parameters()).device
    ready = Logits(copy.deepcopy(model).to(getattr(torch, dtype))).eval()
    own = images.to(device=device, dtype=getattr(torch, dtype))
    if runtime == "eager":
        return _on_threads(lambda: ready(own), threads)
    compiled = _compiled(ready)
    run = _on_threads(lambda: compiled(own), threads)
    try:
        run()
    except Exception as error:  # whatever layer of the compiler it comes from
        raise ModelError(
            f"{type(model).__name__}: torch.compile failed ({first_line(error)}); it needs a C++ compiler on the CPU "
            "and Triton on CUDA; install them, or use runtime eager"
        ) from error
    return run


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise UpopError for a `value` that is not among `known`, with the nearest that is."""
    if value not in known:
        raise UpopError(f"{what}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


def _on_threads(run: Callable[[], Tensor], threads: int | None) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        before = torch.get_num_threads()
        wanted = threads or before
        # Only where it differs: setting it, even to the same number, is not free.
        if wanted != before:
            torch.set_num_threads(wanted)
        try:
            with torch.inference_mode():
                return run()
        finally:
            if wanted != before:
                torch.set_num_threads(before)

    return forward


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(images: Tensor) -> Tensor:
        result: Tensor = model(images)
        return result

    # A code object of its own: after eight models on the same one, torch.compile silently goes back to eager.
    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
    return torch.compile(own, dynamic=False)


def _onnx_runner(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    device = next(model.parameters()).device.type
    _provider(device)  # before the export, which takes seconds
    pixels = images.detach().float().cpu().numpy()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "model.onnx")
        write_onnx(model, file, images)
        session = onnx_session(file, threads=threads, device=device)
    import onnxruntime  # type: ignore[import-untyped]

    # As eager models have them: the images are on the device before the pass, which ends with the logits.
    binding = session.io_binding()
    binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(pixels, device))
    binding.bind_output(OUTPUT)

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])

    return run


def onnx_session(file: Path, *, threads: int | None = None, device: str = "cpu") -> Any:
    """An onnxruntime.InferenceSession of `file` on `threads` CPU threads; None = torch.get_num_threads().

    Raises UpopError where onnxruntime cannot run it, or is not built for `device` (`cpu` or `cuda`).
    """
    provider = _provider(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Waiting threads would otherwise spin on, and slow whatever runs next in this process by up to half.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(file, options, providers=[provider])
    except Exception as error:  # onnxruntime's errors share no other public base
        what = first_line(error).removeprefix("[ONNXRuntimeError] : ").replace(f"Load model from {file} failed:", "")
        raise ModelError(
            f"{file.name}: onnxruntime cannot run it ({what}); try another --opset, or a newer onnxruntime"
        ) from error


def _provider(device: str) -> str:
    """What onnxruntime calls `device`; raises UpopError where it is missing, or not built for it."""
    require_onnx()
    import onnxruntime

    provider = f"{device.upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UpopError(
            f"runtime onnx: the model is on {device}, and this onnxruntime is built without it; install "
            "onnxruntime-gpu, or move the model to the CPU"
        )
    return provider


def require_onnx() -> None:
    """Raise UpopError unless the packages of the extra `onnx` are installed."""
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UpopError(f'onnx: {", ".join(missing)} not installed; run: pip install "upop[onnx]"')


def write_onnx(model: nn.Module, file: Path, images: Tensor, *, opset: int | None = None) -> None:
    """Export `model` to `file`: input `pixel_values` [batch, C, H, W], output `logits` [batch, classes], float32.

    The batch is free, C, H and W are those of `images` [B, C, H, W]. One file, with `<file>.data` beside it for
    weights over 2 GB alone. `opset` of ONNX; None = torch's default.
    Raises UpopError without the onnx packages, and for models or opsets that the exporter cannot do.
    """
    require_onnx()
    ready = export_copy(model)
    choose = getattr(ready.model, "set_attn_implementation", None)
    if callable(choose):
        # scaled_dot_product_attention would come out with a guard against rows that are masked whole: 10 % slower.
        choose("eager")
    weights = sum(p.nbytes for p in ready.parameters())
    try:
        with quiet():
            torch.onnx.export(
                ready,
                example_inputs(images),
                os.fspath(file),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=FREE_BATCH,
                opset_version=opset,
                external_data=weights > MOST_IN_ONE_FILE,
                verbose=False,
            )
    except Exception as error:  # whatever layer of the exporter it comes from
        own = next((cause for cause in _causes(error) if isinstance(cause, ModelError)), None)
        if own is not None:
            raise own from None
        raise ModelError(_why_not_exported(type(model).__name__, error, opset)) from error


def export_copy(model: nn.Module, dtype: torch.dtype = torch.float32) -> Logits:
    """A copy of `model` for exporters: on the CPU, in eval mode, its weights in `dtype`."""
    return Logits(copy.deepcopy(model).to(device="cpu", dtype=dtype)).eval()


def example_inputs(images: Tensor) -> tuple[Tensor]:
    """What exporters trace with: two black images of that size, since a batch of one is not taken as any batch."""
    return (torch.zeros(2, *images.shape[1:]),)


def _why_not_exported(name: str, error: BaseException, opset: int | None) -> str:
    """One line for a failed export; names the operator that the exporter lacks, where it was that."""
    causes = _causes(error)
    found = re.search(r"No ONNX function.*?OpOverload\(op='([^']+)'", " ".join(map(str, causes)))
    if found:
        return (
            f"{name}: the ONNX exporter has no operator for {found[1]}; try another --opset, or --format torch, which "
            "needs no translation"
        )
    where = "" if opset is None else f" to opset {opset}"
    return f"{name}: cannot be exported{where} ({first_line(causes[-1])}); try another --opset, or --format torch"


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on: libraries wrap what is wrong in general advice."""
    return [error, *(_causes(error.__cause__) if error.__cause__ else [])]


def first_line(error: BaseException) -> str:
    """What an error of a library says first, without colours and blank lines."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings and notices, which are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
