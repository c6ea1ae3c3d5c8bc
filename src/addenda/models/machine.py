"""The machine: which dtype is fast on it, what it is, and how much memory a run takes above the loaded model."""

import contextlib
import gc
import os
import platform
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.threads import give_back

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NO_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # as oneDNN calls them
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, else CUDA where there is one, else the CPU. Raises AddendaError for any other."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        names = ("cpu", "cuda", "mps", "xpu", "meta")
        raise AddendaError(f"There is no device {device!r}.{nearest(device, names)} Give cpu, or cuda:0.") from None
    try:
        backend: Any = torch.get_device_module(target)
        count = backend.device_count() if getattr(backend, "is_available", lambda: True)() else 0
    except (RuntimeError, AssertionError):
        count = 0
    if target.type != "meta" and (target.index or 0) >= count:
        raise AddendaError(f"This machine has no {target} that torch could use. Leave the device out, or give cpu.")
    return target


def pick_dtype(dtype: str | torch.dtype = "auto", device: torch.device | None = None) -> tuple[torch.dtype, str]:
    """Return (dtype, why). "auto": bfloat16 where processor or GPU multiplies it fast, else float32.

    Raises AddendaError for an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype, "as asked"
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype], "as asked"
    if dtype != "auto":
        raise AddendaError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))} or a torch.dtype, got {dtype!r}.")
    if device is not None and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU is fast at bfloat16") if fast else (torch.float32, "the GPU has no bfloat16")
    if capped := _cap():
        return torch.float32, f"{capped} keeps oneDNN from the processor's bfloat16"
    flag = next((f for f in ("amx_bf16", "avx512_bf16") if f in _cpu_flags()), None)
    if flag:
        return torch.bfloat16, f"the processor has {flag}"
    return torch.float32, "the processor has neither amx_bf16 nor avx512_bf16"


def _cpu_flags() -> set[str]:
    flags = set()
    for name, probe in (("amx_bf16", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            flags.add(name)
    if not flags and (info := Path("/proc/cpuinfo")).exists():
        line = next((s for s in info.read_text().splitlines() if s.startswith("flags")), "")
        flags = set(line.split())
    return flags


def _cap() -> str:
    """Return the setting, "NAME=VALUE", that takes bfloat16 instructions from the library that multiplies; else ""."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if os.environ.get(name, "").upper() in _NO_BFLOAT16:
            return f"{name}={os.environ[name]}"
    return ""


def processes() -> int:
    """Return how many processes a launcher (torchrun, accelerate) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def hardware() -> dict:
    """Return processor, cores, memory in bytes, GPU and operating system."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [s.partition(":")[2].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0] if names else cpu
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": total,
        "gpu": gpu,
        "system": platform.platform(),
    }


def versions() -> dict:
    """Return the versions of what a run depends on."""
    installed = {"python": platform.python_version()}
    for name in ("addenda", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def resident(device: torch.device | None = None) -> int | None:
    """Return bytes in use now: of the GPU's allocator, or resident in this process after giving free pages back."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    give_back()
    return _status("VmRSS")


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Leave all objects of now out of garbage collections inside a `with` block, and take them back in behind it.

    Each measurement of memory collects garbage first, and would walk over every function of every imported library:
    0.2 s beside transformers, several times a run. Where the process has set objects aside itself, nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(s for s in _STATUS.read_text().splitlines() if s.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    return None


class Peak:
    """The highest memory in use inside a `with` block, as `peak.bytes`; None where unknown.

    On Linux the kernel's high-water mark of this process is reset at the start; where that is not permitted the
    resident size is sampled every 10 ms. On CUDA it is the allocator's own mark.
    """

    def __init__(self, device: torch.device | None = None):
        self.device, self.bytes = device, None
        self._stop, self._thread = threading.Event(), None

    def __enter__(self) -> "Peak":
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            _CLEAR.write_text("5")
        except OSError:
            if sys.platform == "linux":
                self._thread = threading.Thread(target=self._sample, daemon=True)
                self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes or 0, _status("VmRSS") or 0) or None

    def __exit__(self, *_) -> None:
        if self.device is not None and self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
        else:
            self.bytes = _status("VmHWM")


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
