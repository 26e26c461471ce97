"""Tensors on their way to an accelerator, and what a device computes in."""

import functools

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for it: a copy of memory that is not pinned would."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Whether the hardware computes in bfloat16 itself; where it is emulated, float32 is faster."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
