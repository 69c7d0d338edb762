"""Training of the whole denoiser: FLUX."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library import files, options
from library.families.flux import Flux, FluxFiles
from library.log import UserError
from library.methods.full import Full
from library.methods.full_rates import FullRates
from library.methods.rates import Rate
from library.objectives import FlowSettings
from library.option_groups import FLUX_TRAIN
from library.types import DENOISER, Models, Saving
from tests.allocations import Allocations


def test_everything_moves_and_is_saved(tmp_path: Path) -> None:
    denoiser = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).requires_grad_(False).eval()
    encoder = nn.Linear(2, 2)
    written: list[tuple[Any, ...]] = []

    def write(*all_of_it: Any) -> None:
        written.append(all_of_it)

    method = Full(FullRates(denoiser=Rate(0.1, "--learning_rate"), frozen_encoders={"clip_l": "so"}), torch.float32)
    method.writes_by(write)
    method.attach(Models(denoiser=denoiser, encoders={"clip_l": encoder}))
    method.prepare(SimpleNamespace(num_processes=1, device="cpu"), Models(denoiser=denoiser))
    assert denoiser.training
    (group,) = method.param_groups()
    assert {id(parameter) for parameter in group.params} == {id(parameter) for parameter in denoiser.parameters()}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    denoiser(encoder(torch.ones(1, 2))).sum().backward()
    torch.optim.SGD([group.for_optimizer()]).step()
    assert not any(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())
    method.save(tmp_path / "m.safetensors", torch.bfloat16, {"modelspec.title": "t"})
    assert written == [(tmp_path / "m.safetensors", {DENOISER: denoiser}, torch.bfloat16, {"modelspec.title": "t"})]
    method.load_state_dict(before)
    assert torch.equal(denoiser[0].weight, before["0.weight"])
    method.train_mode(False)
    assert not denoiser.training


def test_weights_are_kept_in_the_type_of_the_options() -> None:
    for flags, dtype in (([], torch.float32), (["--full_bf16", "--mixed_precision", "bf16"], torch.bfloat16)):
        chosen = options.parse(FLUX_TRAIN, ["--learning_rate", "1e-4", *flags])
        method = Full.from_options(chosen, ["clip_l"])
        denoiser = nn.Linear(2, 2, dtype=torch.float16)
        method.attach(Models(denoiser=denoiser))
        assert denoiser.weight.dtype == dtype
        assert method.param_groups()[0].lr_source == "--learning_rate"
        assert method.param_groups()[0].lr == 1e-4
        assert set(method.frozen()) == {"clip_l"}


def test_rate_zero_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        Full(FullRates(denoiser=Rate(0.0, "--learning_rate")), torch.float32)


def test_flux_is_written_as_one_file(tmp_path: Path) -> None:
    denoiser = nn.Sequential(nn.Linear(2, 3))
    saving = Saving(dtype=torch.bfloat16, metadata={"modelspec.title": "t"})
    family = Flux(FluxFiles(None, None, None, None), FlowSettings())
    family.save_model(tmp_path / "m.safetensors", {DENOISER: denoiser}, saving)
    saved = files.header(tmp_path / "m.safetensors")
    assert {info.dtype for info in saved.tensors.values()} == {"BF16"}
    assert set(saved.tensors) == set(denoiser.state_dict())
    assert saved.metadata["modelspec.title"] == "t"
    assert family.model_extension("ckpt") == ".safetensors"


def test_saving_takes_less_than_the_largest_tensor_twice(tmp_path: Path) -> None:
    """Of memory besides that of the model, whatever type is written (needs C4)."""
    model = nn.Sequential(*(nn.Linear(256, 256 * (1 + number % 3)) for number in range(12)))
    family = Flux(FluxFiles(None, None, None, None), FlowSettings())
    largest = max(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    tracemalloc.start()
    try:
        for dtype in (None, torch.bfloat16):
            tracemalloc.reset_peak()
            with Allocations(model.state_dict().values()) as counted:
                family.save_model(tmp_path / "m.safetensors", {DENOISER: model}, Saving(dtype=dtype, metadata={}))
            copies = counted.peak - whole
            assert copies + tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()
