"""The global random generators of Python, NumPy and torch: reading, restoring, leaving them as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of every global generator of this process, `device`'s included, as plain data."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    device = torch.device(device)
    if device.type != "cpu":
        state["device"] = _device_state(device)
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Sets every global generator to a state of `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    device = torch.device(device)
    if device.type != "cpu" and "device" in state:
        saved = state["device"].cpu()
        module = torch.get_device_module(device)
        module.set_rng_state(saved) if device.type == "mps" else module.set_rng_state(saved, device)


def seed_rng(seed: int) -> None:
    """Seeds every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def rng_untouched(device: torch.device | str = "cpu") -> Iterator[None]:
    """Whatever is drawn inside, the global generators go on afterwards as if nothing had been."""
    state = rng_state(device)
    try:
        yield
    finally:
        restore_rng(state, device)


def _device_state(device: torch.device) -> torch.Tensor:
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state
