"""What needs an accelerator: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library import devices
from library.models import memory
from library.models.activations import Amount, Numerics, Training
from library.models.ledger_flux import FluxActivations
from library.recording import Recorder
from library.train import graphs
from library.train.loop import BatchLoss
from tests import tiny
from tests.cells import CELLS, MakeCell, write_images
from tests.cells_sd import CACHED, LORA, SIZES, SdCell, write_models
from tests.flux_steps import Case, Trained

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if devices.best_device().type == "cpu":
        pytest.skip("there is no GPU")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_runs(make_cell: MakeCell, cell: str, precision: str) -> None:
    run = make_cell(cell, "out")
    run("--max_train_steps", "4", "--mixed_precision", precision, "--gradient_checkpointing")
    assert all(tensor.isfinite().all() for tensor in run.weights().values())


def test_the_denoiser_says_the_same_as_on_the_cpu() -> None:
    device = devices.best_device()
    model = tiny.flux_model(guidance=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = model.config
    inputs = [draw(2, 16, 64), torch.zeros(2, 16, 3), draw(2, 8, config.context_width), torch.zeros(2, 8, 3)]
    inputs += [torch.tensor([0.2, 0.9]), draw(2, config.pooled_width), torch.tensor([3.5, 1.0])]
    with torch.no_grad():
        wanted = model(*inputs)
        found = model.to(device)(*(value.to(device) for value in inputs)).cpu()
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_recomputing_activations_needs_less_memory() -> None:
    device = devices.best_device()

    def peak(checkpointed: bool) -> int:
        model = tiny.flux_model(guidance=True, width=256, single=8).to(device)
        if checkpointed:
            memory.checkpoint_blocks(model)
        devices.reset_peak_memory(device)
        tokens = torch.randn(2, 1024, 64, device=device, requires_grad=True)
        ids = torch.zeros(2, 1024, 3, device=device)
        text = torch.randn(2, 64, model.config.context_width, device=device)
        pooled = torch.randn(2, model.config.pooled_width, device=device)
        strength = torch.ones(2, device=device)
        model(tokens, ids, text, ids[:, :64], strength / 2, pooled, strength).square().mean().backward()
        return devices.peak_memory(device)

    assert peak(checkpointed=True) < 0.7 * peak(checkpointed=False)


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("rank", [16, 0])
def test_a_step_takes_what_was_foreseen(rank: int, every: int) -> None:
    device = devices.best_device()
    amount = Amount(images=1, image_tokens=1024, text_tokens=512)
    case = Case(width=1536, head=128, amount=amount, rank=rank, every=every, dtype=torch.bfloat16, device=device.type)
    training = Training(rank=rank, whole=not rank, size=4 if rank else 2, checkpoint_every=every)
    foreseen = FluxActivations(case.config).step(amount, Numerics.of(device.type, 2), training).peak
    trained = Trained(case)
    trained.recompute()
    trained.backward()  # the first step brings libraries' own memory
    for parameter in trained.params:
        parameter.grad = None
    devices.release_memory()
    devices.reset_peak_memory(device)
    before = devices.peak_memory(device)
    trained.backward()
    assert devices.peak_memory(device) - before == pytest.approx(foreseen, rel=0.1)


@pytest.fixture
def sdxl_cell(tmp_path: Path) -> Callable[..., SdCell]:
    """LoRA for SDXL, by the name of the output folder."""
    models, images = write_models(tmp_path), write_images(tmp_path / "images" / "3_thing", SIZES).parent
    more = (*LORA, *CACHED, "--network_train_unet_only", "--mixed_precision", "bf16")

    def make(folder: str) -> SdCell:
        script = "sdxl_train_network"
        return SdCell(script, models["sdxl"], models["tokenizers"], images, tmp_path / folder, more)

    return make


@pytest.mark.parametrize(
    "more",
    [(), ("--gradient_checkpointing",), ("--network_dropout", "0.1"), ("--gradient_accumulation_steps", "2")],
    ids=["plain", "recomputed", "dropouts", "several batches"],
)
def test_recorded_batches_train_the_same(
    sdxl_cell: Callable[..., SdCell],
    more: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if devices.best_device().type != "cuda":
        pytest.skip("recordings are for CUDA")
    repeated, repeat = [], graphs.Recorded._repeat

    def noting(self: graphs.Recorded, *arguments: Any) -> BatchLoss:
        repeated.append(1)
        return repeat(self, *arguments)

    monkeypatch.setattr(graphs.Recorded, "_repeat", noting)
    plain, recorded = sdxl_cell("plain"), sdxl_cell("recorded")
    plain("--max_train_steps", "30", *more)
    recorded("--max_train_steps", "30", "--cuda_graphs", *more)
    assert len(repeated) >= 20
    assert "nothing is recorded" not in caplog.text
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(recorded.weights()[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_recording_that_fails_leaves_the_device_as_it_was() -> None:
    device = devices.best_device()
    if device.type != "cuda":
        pytest.skip("recordings are for CUDA")
    recorder, weight = Recorder(device), torch.ones(4, device=device, requires_grad=True)

    def doubled() -> torch.Tensor:
        return (weight.detach() * 2).clone()

    def waits() -> float:
        return float((weight * 2).sum())

    assert recorder.rehearse(doubled)[1] == ""
    assert "waits" in recorder.rehearse(waits)[1]
    before = torch.get_device_module(device).get_rng_state()
    with pytest.raises(RuntimeError):
        recorder.record(waits)
    assert torch.equal(before, torch.get_device_module(device).get_rng_state())
    torch.rand(2, device=device)
    (weight * 3).sum().backward()
    devices.release_memory()
    repeat, result = recorder.record(doubled)
    repeat()
    assert result.tolist() == [2.0] * 4
    with torch.no_grad():
        weight.fill_(5.0)
    repeat()
    assert result.tolist() == [10.0] * 4
