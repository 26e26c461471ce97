"""Writers of exported models: ONNX and torch.export, in float32, bfloat16 and int8.

Must not judge what they write, and must not change the model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upop.errors import ModelError
from upop.models import LoadedModel
from upop.runtimes import FREE_BATCH, INPUT, OUTPUT, example_inputs, export_copy, first_line, quiet, write_onnx


def write(loaded: LoadedModel, file: Path, *, variant: str, images: Tensor, opset: int | None) -> int | None:
    """Write `file`, a .onnx in fp32 or int8, or a .pt2 in fp32, bf16 or int8; returns the opset of a .onnx.

    `images` [N, 3, H, W] say how large images are. Raises UpopError for models that the exporter cannot do.
    """
    if file.suffix == ".pt2":
        _write_torch(loaded, file, variant=variant, images=images)
        return None
    plain = file if variant == "fp32" else file.with_name("plain") / file.name
    plain.parent.mkdir(exist_ok=True)
    write_onnx(loaded.model, plain, images, opset=opset)
    if plain != file:
        _quantise_onnx(plain, file)
        shutil.rmtree(plain.parent)
    used = _describe_onnx(file, loaded)
    if used != (opset or used):
        # The exporter only warns of it.
        raise ModelError(f"opset {opset}: the exporter wrote opset {used} in its place; use that, or leave it out")
    return used


def _quantise_onnx(plain: Path, file: Path) -> None:
    """Int8 weights, a scale per output unit; activations get theirs when it runs.

    Scales from calibration images were no nearer to float32 and slower: more of the graph is converted to and fro.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    with quiet():
        quantize_dynamic(
            plain, file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )


def _describe_onnx(file: Path, loaded: LoadedModel) -> int:
    """Put in how to use the model, take out what the exporter noted of the source code; returns the opset."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in usage(loaded).items()})
    onnx.save(model, file)
    return next(int(used.version) for used in model.opset_import if used.domain == "")


def _write_torch(loaded: LoadedModel, file: Path, *, variant: str, images: Tensor) -> None:
    ready = export_copy(loaded.model, torch.bfloat16 if variant == "bf16" else torch.float32)
    try:
        with quiet():
            if variant == "int8":
                _quantise_torch_(ready)
            program = torch.export.export(ready, example_inputs(images), dynamic_shapes=FREE_BATCH)
            # Notes on the source code, paths on this machine among them, would double a small model.
            for node in program.graph.nodes:
                for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                    node.meta.pop(note, None)
            program.example_inputs = None
            torch.export.save(program, file, extra_files={"usage.json": json.dumps(usage(loaded))})
    except ModelError:
        raise
    except Exception as error:  # whatever layer of the exporter it comes from
        raise ModelError(
            f"{type(loaded.model).__name__}: cannot be exported as {variant} by torch.export ({first_line(error)}); "
            "try --format onnx"
        ) from error


def _quantise_torch_(model: nn.Module) -> None:
    """Int8 weights of all Linears, a scale per output unit. In place.

    Weights only: with int8 activations the file would need torchao wherever it is loaded.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-untyped]
    from torchao.utils import unwrap_tensor_subclass  # type: ignore[import-untyped]

    quantize_(model, Int8WeightOnlyConfig())
    # As plain tensors they are saved as bytes; torchao's own would be pickled.
    unwrap_tensor_subclass(model)


def usage(loaded: LoadedModel) -> dict[str, Any]:
    """What a program needs to know to feed the model and read its answer, as plain values."""
    stock: Any = loaded.model
    return {
        "labels": [stock.config.id2label[index] for index in range(int(stock.config.num_labels))],
        "image_size": loaded.image_size,
        # The part of the central square that is cut off at each side.
        "border": (1 - loaded.image_size / (loaded.shorter_side or loaded.image_size)) / 2,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "input": f"{INPUT}: RGB in [0, 1], minus mean, over std; float32 [batch, 3, image_size, image_size]",
        "output": f"{OUTPUT}: float32 [batch, {stock.config.num_labels}]",
    }
