"""Runs of SD3 by its scripts: resuming, caches, memory, samples, masks, validation and several processes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny_sd3
from tests.cells import assert_same, read_json
from tests.cells_sd3 import CACHED, FULL, LATENTS, NETWORK, MakeSd3Cell
from tests.test_cells import StopAt, _stop_at
from tests.test_cells_sd import Fed

__all__ = ["_stop_at"]

STEPS = ("--max_train_steps", "3")
SGD = ("--optimizer_type", "torch.optim.SGD", "--optimizer_args", "momentum=0.9")
DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk")
DROPOUT = ("--clip_l_dropout_rate", "0.5", "--clip_g_dropout_rate", "0.3", "--t5_dropout_rate", "0.4")
POSITIONS = ("--pos_emb_random_crop_rate", "0.6")
ALL = ("--train_text_encoder", "--train_t5xxl")

# resuming

slow = pytest.mark.slow
RESUMED = [
    pytest.param(NETWORK, "sd3", ("--network_dropout", "0.1", *DROPOUT), id="network, text dropout"),
    pytest.param(NETWORK, "sd3.5", (*CACHED, *DROPOUT, *POSITIONS, "--ema_decay", "0.9"), id="network, cached, ema"),
    pytest.param(NETWORK, "sd3", ("--network_args", "train_t5xxl=True"), id="network, everything", marks=slow),
    pytest.param(FULL, "sd3.5", (*CACHED, *DROPOUT, *POSITIONS), id="full, cached"),
    pytest.param(FULL, "sd3", (*ALL, *LATENTS, *DROPOUT), id="full, everything"),
    pytest.param(FULL, "sd3", (*ALL, "--gradient_accumulation_steps", "3", "--ema_decay", "0.9"), id="ema", marks=slow),
    pytest.param(FULL, "sd3", (*CACHED, "--fused_optimizer_groups", "3"), id="full, groups", marks=slow),
]


@pytest.mark.parametrize(("script", "model", "more"), RESUMED)
def test_resuming_twice_is_the_same_as_running_straight(
    make_sd3: MakeSd3Cell, script: str, model: str, more: Sequence[str]
) -> None:
    common = ("--max_train_steps", "6", "--lr_scheduler", "cosine", *more)
    straight, broken = make_sd3(script, model, "straight"), make_sd3(script, model, "broken")
    straight(*common, "--save_state_on_train_end")
    for steps in (2, 5, 6):
        StopAt.step = steps
        resume = ("--resume", "auto") if steps > 2 else ()
        broken(*common, "--save_every_n_steps", str(steps), "--save_state", *resume)
    assert_same(straight.weights(), broken.weights())
    if "--ema_decay" in more:
        assert_same(straight.weights("run-ema"), broken.weights("run-ema"))
    one, other = (cell.output / "run-state" for cell in (straight, broken))
    assert_same(load_file(one / "optimizer.safetensors"), load_file(other / "optimizer.safetensors"))
    assert read_json(one / "run.json")["loss"] == read_json(other / "run.json")["loss"]


# memory

EXACT = {
    "recomputed": (NETWORK, "sd3.5", ("--gradient_checkpointing",)),
    "recomputed, inputs in main memory": (NETWORK, "sd3", ("--gradient_checkpointing", "--cpu_offload_checkpointing")),
    "one block streamed": (NETWORK, "sd3.5", ("--blocks_to_swap", "1")),
    "all streamed, whole model": (FULL, "sd3.5", ("--blocks_to_swap", "99", "--gradient_checkpointing")),
    "recomputed, whole model": (FULL, "sd3", ("--gradient_checkpointing",)),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_saves_memory_changes_nothing(make_sd3: MakeSd3Cell, name: str) -> None:
    script, model, more = EXACT[name]
    plain, saving = make_sd3(script, model, "plain", *CACHED), make_sd3(script, model, "saving", *CACHED)
    plain(*STEPS, *POSITIONS)
    saving(*STEPS, *POSITIONS, *more)
    assert_same(plain.weights(), saving.weights())


STEPPING = {
    "in the backward pass": ("--fused_backward_pass",),
    "by blocks": ("--blockwise_fused_optimizers",),
    "by groups": ("--fused_optimizer_groups", "3"),
    "by blocks, streamed": ("--blockwise_fused_optimizers", "--blocks_to_swap", "2", "--gradient_checkpointing"),
    "in the backward pass, streamed": ("--fused_backward_pass", "--blocks_to_swap", "1"),
}


def test_stepping_in_the_backward_pass_gives_the_same_weights(make_sd3: MakeSd3Cell) -> None:
    """With encoders that are trained, too, and a block that isn't; without clipping, which is of each part there."""
    given = (*STEPS, *LATENTS, *ALL, "--max_grad_norm", "0", "--num_last_block_to_freeze", "1")
    plain = make_sd3(FULL, "sd3.5", "plain", *given)
    plain()
    for name, more in STEPPING.items():
        fused = make_sd3(FULL, "sd3.5", name, *given)
        fused(*more)
        assert_same(plain.weights(), fused.weights())


