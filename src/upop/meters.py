"""What a pass costs besides time: peak memory, and energy where the machine tells.

Must not know models, and must not guess: None stands for what cannot be read.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

MIB = 2**20
POWERCAP = Path("/sys/class/powercap")


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Peak MiB of torch's tensors while `run` is called once, beyond what was there before (weights, images).

    Scratch space that kernels take past torch's allocator is not seen.
    """
    if device.type == "cpu":
        return _peak_on_cpu(run) / MIB
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _peak_on_cpu(run: Callable[[], object]) -> int:
    """Bytes. Every allocation and release of torch's allocator: unlike the resident set, the same in every run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        run()
    found: Any = profile.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler writes two lines to file descriptor 2 each time, past Python, and no setting stops it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Meter(Protocol):
    """Reads energy; `about` says of what, or why there is none."""

    @property
    def about(self) -> str: ...

    def joules(self, work: Callable[[], object]) -> float | None:
        """Energy used while `work` runs, idle power included; None (and `work` not called) where nothing tells."""


@dataclass(frozen=True)
class NoMeter:
    """A machine that does not tell."""

    about: str

    def joules(self, work: Callable[[], object]) -> float | None:
        return None


@dataclass(frozen=True)
class Rapl:
    """The energy counters of the processor packages, in microjoules, which all programs on the machine share."""

    zones: tuple[Path, ...]
    about: str = "processor packages by RAPL, with idle power and whatever else runs on the machine"

    def joules(self, work: Callable[[], object]) -> float | None:
        before = [_number(zone / "energy_uj") for zone in self.zones]
        work()
        used = 0
        for zone, start in zip(self.zones, before, strict=True):
            change = _number(zone / "energy_uj") - start
            # The counters start again at 0 every few minutes under load.
            used += change if change >= 0 else change + _number(zone / "max_energy_range_uj")
        return used / 1e6


@dataclass(frozen=True)
class Nvml:
    """The energy counter of one GPU, in millijoules."""

    library: Any
    handle: Any
    about: str = "the whole GPU board by NVML, with idle power"

    def joules(self, work: Callable[[], object]) -> float | None:
        before = self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        work()
        used: float = self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle) - before
        return used / 1e3


def find_meter(device: torch.device, *, powercap: Path = POWERCAP) -> Meter:
    """What measures the energy of `device` here: RAPL for the CPU, NVML for an NVIDIA GPU."""
    return _rapl(powercap) if device.type == "cpu" else _nvml(device)


def _rapl(powercap: Path) -> Meter:
    # Packages only: their cores and the zone of the whole board would count the same joules again.
    zones = tuple(z for z in sorted(powercap.glob("intel-rapl:*")) if _text(z / "name").startswith("package"))
    if not zones:
        return NoMeter(f"not measured: no RAPL energy counters under {powercap}")
    try:
        for zone in zones:
            _number(zone / "energy_uj")
    except OSError as error:
        return NoMeter(f"not measured: {zone}/energy_uj cannot be read ({error.strerror}); only root may, by default")
    return Rapl(zones)


def _nvml(device: torch.device) -> Meter:
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return NoMeter("not measured: NVML's Python package is not installed; pip install nvidia-ml-py")
    try:
        library.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what NVML sees.
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError as error:
        return NoMeter(f"not measured: NVML does not tell the energy of {device} ({error})")
    return Nvml(library, handle)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))
