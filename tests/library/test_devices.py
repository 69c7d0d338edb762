"""Names of types, and that every question about devices has an answer on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

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
    assert devices.total_memory(cpu) is None
    assert devices.supports_bf16(cpu)
    assert "CPU" in devices.memory_line(cpu)
    assert devices.best_device().type in {"cpu", "cuda", "xpu", "mps", "npu"}


def test_the_computer_has_memory() -> None:
    found = devices.main_memory()
    assert found is None or found > 1 << 28


def test_copies_and_computing_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that only writes down what it is asked to do."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "copies" if isinstance(name, torch.device) else str(name)

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} wait for {other.name}")

        def record_event(self) -> str:
            return f"mark of {self.name}"

        def wait_event(self, event: str) -> None:
            done.append(f"{self.name} waits for {event}")

        def synchronize(self) -> None:
            done.append(f"host waits for {self.name}")

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        done.append(f"in {entered.name}")
        yield

    backend = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda device: Stream("computing"))
    monkeypatch.setattr(torch, "cpu", backend)
    monkeypatch.setattr(devices, "_STREAMING", ("cpu",))
    copies, target = devices.CopyStream(torch.device("cpu")), torch.zeros(2)
    copies.after_compute()
    copies.copy(target, torch.ones(2))
    copies.before_compute(copies.mark())
    copies.finish()
    assert target.tolist() == [1, 1]
    assert done == [
        "copies wait for computing",
        "in copies",
        "computing waits for mark of copies",
        "host waits for copies",
    ]


@pytest.mark.parametrize("refused", [False, True])
def test_main_memory_is_pinned_as_long_as_it_lives(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver that only writes down what it is told."""
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        if not refused:
            pinned[address] = size
        return int(refused)

    def launch(*_: object, **named: object) -> None:
        raise RuntimeError("the refusal")

    monkeypatch.setattr(torch, "zeros", launch)
    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(devices, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    memory = devices.host_memory(10_000, torch.device("cuda"))
    memory.fill_(7)
    part = memory[5000:]
    assert pinned == ({} if refused else {memory.data_ptr(): 10_000})
    del memory
    assert part.sum() == 7 * 5000
    assert bool(pinned) is not refused
    del part
    assert pinned == {}
    assert devices.host_memory(3, torch.device("cpu")).dtype == torch.uint8