# caches


@pytest.mark.parametrize("model", ["sd3", pytest.param("sd3 without t5", marks=slow)])
def test_what_is_cached_is_what_is_encoded_on_the_spot(
    make_sd3: MakeSd3Cell, images: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """With masks of both sorts; the weights are the same, too."""
    (images / "3_thing").rename(images / "1_thing")
    fed, found, weights = Fed(monkeypatch), [], []
    more = ("--max_train_epochs", "1", "--network_train_unet_only", "--apply_lg_attn_mask", "--apply_t5_attn_mask")
    for number, caches in enumerate(((), CACHED, DISK, DISK)):
        cell = make_sd3(NETWORK, model, f"out{number}", *more, *caches)
        cell()
        found.append(fed.take())
        weights.append(cell.weights())
    assert len(found[0]) == 5
    for cached, trained in zip(found[1:], weights[1:], strict=True):
        assert_same(weights[0], trained)
        for name, tensors in found[0].items():
            assert_same({key: cached[name][key] for key in tensors}, tensors)
    folder = images / "1_thing"
    names = {path.name for path in folder.glob("*.npz")}
    assert {"i0_0064x0064_sd3.npz", "i0_sd3_te.npz"} <= {name.replace(".png", "") for name in names}, names
    with np.load(next(folder.glob("i2*_sd3.npz"))) as arrays:
        raw = torch.from_numpy(next(arrays[key] for key in arrays if key.startswith("latents_")))
    torch.testing.assert_close((raw - 0.0609) * 1.5305, found[0]["i2.png"]["latents"])
    with np.load(next(folder.glob("i0*_sd3_te.npz"))) as arrays:
        wanted = {"lg_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "apply_lg_attn_mask"}
        t5 = {"t5_out", "t5_attn_mask", "apply_t5_attn_mask"}
        assert set(arrays) >= wanted | (t5 if model == "sd3" else set())
        assert t5.isdisjoint(arrays) == (model != "sd3")


CHANGES: dict[str, tuple[tuple[str, ...], int]] = {
    "nothing": ((), 0),
    "dropout": ((*DROPOUT, *POSITIONS), 0),
    "the same type for T5": (("--t5xxl_dtype", "float32"), 0),
    "place of T5": (("--t5xxl_device", "cpu"), 0),
    "masks of CLIP": (("--apply_lg_attn_mask",), 5),
    "masks of CLIP again": (("--apply_lg_attn_mask",), 0),
    "masks of T5": (("--apply_t5_attn_mask",), 5),
    "tokens": (("--t5xxl_max_token_length", "20"), 5),
    "type of T5": (("--t5xxl_dtype", "bf16"), 5),
    "eight bits": (("--t5xxl_dtype", "fp8"), 5),
    "another CLIP-L": (("--clip_l", "{other}"), 5),
}
"""Options of a run, and how many texts it encodes after the one before."""


def test_only_what_changed_is_encoded_again(
    make_sd3: MakeSd3Cell, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    other = tiny_sd3.write_encoder(tmp_path / "other.safetensors", "clip_l", seed=77)
    cell = make_sd3(NETWORK, "sd3", "out", "--max_train_steps", "1", "--network_train_unet_only", *DISK)
    cell()
    caplog.set_level(logging.INFO)
    for name, (more, expected) in CHANGES.items():
        caplog.clear()
        cell(*(word.replace("{other}", str(other)) for word in more))
        assert encoded(caplog) == {"latents": (5, 0), "text outputs": (5 - expected, expected)}, name


def encoded(caplog: pytest.LogCaptureFixture) -> dict[str, tuple[int, int]]:
    """How many entries of each cache were reused and encoded."""
    lines = [re.match(r"(.+): 5 in all, (\d) reused, (\d) encoded", message) for message in caplog.messages]
    return {line[1]: (int(line[2]), int(line[3])) for line in lines if line}


def test_caches_of_the_tools_are_those_that_the_training_wants(
    make_sd3: MakeSd3Cell, caplog: pytest.LogCaptureFixture
) -> None:
    from tools import cache_latents, cache_text_encoder_outputs

    cell = make_sd3(FULL)
    own = ("--t5xxl_dtype", "bf16")
    at = cell.argv.index("--learning_rate")
    options = [*cell.argv[:at], *cell.argv[at + 2 :]]
    cache_latents.main([*options, "--sd3"])
    cache_text_encoder_outputs.main([*options, "--sd3", *own, "--apply_lg_attn_mask"])
    caplog.clear()
    caplog.set_level(logging.INFO)
    cell("--max_train_steps", "1", *DISK, *own, "--apply_lg_attn_mask")
    assert encoded(caplog) == {"latents": (5, 0), "text outputs": (5, 0)}


# samples, masks, validation


@pytest.mark.parametrize(("script", "more"), [(NETWORK, LATENTS), pytest.param(FULL, CACHED, marks=slow)])
def test_samples_are_the_same_twice_and_change_nothing(
    make_sd3: MakeSd3Cell, tmp_path: Path, script: str, more: Sequence[str]
) -> None:
    """Text dropout and random positions aren't for them: with both rates 1 the first samples are as without."""
    prompts = tmp_path / "prompts.txt"
    lines = ["a cat --w 80 --h 64 --s 2 --d 1 --n a dog", "a dog --w 64 --h 96 --s 2 --d 2 --l 1"]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    plain = make_sd3(script, "sd3.5", "plain", *more)
    plain(*STEPS)
    asked = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--sample_at_first")
    always = ("--clip_l_dropout_rate", "1", "--clip_g_dropout_rate", "1", "--t5_dropout_rate", "1")
    always += ("--pos_emb_random_crop_rate", "1")
    pictures = []
    for folder, others in (("one", ()), ("two", ()), ("dropped", always)):
        cell = make_sd3(script, "sd3.5", folder, *more)
        cell(*STEPS, *asked, *others)
        if not others:
            assert_same(plain.weights(), cell.weights())
        files = sorted((cell.output / "sample").glob("run_0*.png"))
        assert [Image.open(file).size for file in files] == [(80, 64), (64, 96)] * 2
        pictures.append([np.asarray(Image.open(file)) for file in files])
    one, two, dropped = pictures
    assert all(np.array_equal(left, right) for left, right in zip(one, two, strict=True))
    assert all(np.array_equal(left, right) for left, right in zip(one[:2], dropped[:2], strict=True))
    assert not np.array_equal(one[0], one[2])


@pytest.mark.parametrize("cached", [(), LATENTS])
def test_masks_hide_what_they_cover(make_sd3: MakeSd3Cell, images: Path, tmp_path: Path, cached: Sequence[str]) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for image in (images / "3_thing").glob("*.png"):
        with Image.open(image) as picture:
            Image.new("RGB", picture.size, "black").save(masks / image.name)
    subset = {"image_dir": str(images / "3_thing"), "conditioning_data_dir": str(masks), "caption_extension": ".txt"}
    (tmp_path / "data.json").write_text(
        json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}), encoding="utf-8"
    )
    cell = make_sd3(NETWORK, "sd3", "out", "--dataset_config", str(tmp_path / "data.json"), "--masked_loss", *SGD)
    cell(*STEPS, *cached)
    assert not any(tensor.any() for key, tensor in cell.weights().items() if key.endswith("lora_up.weight"))


@pytest.mark.parametrize("script", [NETWORK, pytest.param(FULL, marks=slow)])
def test_validation_is_without_dropout_and_changes_nothing(make_sd3: MakeSd3Cell, tmp_path: Path, script: str) -> None:
    def losses(folder: str, *more: str) -> tuple[dict[str, Tensor], list[float]]:
        cell = make_sd3(script, "sd3.5", folder, *CACHED, "--validation_split", "0.4", *more)
        cell(*STEPS, "--logging_dir", str(tmp_path / f"logs {folder}"))
        lines = [
            json.loads(line)
            for file in (tmp_path / f"logs {folder}").rglob("*.jsonl")
            for line in file.read_text("utf-8").splitlines()
        ]
        return cell.weights(), [value for line in lines for key, value in validated(line)]

    plain, none = losses("plain")
    weights, found = losses("validated", "--validate_every_n_steps", "1")
    assert_same(plain, weights)
    assert len(found) > len(none)
    frozen = ("--validate_every_n_steps", "1", "--learning_rate", "1e-30")
    rates = ("--clip_l_dropout_rate", "1", "--t5_dropout_rate", "1", "--pos_emb_random_crop_rate", "1")
    _, still = losses("still", *frozen)
    _, dropped = losses("dropped", *frozen, *rates)
    assert still
    assert dropped == pytest.approx(still, rel=1e-5)


def validated(line: dict[str, Any]) -> list[tuple[str, float]]:
    """The validation losses of a line of the log."""
    return [(key, value) for key, value in line.items() if "validation" in key and not key.endswith("divergence")]


# several processes


@pytest.mark.slow
@pytest.mark.parametrize("script", [NETWORK, FULL])
def test_two_processes_give_the_weights_of_one(make_sd3: MakeSd3Cell, images: Path, script: str) -> None:
    for name in ("i2", "i3"):
        (images / "3_thing" / f"{name}.png").unlink()
    (images / "3_thing").rename(images / "4_thing")
    common = ("--max_train_steps", "4", *DROPOUT, *POSITIONS, *SGD, *(ALL if script == FULL else ()))
    one, two = make_sd3(script, "sd3.5", "one"), make_sd3(script, "sd3.5", "two")
    one(*common, "--train_batch_size", "2")
    two.launch(2, *common, "--train_batch_size", "1", "--save_state")
    weights = two.weights()
    distances = {name: float((tensor - weights[name]).abs().max()) for name, tensor in one.weights().items()}
    assert max(distances.values()) < 1e-6, distances
    assert read_json(two.output / "run-state" / "train_state.json")["current_step"] == 4
