"""Devices and element types: the only file that knows which accelerators exist."""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from library.log import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
}
"""Names that options use -> names in torch."""

_BACKENDS = ("cuda", "xpu", "mps", "npu")
_STREAMING = ("cuda", "xpu")
"""Devices that copy while they compute."""
_PORTABLE = 1
"""Of cudaHostRegister: pinned for all devices."""


def dtype_of(name: str, option: str = "") -> torch.dtype:
    """The element type that an option calls `name`. Errors: UserError for an unknown one."""
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown type {name!r}", option, f"use one of {', '.join(DTYPES)}", code="E-DTYPE")
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def device_of(name: str | None, option: str = "") -> torch.device:
    """The device that an option calls `name`, such as cuda or cuda:1; None: the CPU. Errors: UserError."""
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError):
        what = f"no device {name!r} here"
        there = dict.fromkeys(("cpu", best_device().type))
        raise UserError(what, option, f"use {' or '.join(there)}", code="E-DEVICE") from None
    return device


def best_device() -> torch.device:
    """The current accelerator, else the CPU."""
    import torch

    for backend in _BACKENDS:
        if _available(backend):
            return torch.device(backend)
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    _call(device.type, "synchronize")


def release_memory() -> None:
    """Give memory that nothing uses any more back to the device and the system."""
    gc.collect()
    for backend in _BACKENDS:
        if _available(backend):
            _call(backend, "empty_cache")


def allow_fast_matmul() -> None:
    """Let float32 products use TensorFloat-32 where the device has it."""
    import torch

    torch.set_float32_matmul_precision("high")


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def multiplies_int8(device: torch.device) -> bool:
    """Whether the device multiplies matrices in int8."""
    import torch

    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"


def multiplies_fp8(device: torch.device) -> str:
    """How the device multiplies matrices in float8: "rows" with a scale for each row, "tensor" with one; "" not."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability in ((9, 0), (10, 0)):
        return "rows"
    return "tensor" if capability >= (8, 9) else ""


def memory_line(device: torch.device) -> str:
    """Memory of the device for logs, such as `GPU memory: 11.2 GB in use, 14.0 GB at most, 24.0 GB in all`."""
    import torch

    if device.type == "cuda":
        used, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"GPU memory: {_gb(used)} in use, {_gb(most)} at most, {_gb(total)} in all"
    if device.type == "mps":
        return f"GPU memory: {_gb(torch.mps.current_allocated_memory())} in use"
    return "no GPU: running on the CPU"


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use on the device since `reset_peak_memory`; 0 where it isn't known."""
    import torch

    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def reset_peak_memory(device: torch.device) -> None:
    """Start counting `peak_memory` anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where it isn't known."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has; None where it isn't known."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def main_memory() -> int | None:
    """Bytes of memory that the computer has; None where it isn't known."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# copies beside the computing


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of main memory on a device, without waiting for it where that can be."""
    import torch

    pins = torch.device(device).type in _STREAMING and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=True)


class CopyStream:
    """Copies between main memory and a device while the device computes, one after the other as they are asked for.

    On a device without streams a copy is finished when it has been asked for, and there is nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._backend: Any = getattr(torch, device.type) if device.type in _STREAMING else None
        self._stream: Any = self._backend.Stream(device) if self._backend else None

    def after_compute(self) -> None:
        """Lets the next copies wait for all that the device has been asked to compute before."""
        if self._backend:
            self._stream.wait_stream(self._backend.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Asks for a copy; both tensors must stay as they are until it is done."""
        if not self._backend:
            target.copy_(source)
            return
        with self._backend.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """A place among the copies: behind those asked for so far."""
        return self._stream.record_event() if self._backend else None

    def before_compute(self, mark: Any) -> None:
        """Lets what the device is asked to compute from now on wait for the copies before a mark."""
        if self._backend:
            self._backend.current_stream(self._device).wait_event(mark)

    def finish(self) -> None:
        """Waits here until all copies are done."""
        if self._backend:
            self._stream.synchronize()


def host_memory(size: int, device: torch.device) -> torch.Tensor:
    """`size` bytes (uint8) of main memory which the device copies from and to while it computes.

    The driver is asked to pin ordinary memory: torch's own pinned memory comes in powers of two, up to twice as much.
    Where the driver refuses, copies work all the same, but may wait.
    """
    import torch

    pinned = _pinned(size, device) if device.type == "cuda" and size else None
    if pinned is not None:
        return pinned
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "xpu" and size > 0)


class _Pages(mmap.mmap):
    """Memory of its own pages, which can be known to the driver as long as it lives."""


def _pinned(size: int, device: torch.device) -> torch.Tensor | None:
    import torch

    pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if os.name == "posix" else _Pages(-1, size)
    if hasattr(mmap, "MADV_DONTFORK"):
        pages.madvise(mmap.MADV_DONTFORK)  # a page that two processes share would be moved away under the device
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    driver = _driver()
    with torch.cuda.device(device):
        if int(driver.cudaHostRegister(memory.data_ptr(), size, _PORTABLE)):
            with suppress(RuntimeError):  # the next launch reports the refusal
                torch.zeros(1, device=device)
            return None
    weakref.finalize(pages, _unpin, os.getpid(), memory.data_ptr()).atexit = False
    return memory


def _unpin(process: int, address: int) -> None:
    if process == os.getpid():
        _driver().cudaHostUnregister(address)


def _driver() -> Any:
    import torch

    cuda: Any = torch.cuda
    return cuda.cudart()


def _available(backend: str) -> bool:
    import torch

    if backend == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, backend, None)
    return module is not None and bool(module.is_available())


def _call(backend: str, function: str) -> None:
    """Call a function of a backend's module that some backends lack."""
    import torch

    found = getattr(getattr(torch, backend, None), function, None)
    if found is not None:
        found()


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
