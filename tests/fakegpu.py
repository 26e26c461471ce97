"""A GPU that is not there: tensors on `cuda` that have shape, type and device, and no values.

What is computed of them alone runs as shapes; a tensor of the CPU among them is refused as a real GPU refuses it.
Whatever would make the program wait is counted: every question for a value, and every copy from the CPU that is not
said to be non_blocking. Truths come as true, counts as 0, all others as 1, so that code goes on. Gradients are made
without going backwards.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

# A build of torch for CPUs alone has nobody who switches GPUs, which indexing and copying ask for.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
const bool set = [] {
  constexpr auto cuda = c10::DeviceType::CUDA;
  c10::impl::device_guard_impl_registry[size_t(cuda)].store(new c10::impl::NoOpDeviceGuardImpl<cuda>());
  return true;
}();
"""


def available() -> bool:
    return torch.cuda.is_available() or shutil.which("g++") is not None


def build_guard(folder: Path) -> None:
    """Compiled once, in two seconds; does nothing where there are real GPUs."""
    if torch.version.cuda is not None:
        return
    (folder / "guard.cpp").write_text(GUARD)
    home = Path(torch.__path__[0])
    library = folder / "guard.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", "guard.cpp", "-o", library.name]
    subprocess.run([*command, f"-L{home / 'lib'}", "-lc10"], cwd=folder, check=True)
    torch.ops.load_library(library)


class _Values(FakeTensorMode):
    """Answers questions for values, and counts them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.asked = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            self.asked += 1
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        return super().dispatch(func, types, args, kwargs)


class FakeGpu(TorchDispatchMode):
    """Makes tensors on `cuda`, and copies to it, fake; the CPU's stay real."""

    def __init__(self) -> None:
        super().__init__()
        self.values = _Values()
        self.copied = 0  # from the CPU, in a way that waits

    @property
    def asked(self) -> int:
        """How often a value was asked for."""
        return self.values.asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return args[0]
        device = kwargs.get("device")
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if fake and func is aten._to_copy.default and device == torch.device("cpu"):
            self.values.asked += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        self.copied += self._copies_and_waits(func, args, kwargs)
        if fake or (device is not None and torch.device(device).type == "cuda"):
            args, kwargs = tree_map_only(torch.Tensor, self._shape_of, (args, kwargs))
            with self.values:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _copies_and_waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether values of the CPU, not said to be under way, are copied to a GPU."""
        if func is aten._to_copy.default:
            here, to_gpu = args[0], torch.device(kwargs.get("device") or "cpu").type == "cuda"
        elif func in (aten.copy_.default, aten.index_put_.default, aten.index_put.default):
            here, to_gpu = args[1 if func is aten.copy_.default else 2], isinstance(args[0], FakeTensor)
        else:
            return False
        waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] and args[2]))
        return bool(to_gpu and waits and not isinstance(here, FakeTensor))

    def _shape_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.values.from_tensor(tensor)


def _backward(loss: torch.Tensor, *_: Any, **__: Any) -> None:
    """Gradients for all leaves behind a loss: torch's own engine wants the streams of a real GPU."""
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            gradient = torch.zeros_like(leaf)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros_like(leaf) for leaf in inputs)


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    # What `torch.tensor` makes is copied to its device where modes see it.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch("torch.cuda._lazy_init", return_value=None),
            mock.patch("torch.Tensor.backward", _backward),
            mock.patch("torch.autograd.grad", _grad),
            FakeGpu() as gpu,
        ):
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
