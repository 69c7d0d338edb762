"""One process unless a launcher starts more, also where there are two GPUs; what Windows needs."""

from __future__ import annotations

import pytest
import torch

from library.option_groups import FLUX_TRAIN_NETWORK
from library.options import Options
from library.train import processes


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "USE_LIBUV"):
        monkeypatch.delenv(name, raising=False)


def test_owning_two_cards_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.world_size() == 1
    accelerator = processes.start(Options(FLUX_TRAIN_NETWORK, {}, {}))
    assert accelerator.num_processes == 1
    assert accelerator.is_main_process


def test_windows_gets_what_its_torch_has() -> None:
    environment: dict[str, str] = {}
    assert processes.prepare_environment(environment, "win32") == "gloo"
    assert environment == {"USE_LIBUV": "0"}
    chosen = {"USE_LIBUV": "1"}
    processes.prepare_environment(chosen, "win32")
    assert chosen == {"USE_LIBUV": "1"}
    for platform in ("linux", "darwin"):
        assert processes.prepare_environment(environment, platform) is None
