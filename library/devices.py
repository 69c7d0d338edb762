"""Devices and element types: the only file that knows which accelerators exist."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

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


def dtype_of(name: str, option: str = "") -> torch.dtype:
    """The element type that an option calls `name`. Errors: UserError for an unknown one."""
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown type {name!r}", option, f"use one of {', '.join(DTYPES)}", code="E-DTYPE")
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


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
