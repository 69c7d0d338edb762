"""Mistakes that people make with SD3: one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest

from library.families.sd3 import Sd3
from tests import tiny, tiny_sd
from tests.cells import Cell
from tests.cells_sd import SdCell
from tests.cells_sd3 import FULL, NETWORK, MakeSd3Cell

USAGE, DATA, DISK = 2, 3, 4
BOTH = (NETWORK, FULL)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of other kinds."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "file").write_bytes(b"x")
    return {
        "flux": tiny.write_flux(folder / "flux.safetensors"),
        "flux t5": tiny.write_t5(folder / "t5.safetensors"),
        "sdxl": tiny_sd.write_single(folder / "sdxl.safetensors", "xl"),
        "sd1": tiny_sd.write_single(folder / "sd1.safetensors", "1"),
        "page": folder / "page.safetensors",
        "file": folder / "file",
        "nowhere": folder / "nowhere.safetensors",
    }


MODEL = "--pretrained_model_name_or_path"
Mistake = tuple[tuple[str, ...], tuple[str, ...], int, str, tuple[str, ...]]
MISTAKES: dict[str, Mistake] = {
    # files
    "CLIP-G as CLIP-L": (BOTH, ("--clip_l", "{clip_g}"), DATA, "E-MODEL-KIND", ("--clip_l", "wants 96")),
    "CLIP-L as CLIP-G": (BOTH, ("--clip_g", "{clip_l}"), DATA, "E-MODEL-KIND", ("--clip_g", "wants 96")),
    "CLIPs swapped": (
        BOTH,
        ("--clip_g", "{clip_l}", "--clip_l", "{clip_g}"),
        DATA,
        "E-MODEL-KIND",
        ("swapped", "swap --clip_l and --clip_g"),
    ),
    "T5 as CLIP": (BOTH, ("--clip_l", "{t5xxl}"), DATA, "E-MODEL-KIND", ("is a T5 text encoder", "as --t5xxl")),
    "T5 as CLIP-G": (BOTH, ("--clip_g", "{t5xxl}"), DATA, "E-MODEL-KIND", ("is a T5 text encoder", "as --t5xxl")),
    "CLIP as T5": (BOTH, ("--t5xxl", "{clip_g}"), DATA, "E-MODEL-KIND", ("--clip_g",)),
    "T5 of another size": (BOTH, ("--t5xxl", "{flux t5}"), DATA, "E-MODEL-KIND", ("wants 128", "T5-XXL")),
    "CLIP as autoencoder": (BOTH, ("--vae", "{clip_l}"), DATA, "E-MODEL-KIND", ("wants an SD3 autoencoder",)),
    "SDXL's autoencoder": (BOTH, ("--vae", "{sdxl}"), DATA, "E-MODEL-KIND", ("wants an SD3 autoencoder",)),
    "autoencoder as encoder": (BOTH, ("--clip_l", "{vae}"), DATA, "E-MODEL-KIND", ("autoencoder", "--vae (SD3)")),
    "a checkpoint without it": (BOTH, ("--t5xxl", "{sd3 without t5}"), DATA, "E-MODEL-KIND", ("--t5xxl",)),
    "no encoders": (BOTH, (MODEL, "{sd3 without encoders}"), DATA, "E-MODEL-PART", ("no clip_l", "--clip_l")),
    "no CLIP-G": (
        BOTH,
        (MODEL, "{sd3 without encoders}", "--clip_l", "{clip_l}"),
        DATA,
        "E-MODEL-PART",
        ("no clip_g", "give it as --clip_g"),
    ),
    "an encoder as model": (BOTH, (MODEL, "{clip_l}"), DATA, "E-MODEL-KIND", ("wants an SD3 checkpoint",)),
    "SDXL": (BOTH, (MODEL, "{sdxl}"), DATA, "E-MODEL-KIND", ("an SDXL checkpoint", "use the sdxl scripts")),
    "SD 1.x": (BOTH, (MODEL, "{sd1}"), DATA, "E-MODEL-KIND", ("an SD 1.x checkpoint", "scripts for SD")),
    "FLUX": (BOTH, (MODEL, "{flux}"), DATA, "E-MODEL-KIND", ("FLUX.1", "use the scripts for that kind")),
    "a web page": (BOTH, ("--clip_g", "{page}"), DATA, "E-FILE-KIND", ("web page",)),
    "nothing there": (BOTH, ("--clip_g", "{nowhere}"), DATA, "E-FILE-MISSING", ("--clip_g",)),
    "no T5 there": (BOTH, ("--t5xxl", "{nowhere}"), DATA, "E-FILE-MISSING", ("--t5xxl",)),
    # values
    "no shift": (BOTH, ("--training_shift", "0"), USAGE, "E-OPTION", ("--training_shift", "0.001 or more")),
    "shift of nothing": (BOTH, ("--training_shift", "nan"), USAGE, "E-OPTION", ("--training_shift",)),
    "dropout above 1": (BOTH, ("--clip_l_dropout_rate", "2"), USAGE, "E-OPTION", ("1 or less",)),
    "dropout below 0": (BOTH, ("--t5_dropout_rate", "-0.1"), USAGE, "E-OPTION", ("0 or more",)),
    "positions": (BOTH, ("--pos_emb_random_crop_rate", "1.5"), USAGE, "E-OPTION", ("1 or less",)),
    "no tokens": (BOTH, ("--t5xxl_max_token_length", "0"), USAGE, "E-OPTION", ("1 or more",)),
    "a book of tokens": (BOTH, ("--t5xxl_max_token_length", "100000"), USAGE, "E-OPTION", ("4096 or less",)),
    "scheme": (BOTH, ("--weighting_scheme", "unifrom"), USAGE, "E-OPTION", ("mean uniform?",)),
    "type": (BOTH, ("--t5xxl_dtype", "float7"), USAGE, "E-DTYPE", ("--t5xxl_dtype",)),
    "device": (BOTH, ("--t5xxl_device", "moon"), USAGE, "E-DEVICE", ("--t5xxl_device", "use cpu")),
    "timesteps": (BOTH, ("--min_timestep", "900", "--max_timestep", "100"), USAGE, "E-TIMESTEP-RANGE", ("900",)),
    "huber": (BOTH, ("--loss_type", "huber", "--huber_schedule", "snr"), USAGE, "E-HUBER-SNR", ("exponential",)),
    "buckets": (BOTH, ("--bucket_reso_steps", "12"), USAGE, "E-BUCKET-STEP", ("multiple of 8",)),
    "images": (
        BOTH,
        ("--resolution", "512,512", "--max_bucket_reso", "1024"),
        DATA,
        "E-MODEL-SIZE",
        ("positions for 384", "--enable_scaled_pos_embed"),
    ),
    "weighted captions": (BOTH, ("--weighted_captions",), USAGE, "E-REFUSED", ("can't weigh words",)),
    "FLUX's options": (BOTH, ("--discrete_flow_shift", "3"), USAGE, "E-OPTION", ("flux_train",)),
    "masks": (BOTH, ("--masked_loss",), USAGE, "E-MASK", ("--masked_loss",)),
    "output": (BOTH, ("--output_dir", "{file}"), DISK, "E-DISK-WRITE", ("--output_dir",)),
    "caches": (
        BOTH,
        ("--cache_latents_to_disk", "--cache_dir", "{file}"),
        DISK,
        "E-DISK-WRITE",
        ("--cache_latents_to_disk",),
    ),
    # networks
    "FLUX's network": ((NETWORK,), ("--network_module", "networks.lora_flux"), USAGE, "E-NETWORK", ("lora_sd3",)),
    "FLUX's LoKr": ((NETWORK,), ("--network_module", "networks.lokr"), USAGE, "E-NETWORK", ("lora_sd3",)),
    "FLUX's OFT": ((NETWORK,), ("--network_module", "networks.oft_flux"), USAGE, "E-NETWORK", ("lora_sd3",)),
    "SD's network": ((NETWORK,), ("--network_module", "networks.lora"), USAGE, "E-NETWORK", ("lora_sd3",)),
    "a rate too many": ((NETWORK,), ("--text_encoder_lr", *"1234"), USAGE, "E-LR", ("3 text encoders",)),
    "no rate": ((NETWORK,), ("--unet_lr", "0", "--text_encoder_lr", "0"), USAGE, "E-NOTHING", ("--unet_lr is 0",)),
    "blocks": (
        (NETWORK,),
        ("--network_args", "train_block_indices=5"),
        USAGE,
        "E-NETWORK-ARGS",
        ("no block 5", "0 to 1"),
    ),
    "ranks": ((NETWORK,), ("--network_args", "emb_dims=1,2"), USAGE, "E-NETWORK-ARGS", ("6 are needed",)),
    "argument": ((NETWORK,), ("--network_args", "train_t5=1"), USAGE, "E-NETWORK-ARGS", ("train_t5xxl",)),
    # whole models
    "too many blocks": ((FULL,), ("--num_last_block_to_freeze", "3"), USAGE, "E-OPTION", ("has 2 blocks",)),
    "less than none": ((FULL,), ("--num_last_block_to_freeze", "-1"), USAGE, "E-OPTION", ("0 or more",)),
    "nothing": ((FULL,), ("--learning_rate", "0"), USAGE, "E-NOTHING", ("--learning_rate is 0",)),
    "a folder": ((FULL,), ("--save_model_as", "diffusers"), USAGE, "E-REFUSED", ("one safetensors file",)),
    "two ways to step": (
        (FULL,),
        ("--fused_backward_pass", "--fused_optimizer_groups", "2", "--optimizer_type", "Adafactor"),
        USAGE,
        "E-CHECK",
        ("choose one",),
    ),
    "groups and batches": (
        (FULL,),
        ("--fused_optimizer_groups", "2", "--gradient_accumulation_steps", "2"),
        USAGE,
        "E-CHECK",
        ("must be 1",),
    ),
}


def failed(cell: Cell, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code and the errors of a run that can't be."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cell(*argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert isinstance(ended.value.code, int)
    return ended.value.code, errors


@pytest.mark.parametrize(("name", "script"), [(name, script) for name in MISTAKES for script in MISTAKES[name][0]])
def test_one_line_names_the_mistake(
    make_sd3: MakeSd3Cell,
    sd3_models: dict[str, Path],
    others: dict[str, Path],
    images: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    script: str,
) -> None:
    _, more, code, kind, parts = MISTAKES[name]
    paths = {f"{{{key}}}": str(path) for key, path in (sd3_models | others).items()}
    before = set(images.rglob("*"))
    cell = make_sd3(script, "sd3", "out", "--max_train_steps", "1")
    found, lines = failed(cell, [paths.get(word, word) for word in more], capsys)
    assert found == code, lines
    (line,) = (line for line in lines if "error[" in line)
    assert line.startswith(f"error[{kind}]")
    assert all(part in line for part in parts), line
    assert "Traceback" not in "\n".join(lines)
    assert set(images.rglob("*")) == before
    assert not [path for path in cell.output.rglob("*") if path.is_file()]


@pytest.mark.parametrize("module", ["lora_flux", "lokr", "oft_flux", "lora", "oft", "dylora"])
def test_a_network_for_another_family_is_refused_before_anything_is_loaded(
    make_sd3: MakeSd3Cell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for load in ("load_tokenizers", "load_encoders", "load_vae", "load_denoiser"):
        monkeypatch.setattr(Sd3, load, lambda *_: pytest.fail("something is loaded"))
    cell = make_sd3(NETWORK, "sd3", "out", "--max_train_steps")
    code, lines = failed(cell, ["1", "--network_module", f"networks.{module}"], capsys)
    assert code == USAGE
    assert lines[-1].startswith("error[E-NETWORK]: the network is for another kind of model")
    assert "networks.lora_sd3" in lines[-1]


STATES = {
    "fewer parts": (FULL, ("--train_text_encoder",), ()),
    "more parts": (FULL, (), ("--train_text_encoder",)),
    "a frozen block": (FULL, (), ("--num_last_block_to_freeze", "1")),
    "more adapters": (NETWORK, (), ("--network_args", "train_t5xxl=True")),
}
"""A script, what the state was saved with, and what it is resumed with."""


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_parts_is_refused_in_one_line(
    make_sd3: MakeSd3Cell, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    script, before, after = STATES[name]
    cell = make_sd3(script, "sd3", "out", "--cache_latents", "--max_train_steps")
    cell("1", *before, "--save_state_on_train_end")
    code, lines = failed(cell, ["2", *after, "--resume", "auto"], capsys)
    line = lines[-1]
    assert code == USAGE
    assert line.startswith("error[E-STATE-FIT]: the state doesn't fit this run: ")
    assert ("--network_weights" in line and "--initial_step 1" in line) == (script == NETWORK)
    assert ("from the model" in line) == (script == FULL)


@pytest.mark.parametrize("script", ["sdxl_train_network", "sdxl_train", "train_network", "fine_tune", "train_db"])
def test_sd3_is_refused_by_the_scripts_of_others(
    sd3_models: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    network = ("--network_module", "networks.lora") if "network" in script else ()
    cell = SdCell(script, sd3_models["sd3"], sd3_models["tokenizers"], images, tmp_path / "out", network)
    code, lines = failed(cell, ["--max_train_steps", "1"], capsys)
    (line,) = (line for line in lines if "error[" in line)
    assert code == DATA
    assert "is an SD3 checkpoint" in line
    assert "use the sd3 scripts" in line


@pytest.mark.parametrize("script", ["flux_train_network", "flux_train"])
def test_sd3_is_refused_by_the_scripts_of_flux(
    sd3_models: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    network = ("--network_module", "networks.lora_flux") if "network" in script else ()
    files = {**sd3_models, "flux": sd3_models["sd3"], "ae": sd3_models["vae"]}
    cell = Cell(script, files, images, tmp_path / "out", network)
    code, lines = failed(cell, ["--max_train_steps", "1"], capsys)
    (line,) = (line for line in lines if "error[" in line)
    assert code == DATA
    assert "is an SD3 checkpoint" in line
    assert "use the sd3 scripts" in line


IDLE = {
    "--train_t5xxl": (FULL, "sd3", ("--train_t5xxl",)),
    "--learning_rate_te1": (FULL, "sd3", ("--learning_rate_te1", "1e-3")),
    "--learning_rate_te3": (FULL, "sd3", ("--train_text_encoder", "--learning_rate_te3", "1e-3")),
    "--save_t5xxl": (FULL, "sd3 without t5", ("--save_t5xxl",)),
    "--t5_dropout_rate": (NETWORK, "sd3 without t5", ("--t5_dropout_rate", "0.5")),
    "--t5xxl_dtype": (NETWORK, "sd3 without t5", ("--t5xxl_dtype", "bf16")),
    "--apply_t5_attn_mask": (NETWORK, "sd3 without t5", ("--apply_t5_attn_mask",)),
    "--mode_scale": (NETWORK, "sd3", ("--mode_scale", "1")),
    "--enable_scaled_pos_embed": (NETWORK, "sd3", ("--enable_scaled_pos_embed",)),
    "--fused_optimizer_groups": (FULL, "sd3", ("--blockwise_fused_optimizers", "--fused_optimizer_groups", "2")),
    "--num_last_block_to_freeze": (
        FULL,
        "sd3",
        ("--num_last_block_to_freeze", "1", "--learning_rate", "0", "--train_text_encoder", "--learning_rate_te1", "1"),
    ),
    "--t5xxl_device": (FULL, "sd3", ("--train_text_encoder", "--train_t5xxl", "--t5xxl_device", "cpu")),
    "clip_skip": (NETWORK, "sd3", ("--clip_skip", "2")),
    "use_t5xxl_cache_only": (FULL, "sd3", ("--use_t5xxl_cache_only",)),
    "train_t5xxl has no effect": (NETWORK, "sd3 without t5", ("--network_args", "train_t5xxl=True")),
}
"""What a warning speaks of, and a run in which it does nothing."""


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_told(make_sd3: MakeSd3Cell, caplog: pytest.LogCaptureFixture, name: str) -> None:
    script, model, more = IDLE[name]
    caplog.set_level(logging.WARNING)
    make_sd3(script, model, "out", "--max_train_steps", "1", "--cache_latents")(*more)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in told if name in line]) == 1, told


def test_contradictions_are_told_by_the_tools(
    make_sd3: MakeSd3Cell, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cell = make_sd3(FULL)
    end = cell.argv.index("--learning_rate")
    tool = importlib.import_module("tools.cache_text_encoder_outputs")
    with pytest.raises(SystemExit) as ended:
        tool.main([*cell.argv[:end], "--sd3", "--sdxl"])
    assert ended.value.code == USAGE
    assert "a cache is for one family" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        tool.main([*cell.argv[:end], "--sdxl"])
    assert ended.value.code == DATA
    assert "is an SD3 checkpoint" in capsys.readouterr().err
    caplog.set_level(logging.WARNING)
    tool.main([*cell.argv[:end], "--sd3", "--max_token_length", "150"])
    assert any("--max_token_length" in message and "nothing for SD3" in message for message in caplog.messages)
