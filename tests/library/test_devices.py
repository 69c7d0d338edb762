"""Names of types, and that every question about devices has an answer on every machine."""

from __future__ import annotations

import pytest
import torch

from library import devices
from library.log import UserError


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("fp32", "float", "float32"), torch.float32),
        (("fp16", "half", "float16"), torch.float16),
        (("bf16", "bfloat16"), torch.bfloat16),
        (("fp8", "e4m3fn", "float8_e4m3fn"), torch.float8_e4m3fn),
    ],
)
def test_names_of_types(names: tuple[str, ...], dtype: torch.dtype) -> None:
    assert {devices.dtype_of(name) for name in names} == {dtype}


def test_unknown_type() -> None:
    with pytest.raises(UserError, match="int7"):
        devices.dtype_of("int7")


def test_cpu_has_an_answer_to_everything() -> None:
    cpu = torch.device("cpu")
    devices.release_memory()
    devices.synchronize(cpu)
    devices.reset_peak_memory(cpu)
    assert devices.peak_memory(cpu) == 0
    assert devices.free_memory(cpu) is None
    assert devices.supports_bf16(cpu)
    assert "CPU" in devices.memory_line(cpu)
    assert devices.best_device().type in {"cpu", "cuda", "xpu", "mps", "npu"}
