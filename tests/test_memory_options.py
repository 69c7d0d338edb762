"""What saves memory changes nothing: every option against the plain run, by the scripts; and resuming with each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from tests.cells import MakeCell, assert_same
from tests.test_cells import StopAt, _stop_at

__all__ = ["_stop_at"]

LORA, FULL = "lora, all cached", "full, all cached"
STEPS = ("--max_train_steps", "4")
BF16 = ("--mixed_precision", "bf16", "--full_bf16")

EXACT = {
    "recomputed": (LORA, ("--gradient_checkpointing",)),
    "each second block recomputed": (LORA, ("--gradient_checkpointing", "--checkpoint_every_n_blocks", "2")),
    "inputs in main memory": (LORA, ("--gradient_checkpointing", "--cpu_offload_checkpointing")),
    "one block streamed": (LORA, ("--blocks_to_swap", "1")),
    "all blocks streamed": (LORA, ("--blocks_to_swap", "99", "--gradient_checkpointing")),
    "split as of old": (LORA, ("--split_mode",)),
    "streamed with live encoders": ("lora, nothing cached", ("--blocks_to_swap", "2")),
    "streamed, over several batches": (LORA, ("--blocks_to_swap", "2", "--gradient_accumulation_steps", "2")),
    "all streamed, whole model": (FULL, ("--blocks_to_swap", "99", "--gradient_checkpointing")),
    "old spelling": (FULL, ("--double_blocks_to_swap", "1", "--single_blocks_to_swap", "2")),
    "accepted for saving": (FULL, ("--mem_eff_save",)),
    "attention by name": (LORA, ("--attn_mode", "sdpa")),
}
"""Options, and the cell whose weights they may not change; each beside what both runs have."""

STEPPING = {
    "during the backward pass": ("--fused_backward_pass",),
    "by blocks": ("--blockwise_fused_optimizers",),
    "during the backward pass, streamed": ("--fused_backward_pass", "--blocks_to_swap", "3"),
    "by blocks, streamed": ("--blockwise_fused_optimizers", "--blocks_to_swap", "3", "--gradient_checkpointing"),
}


def shared_by(more: Sequence[str]) -> tuple[str, ...]:
    """Those options that the plain run has, too."""
    at = more.index("--gradient_accumulation_steps") if "--gradient_accumulation_steps" in more else None
    return () if at is None else tuple(more[at : at + 2])


@pytest.mark.parametrize("name", EXACT)
def test_weights_are_those_of_the_plain_run(make_cell: MakeCell, name: str) -> None:
    cell, more = EXACT[name]
    plain, saving = make_cell(cell, "plain"), make_cell(cell, "saving")
    plain(*STEPS, *shared_by(more))
    saving(*STEPS, *more)
    assert_same(plain.weights(), saving.weights())


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
@pytest.mark.parametrize("name", STEPPING)
def test_stepping_in_the_backward_pass_gives_the_same_weights(make_cell: MakeCell, name: str, optimizer: str) -> None:
    """Without clipping, which is of each parameter or block alone there."""
    given = ("--optimizer_type", optimizer, "--max_grad_norm", "0")
    given += ("--optimizer_args", "relative_step=False") if optimizer == "Adafactor" else ()
    plain, fused = make_cell(FULL, "plain"), make_cell(FULL, "fused")
    plain(*STEPS, *given)
    fused(*STEPS, *given, *STEPPING[name])
    assert_same(plain.weights(), fused.weights())


@pytest.mark.parametrize(
    ("cell", "more"),
    [
        (LORA, ("--blocks_to_swap", "2", "--ema_decay", "0.9")),
        (LORA, ("--int8_base", "--gradient_checkpointing", "--cpu_offload_checkpointing")),
        (FULL, ("--fused_backward_pass", "--blocks_to_swap", "2")),
        (FULL, ("--blockwise_fused_optimizers", "--blocks_to_swap", "2", "--ema_decay", "0.9", "--ema_on_cpu")),
        (FULL, ("--blocks_to_swap", "2", "--gradient_accumulation_steps", "2")),
        (FULL, (*BF16, "--fused_backward_pass")),
        (FULL, BF16),
    ],
    ids=["lora streamed", "lora in int8", "fused", "by blocks", "streamed at home", "fused bf16", "bf16"],
)
def test_resuming_is_exact(make_cell: MakeCell, cell: str, more: Sequence[str]) -> None:
    common = ("--max_train_steps", "6", "--lr_scheduler", "cosine", *more)
    straight, broken = make_cell(cell, "straight"), make_cell(cell, "broken")
    straight(*common)
    StopAt.step = 3
    broken(*common, "--save_every_n_steps", "3", "--save_state")
    StopAt.step = -1
    broken(*common, "--resume", "auto")
    assert_same(straight.weights(), broken.weights())
    if "--ema_decay" in more:
        assert_same(straight.weights("run-ema"), broken.weights("run-ema"))


# few bits


@pytest.mark.parametrize(
    "option", ["--fp8_base", "--fp8_base_unet", "--fp8_scaled", "--int8_base", "--nf4_base", "--int8_compute"]
)
def test_few_bits_train_about_the_same(make_cell: MakeCell, option: str) -> None:
    """After the first step AdamW has moved all by the rate; most of them the same way."""
    mixed = ("--mixed_precision", "bf16")
    plain, small = make_cell("lora with clip, t5 cached", "plain"), make_cell("lora with clip, t5 cached", "small")
    plain("--max_train_steps", "1", *mixed)
    small("--max_train_steps", "1", *mixed, option)
    one, other = plain.weights(), small.weights()
    ups = [name for name in one if "lora_up" in name and "unet" in name]
    same = sum(int((one[name].sign() == other[name].sign()).sum()) for name in ups)
    whole = sum(one[name].numel() for name in ups)
    assert same / whole > 0.75
    assert any(not torch.equal(one[name], other[name]) for name in ups)


def test_streamed_blocks_in_few_bits_are_the_same_as_resident_ones(make_cell: MakeCell) -> None:
    resident, streamed = make_cell(LORA, "resident"), make_cell(LORA, "streamed")
    resident(*STEPS, "--int8_base")
    streamed(*STEPS, "--int8_base", "--blocks_to_swap", "2")
    assert_same(resident.weights(), streamed.weights())


def test_networks_merged_first_are_merged_before_bits_are_taken(make_cell: MakeCell) -> None:
    first = make_cell(LORA, "first")
    first(*STEPS)
    base = ("--base_weights", str(first.output / "run.safetensors"))
    plain, streamed, small = (make_cell(LORA, name) for name in ("plain", "streamed", "small"))
    plain("--max_train_steps", "1", *base)
    streamed("--max_train_steps", "1", *base, "--blocks_to_swap", "3")
    small("--max_train_steps", "1", *base, "--int8_base")
    assert_same(plain.weights(), streamed.weights())
    assert plain.weights().keys() == small.weights().keys()


# averages, compiling, advice


def test_the_average_is_a_second_file_and_changes_nothing(make_cell: MakeCell) -> None:
    plain, averaged = make_cell(LORA, "plain"), make_cell(LORA, "averaged")
    plain(*STEPS)
    averaged(*STEPS, "--ema_decay", "0.5", "--save_every_n_steps", "2", "--save_last_n_steps", "1")
    assert_same(plain.weights(), averaged.weights())
    average = averaged.weights("run-ema")
    assert average.keys() == plain.weights().keys()
    assert any(not average[name].equal(tensor) for name, tensor in plain.weights().items())
    written = {path.name for path in averaged.output.glob("*.safetensors")}
    assert "run-step00000002.safetensors" not in written or "run-step00000002-ema.safetensors" in written


def test_a_compiler_that_is_not_there_costs_one_line(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from library.models import compiling

    def no_compiler(*_: object) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(compiling, "_try_out", no_compiler)
    plain, compiled = make_cell(LORA, "plain"), make_cell(LORA, "compiled")
    plain(*STEPS)
    caplog.clear()
    compiled(*STEPS, "--torch_compile")
    assert_same(plain.weights(), compiled.weights())
    assert len([line for line in caplog.messages if "--torch_compile" in line]) == 1


@pytest.mark.slow
def test_compiled_blocks_train_the_same(make_cell: MakeCell) -> None:
    plain, compiled = make_cell(LORA, "plain"), make_cell(LORA, "compiled")
    plain(*STEPS, "--gradient_checkpointing")
    compiled(*STEPS, "--gradient_checkpointing", "--torch_compile", "--dynamo_backend", "aot_eager")
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_card_that_is_too_small_is_told_of_before_anything_is_loaded(
    make_cell: MakeCell, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    from library.train import forecast

    monkeypatch.setattr(forecast, "CONTEXT", 3 * 2**30)
    make_cell(LORA, "out")("--vram", "2", "--dry_run")
    said = [line for line in caplog.messages if "GPU memory" in line]
    assert any("needs about" in line and "of 2.0 GiB" in line for line in said)
