"""Every precision trains, checkpointing changes nothing but memory, and types stay where they belong."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.families.flux import Flux, FluxFiles
from library.generate.flux import Dtypes
from library.generate.painter import LoraFile, Painter
from library.methods.full import Full
from library.methods.full_rates import FullRates
from library.methods.rates import Rate
from library.models.memory import checkpoint_blocks
from library.models.quantized import store_linears
from library.randomness import Draws
from library.train.loop import loss_of, task_of
from library.types import Batch, Cond, Models, Size
from networks import lora_flux
from tests import tiny
from tests.cells import MakeCell, read_json
from tests.networks import tiny_models

FULL_BF16 = ("--mixed_precision", "bf16", "--full_bf16")
PRECISIONS = {"bf16": ("--mixed_precision", "bf16"), "full bf16": FULL_BF16}
"""Besides float32, which the other tests of scripts have."""
CELLS = ("lora with clip, t5 cached", "lora, nothing cached", "full, all cached", "full, nothing cached")


# scripts


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_two_steps(make_cell: MakeCell, cell: str, precision: str) -> None:
    run = make_cell(cell)
    checkpointing = ["--gradient_checkpointing"] if cell.startswith("lora") or precision == "full bf16" else []
    run("--max_train_steps", "2", "--save_state_on_train_end", *PRECISIONS[precision], *checkpointing)
    weights = run.weights()
    floating = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    assert floating == {torch.bfloat16 if precision == "full bf16" else torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    slots = read_json(run.output / "run-state" / "run.json")["loss"]["slots"]
    assert slots
    assert all(math.isfinite(float(loss)) for loss in slots)


@pytest.mark.parametrize(
    "options", [("fp16",), ("fp16", "--full_fp16"), ("no", "--full_bf16"), ("bf16", "--full_fp16")]
)
def test_what_cannot_be_is_said(
    make_cell: MakeCell, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_cell("lora, all cached")("--max_train_steps", "2", "--mixed_precision", *options)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error[")
    assert "fp16" in last or "bf16" in last


# checkpointing


def trained_parts(checkpointed: bool) -> tuple[Models, nn.Module]:
    """A transformer and CLIP-L with a LoRA that changes something."""
    denoiser, clip = tiny_models.flux(), tiny_models.clip_l()
    network = lora_flux.create_network(1.0, 4, 2.0, None, [clip, None], denoiser, neuron_dropout=0.2)
    network.apply_to([clip, None], denoiser)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    if checkpointed:
        checkpoint_blocks(denoiser)
        checkpoint_blocks(clip)
    return Models(denoiser=denoiser, encoders={"clip_l": clip}), network.train()


def gradients(parts: Models, trained: nn.Module, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss through both parts, and what it says to the trained weights."""
    assert parts.denoiser is not None
    inputs = tiny_models.flux_inputs()
    tokens = torch.arange(14).reshape(2, 7)
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        if parts.encoders:
            inputs["pooled"] = parts.encoders["clip_l"](input_ids=tokens).last_hidden_state[:, -1]
        loss = parts.denoiser(**inputs).float().square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in trained.named_parameters() if parameter.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_a_network_on_both_parts_changes_nothing(autocast: bool) -> None:
    wanted_loss, wanted = gradients(*trained_parts(False), autocast)
    loss, found = gradients(*trained_parts(True), autocast)
    assert torch.equal(loss, wanted_loss)
    assert any("te1" in name for name in wanted)
    assert all(gradient.abs().sum() > 0 for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize(
    ("autocast", "stored"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_checkpointing_the_whole_denoiser_changes_nothing(autocast: bool, stored: torch.dtype) -> None:
    answers = []
    for checkpointed in (False, True):
        denoiser = tiny_models.flux()
        method = Full(FullRates(denoiser=Rate(1e-3, "--learning_rate")), stored)
        method.attach(Models(denoiser=denoiser))
        if checkpointed:
            checkpoint_blocks(denoiser)
        answers.append(gradients(Models(denoiser=denoiser), denoiser, autocast))
    (wanted_loss, wanted), (loss, found) = answers
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys() == dict(denoiser.named_parameters()).keys()
    assert all(gradient.dtype == stored for gradient in found.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


# types


def text(batch: int = 2) -> Cond:
    generator = torch.Generator().manual_seed(5)
    t5 = torch.randn(batch, 5, tiny_models.TINY.context_width, generator=generator)
    pooled = torch.randn(batch, tiny_models.TINY.pooled_width, generator=generator)
    return {"t5_out": t5, "txt_ids": torch.zeros(batch, 5, 3), "l_pooled": pooled}


@pytest.fixture
def family() -> Flux:
    return Flux(FluxFiles(None, None, None, None))


def test_objective_and_loss_are_float32_whatever_the_model_computes_in(family: Flux) -> None:
    seen: list[Tensor] = []

    def predict(denoiser: object, x: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        seen.extend((x, timesteps))
        return torch.zeros_like(x, dtype=torch.bfloat16)

    latents = Draws([1, 2]).normal((16, 8, 8))
    run = SimpleNamespace(
        method=SimpleNamespace(before_batch=lambda _: None, target=lambda noised, *_: noised),
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16), device="cpu"),
        objective=family.objective(),
        family=SimpleNamespace(predict=predict, vary=lambda cond, *_: cond),
        denoiser=None,
        cond=lambda _: {},
        latents=lambda _: latents,
    )
    size = Size(64, 64)
    batch = Batch(
        names=["a", "b"],
        captions=["", ""],
        loss_weights=torch.tensor([0.5, 0.5]),
        draws=[3, 4],
        image_seeds=[3, 4],
        size=size,
        original_sizes=[size, size],
        crops=[(0, 0), (0, 0)],
    )
    loss = loss_of(run, task_of(run, batch)).share
    assert {tensor.dtype for tensor in [*seen, loss]} == {torch.float32}
    noised = family.objective().noise(latents, Draws(batch.draws))
    assert torch.equal(seen[0], noised.input)


def test_eight_bits_store_weights_and_never_touch_activations(family: Flux) -> None:
    """A small change of the latents, which eight bits would round to nothing or to far more, stays what it is."""
    x, t = Draws([1]).normal((16, 8, 8)), torch.tensor([500.0])

    def change(denoiser: nn.Module) -> Tensor:
        before, after = (family.predict(denoiser, x * factor, t, text(1)).float() for factor in (1.0, 1.03))
        return (after - before).norm()

    with torch.no_grad():
        wanted = change(tiny_models.flux())
        with torch.autocast("cpu", torch.bfloat16):
            found = change(store_linears(tiny_models.flux(), "fp8"))
    assert 0.5 * wanted < found < 2 * wanted


def test_networks_are_merged_before_weights_go_into_eight_bits(models: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.flux_model()
    network = lora_flux.create_network(1.0, 2, 2.0, None, [None, None], base)
    network.apply_to(None, base, False, True)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, torch.float32)
    types = Dtypes(torch.float32, torch.float32, torch.float32, torch.float8_e4m3fn)
    files = FluxFiles(str(models["flux"]), None, None, None)

    loras = [LoraFile(str(path), 0.5)]
    painter = Painter(
        Flux(files), types.by_part(), torch.device("cpu"), lambda weights: lora_flux, loras=loras, merge=True
    )
    adapter = network.created[0]
    merged = painter._part("unet").get_submodule("double_blocks.0.img_mod.lin").weight
    raised = (adapter.module.weight.bfloat16().float() + 0.5 * adapter.delta()).bfloat16()
    assert merged.dtype == torch.float8_e4m3fn
    assert torch.equal(merged.float(), raised.to(torch.float8_e4m3fn).float())
