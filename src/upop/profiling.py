"""Profiling: parameters, multiply-accumulates and latency of a model, as plain values.

Must not change or move the models it measures, and must not know how they were pruned.
"""

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from upop.errors import ModelError, UpopError

WARM_UP_RUNS = 3
MOST_RUNS_PER_MIN = 20


@dataclass(frozen=True)
class Times:
    """Wall-clock milliseconds of repeated calls of one thing, in the order in which they were made; two or more."""

    runs_ms: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.runs_ms)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.runs_ms)

    @property
    def spread_ms(self) -> float:
        """Interquartile range."""
        low, _, high = statistics.quantiles(self.runs_ms, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass of a whole batch.

    Attributes:
        batch: images in one pass.
        median_ms: median over `runs` passes; spread_ms: their interquartile range.
        device: such as `cpu` or `cuda:0`; dtype: of the model's own weights, such as `float32`.
    """

    batch: int
    median_ms: float
    spread_ms: float
    runs: int
    device: str
    dtype: str


def count_params(model: nn.Module) -> int:
    """Parameters of `model`; one that is used in two places counts once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, *, image_size: int | None = None, channels: int | None = None) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in the forward pass of one image.

    `image_size` in pixels, of a square image, and `channels`; None = the model's own. Masked units count as unmasked
    ones. Raises UpopError where `image_size` is needed and not given.
    """
    flops: int = _count_flops(model, image_size, channels)[1].get_total_flops()
    return flops // 2


def activation_macs(
    model: nn.Module, *, image_size: int | None = None, channels: int | None = None
) -> tuple[dict[str, int], dict[str, int], int]:
    """`count_macs` by where they happen: in Linears, by path; outside of any layer with weights, by the module's path.

    The second are products of activations with each other: attention's logits and mixtures. Third: all MACs of an
    image, those of convolutions too.
    """
    ghost, counter = _count_flops(model, image_size, channels)
    counts = {path.partition(".")[2]: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()}
    total: int = counter.get_total_flops() // 2
    linears: dict[str, int] = {}
    others: dict[str, int] = {}
    for path, module in ghost.named_modules():
        inside = sum(counts.get(f"{path}.{name}" if path else name, 0) for name, _ in module.named_children())
        own = counts.get(path, 0) - inside if path else 0
        if isinstance(module, nn.Linear):
            linears[path] = own
        elif own and next(module.parameters(recurse=False), None) is None:
            others[path] = own
    return linears, others, total


def _count_flops(model: nn.Module, image_size: int | None, channels: int | None) -> tuple[nn.Module, FlopCounterMode]:
    """A weightless copy of `model`, and what was counted in its forward pass of one image."""
    height, width = _stated_image_size(model) if image_size is None else (image_size, image_size)
    ghost = _on_meta(model).eval()
    planes = own_channels(model) if channels is None else channels
    images = torch.empty(1, planes, height, width, dtype=_weights(model).dtype, device="meta")
    # On the meta device: for CPU tensors the counter does not see scaled_dot_product_attention.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _call(ghost, images)
    return ghost, counter


def own_channels(model: nn.Module) -> int:
    """Of the images that the first convolution, that of the patch embedding, takes; 3 without one."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def compare_latency(
    models: Mapping[str, nn.Module],
    *,
    batch: int,
    image_size: int,
    channels: int = 3,
    device: str | torch.device = "cpu",
    min_runs: int = 10,
    max_seconds: float = 10.0,
) -> dict[str, Latency]:
    """Latency of each model, as it is (its own dtype, in eval mode), all on `device` where they already are.

    The models take turns, so that a machine that slows down slows all of them. After a warm-up each runs
    `min_runs` times, then on until `max_seconds` are over in all, up to 20 * `min_runs` times.
    Raises UpopError for a model on another device.
    """
    if min_runs < 2 or batch < 1:
        raise UpopError(f"compare_latency: expected min_runs >= 2 and batch >= 1, got {min_runs=}, {batch=}")
    device = torch.empty(0, device=device).device
    for name, model in models.items():
        if _weights(model).device != device:
            raise ModelError(
                f"compare_latency: {name}: expected it on {device}, got {_weights(model).device}; "
                f"call model.to({str(device)!r}) first"
            )
    # A generator of our own: measuring must not shift anybody's random numbers.
    noise = torch.randn(batch, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    passes = {name: _forward(model, noise) for name, model in models.items()}
    with _eval_mode(models.values()), torch.inference_mode():
        times = time_in_turns(passes, device=device, min_runs=min_runs, max_seconds=max_seconds)
    return {
        name: Latency(
            batch=batch,
            median_ms=found.median_ms,
            spread_ms=found.spread_ms,
            runs=found.runs,
            device=str(device),
            dtype=str(_weights(models[name]).dtype).removeprefix("torch."),
        )
        for name, found in times.items()
    }


def time_in_turns(
    passes: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    min_runs: int = 10,
    max_seconds: float = 10.0,
) -> dict[str, Times]:
    """Times of each of `passes`, called A B A B .., so that a machine that slows down slows all of them.

    After a warm-up, which is not among the times, each runs `min_runs` times, then on until `max_seconds` are over in
    all, up to 20 * `min_runs` times. Run i of all of them are neighbours in time. `device` is waited for around each
    call. Gradients and eval mode are the caller's business. Raises UpopError for `min_runs` < 2.
    """
    if min_runs < 2:
        raise UpopError(f"time_in_turns: expected min_runs >= 2, for a median and a spread, got {min_runs}")
    device = torch.device(device)
    found = _take_turns(passes, device=device, min_runs=min_runs, max_seconds=max_seconds)
    return {name: Times(tuple(runs_ms)) for name, runs_ms in found.items()}


def _take_turns(
    passes: Mapping[str, Callable[[], object]], *, device: torch.device, min_runs: int, max_seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each run, A B A B ..; the first WARM_UP_RUNS of each are not among them."""
    for _ in range(WARM_UP_RUNS):
        for run in passes.values():
            _milliseconds(run, device)
    times_ms: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + max_seconds
    for done in range(MOST_RUNS_PER_MIN * min_runs):
        if done >= min_runs and time.perf_counter() >= end:
            break
        for name, run in passes.items():
            times_ms[name].append(_milliseconds(run, device))
    return times_ms


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    weights = _weights(model)
    own = images.to(device=weights.device, dtype=weights.dtype)
    return lambda: _call(model, own)


def _call(model: nn.Module, images: Tensor) -> object:
    """What `model` makes of the images, given by Hugging Face's name for them, or first where it has no such name."""
    named = "pixel_values" in inspect.signature(model.forward).parameters
    return model(pixel_values=images) if named else model(images)


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Every module in eval mode, then back in its own mode: parts may have been frozen in eval mode."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` whose weights are shapes only; nothing of the original is moved or changed."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    # deepcopy takes what memo holds as already copied.
    return copy.deepcopy(model, memo)


def _weights(model: nn.Module) -> Tensor:
    """Some floating point parameter, for the model's dtype and device."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ModelError(f"{type(model).__name__}: expected a model with floating point weights, found none")


def own_image_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) that the model says its images have, None where it says nothing.

    By its config's (or vision_config's) or its own `image_size`, one number or two, or by timm's patch embedding.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size: object = getattr(config, "image_size", None) or getattr(model, "image_size", None)
    size = size or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _stated_image_size(model: nn.Module) -> tuple[int, int]:
    """As `own_image_size`; raises ModelError where the model says nothing."""
    if (size := own_image_size(model)) is None:
        raise ModelError(
            f"{type(model).__name__}: expected config.image_size or image_size of the model, to count "
            "multiply-accumulates, got neither; set model.image_size = pixels, or give image_size="
        )
    return size
