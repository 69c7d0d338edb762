"""Fine-tuning and networks of SD3 by their scripts, on tiny models: what is trained, and what the files hold."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.files import header
from library.models.keymaps_sd3 import ENCODERS
from library.models.loading_sd3 import Sd3Files, load_encoder, load_mmdit
from networks import lora_sd3
from tests import tiny_sd3
from tests.cells_sd3 import CACHED, FULL, LATENTS, NETWORK, MakeSd3Cell, moved, parts_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sd3_lora_keys.json").read_text("utf-8"))
STEPS = ("--max_train_steps", "2")
CACHES = {"nothing cached": (), "latents cached": LATENTS, "all cached that can be": CACHED}

QUICK = {
    "nothing cached": ("with CLIP", "T5 alone"),
    "latents cached": (),
    "all cached that can be": ("transformer", "with CLIP-L", "with CLIP-G", "all", "T5 at rate 0", "CLIP alone"),
}
"""Parts that are tried by every run of the tests."""


def combinations(parts: Iterable[str]) -> Iterator[Any]:
    """Parts and caches, most of them slow in sum."""
    for part in parts:
        for caches in CACHES:
            yield pytest.param(part, caches, marks=() if part in QUICK[caches] else pytest.mark.slow)


def rows_of(caplog: pytest.LogCaptureFixture) -> set[str]:
    """The parts that the table calls trained."""
    (table,) = (message for message in caplog.messages if message.startswith("trained\n"))
    rows = [line.split() for line in table.splitlines()[2:]]
    return {row[0].rstrip(",") for row in rows if "frozen" not in row}


# needs A5: what is trained

T5 = ("--network_args", "train_t5xxl=True")
ENCODERS_ONLY = "--network_train_text_encoder_only"
NAMES = {"unet": "unet", "te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}
NETWORK_PARTS = {
    "transformer": (("--network_train_unet_only",), {"unet"}),
    "with CLIP": ((), {"unet", "te1", "te2"}),
    "with CLIP-L": (("--text_encoder_lr", "1e-3", "0"), {"unet", "te1"}),
    "with CLIP-G": (("--text_encoder_lr", "0", "1e-3"), {"unet", "te2"}),
    "all": (T5, {"unet", "te1", "te2", "te3"}),
    "with T5": ((*T5, "--text_encoder_lr", "0", "0", "1e-3"), {"unet", "te3"}),
    "T5 at rate 0": ((*T5, "--text_encoder_lr", "1e-3", "1e-3", "0"), {"unet", "te1", "te2"}),
    "CLIP alone": ((ENCODERS_ONLY,), {"te1", "te2"}),
    "encoders alone": ((ENCODERS_ONLY, *T5), {"te1", "te2", "te3"}),
    "T5 alone": ((ENCODERS_ONLY, *T5, "--text_encoder_lr", "0", "0", "1e-3"), {"te3"}),
    "transformer at rate 0": (("--unet_lr", "0"), {"te1", "te2"}),
}
"""Options, and beginnings of the names of the adapters that they train."""


@pytest.mark.parametrize(("parts", "caches"), combinations(NETWORK_PARTS))
def test_exactly_the_wanted_adapters_move(
    make_sd3: MakeSd3Cell, caplog: pytest.LogCaptureFixture, parts: str, caches: str
) -> None:
    given, wanted = NETWORK_PARTS[parts]
    cell = make_sd3(NETWORK)
    caplog.set_level(logging.INFO)
    cell(*STEPS, *given, *CACHES[caches])
    weights = cell.weights()
    assert {name.split("_")[1] for name in weights} == wanted
    assert {name.split("_")[1] for name, tensor in weights.items() if "lora_up" in name and tensor.any()} == wanted
    assert rows_of(caplog) == {NAMES[part] for part in wanted}


TEXT = "--train_text_encoder"
ALL = (TEXT, "--train_t5xxl")
FULL_PARTS = {
    "transformer": ((), {"unet"}),
    "with CLIP": ((TEXT,), {"unet", "clip_l", "clip_g"}),
    "with CLIP-L": ((TEXT, "--learning_rate_te2", "0"), {"unet", "clip_l"}),
    "with CLIP-G": ((TEXT, "--learning_rate_te1", "0"), {"unet", "clip_g"}),
    "all": (ALL, {"unet", "clip_l", "clip_g", "t5xxl"}),
    "with T5": ((*ALL, "--learning_rate_te1", "0", "--learning_rate_te2", "0"), {"unet", "t5xxl"}),
    "T5 at rate 0": ((*ALL, "--learning_rate_te3", "0"), {"unet", "clip_l", "clip_g"}),
    "CLIP alone": (
        (TEXT, "--learning_rate", "0", "--learning_rate_te1", "1e-3", "--learning_rate_te2", "1e-3"),
        {"clip_l", "clip_g"},
    ),
    "T5 alone": ((*ALL, "--learning_rate", "0", "--learning_rate_te3", "1e-3"), {"t5xxl"}),
}
"""Options, and the parts that they train."""


@pytest.mark.parametrize(("parts", "caches"), combinations(FULL_PARTS))
def test_exactly_the_wanted_parts_move(
    make_sd3: MakeSd3Cell, sd3_models: dict[str, Path], caplog: pytest.LogCaptureFixture, parts: str, caches: str
) -> None:
    """And a model holds the transformer, the autoencoder and what is trained."""
    given, wanted = FULL_PARTS[parts]
    cell = make_sd3(FULL)
    caplog.set_level(logging.INFO)
    cell(*STEPS, *given, *CACHES[caches])
    after = parts_of(cell.output / "run.safetensors")
    assert after.keys() == {"unet", "vae", *wanted}
    assert moved(parts_of(sd3_models["sd3"]), after) == wanted
    assert rows_of(caplog) == wanted


# networks


def names_of(part: str, last: int, blocks: int) -> set[str]:
    """The golden names of a part with so many blocks, whose last one is the golden one's `last`."""
    found = set()
    for name in GOLDEN[part]:
        number = int(re.search(r"_(?:blocks|layers|block)_(\d+)_", name)[1])  # type: ignore[index]
        if number in (*range(blocks - 1), last):
            found.add(re.sub(r"_\d+_", f"_{min(number, blocks - 1)}_", name, count=1))
    return found


@pytest.mark.parametrize(("model", "part"), [("sd3", "sd3_medium_mmdit"), ("sd3.5", "sd35_medium_mmdit")])
def test_a_network_has_the_names_of_the_reference_and_loads_back(
    make_sd3: MakeSd3Cell, sd3_models: dict[str, Path], model: str, part: str
) -> None:
    cell = make_sd3(NETWORK, model)
    cell(*STEPS, "--network_args", "train_t5xxl=True", "split_qkv=True", "--save_precision", "bf16")
    weights = cell.weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    wanted = names_of(part, 23, 2)
    if model == "sd3.5":
        assert any("attn2" in name for name in wanted)
    assert {name for name in weights if name.startswith("lora_unet")} == wanted
    text = [name for name in GOLDEN["text_encoders"] if re.search(r"(layers|encoder_block)_[01]_", name)]
    assert {name for name in weights if not name.startswith("lora_unet")} == set(text)
    files = Sd3Files(sd3_models[model])
    encoders = [load_encoder(files, name) for name in ENCODERS]
    path = cell.output / "run.safetensors"
    network, tensors = lora_sd3.create_network_from_weights(1.0, path, None, encoders, load_mmdit(files))
    network.apply_to()
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert network.state_dict().keys() == weights.keys()
    metadata = header(path).metadata
    assert metadata["ss_base_model_version"] == ("5-medium" if model == "sd3.5" else "medium")
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-3")
    assert metadata["modelspec.architecture"].endswith("/lora")


def test_lycoris_trains_the_blocks_of_the_transformer(make_sd3: MakeSd3Cell) -> None:
    pytest.importorskip("lycoris")
    cell = make_sd3(NETWORK)
    cell(*STEPS, "--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=2")
    weights = cell.weights()
    layers = {name.split(".")[0] for name in weights}
    blocks = {name.split(".")[0] for name in names_of("sd3_medium_mmdit", 23, 2)}
    assert layers >= {name for name in blocks if "attn_qkv" in name or "mlp_fc1" in name}
    started_at_zero = [tensor for name, tensor in weights.items() if "x_block" in name and name.endswith("lokr_w2_b")]
    assert started_at_zero
    assert all(tensor.any() for tensor in started_at_zero)


# whole models


MODELS = {
    "a file": ("sd3", ()),
    "3.5": ("sd3.5", ()),
    "a folder": ("sd3 folder", ()),
    "encoders of their own": ("sd3 without encoders", ENCODERS),
    "without T5": ("sd3 without t5", ()),
}
"""A model, and the parts that come from files of their own."""


@pytest.mark.parametrize("script", [NETWORK, FULL])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_form_train_and_are_written_whole(
    make_sd3: MakeSd3Cell, sd3_models: dict[str, Path], name: str, script: str
) -> None:
    model, separate = MODELS[name]
    given = [word for part in separate for word in (f"--{part}", str(sd3_models[part]))]
    cell = make_sd3(script, model)
    cell(*STEPS, *given, *(("--train_text_encoder", "--save_clip", "--save_t5xxl") if script == FULL else ()))
    if script == NETWORK:
        assert {key.split("_")[1] for key in cell.weights()} == {"unet", "te1", "te2"}
        return
    before = parts_of(sd3_models[model], **{part: sd3_models[part] for part in separate})
    after = parts_of(cell.output / "run.safetensors")
    assert after.keys() == {"unet", "vae", *ENCODERS} - ({"t5xxl"} if name == "without T5" else set())
    assert moved(before, after) == {"unet", "clip_l", "clip_g"}
    variant = "5-medium" if model == "sd3.5" else "medium"
    parts = [part for part in ("vae", *ENCODERS) if part in after]
    wanted = {key for key in tiny_sd3.single_tensors(variant, parts) if "logit_scale" not in key}
    weights = cell.weights()
    assert weights.keys() == wanted
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


SAVED: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "transformer and autoencoder": ((), set()),
    "CLIP, too": (("--save_clip",), {"clip_l", "clip_g"}),
    "T5, too": (("--save_t5xxl",), {"t5xxl"}),
    "what is trained": (("--train_text_encoder", "--learning_rate_te2", "0", "--save_t5xxl"), {"clip_l", "t5xxl"}),
}


@pytest.mark.parametrize("name", SAVED)
def test_files_hold_the_encoders_that_are_wanted_or_trained(make_sd3: MakeSd3Cell, name: str) -> None:
    more, encoders = SAVED[name]
    cell = make_sd3(FULL)
    cell(*STEPS, *more, *CACHED, "--save_precision", "fp16")
    weights = cell.weights()
    found = {key.split(".")[1] for key in weights if key.startswith("text_encoders.")}
    assert found == encoders
    assert {key.split(".")[0] for key in weights} == (
        {"model", "first_stage_model"} | ({"text_encoders"} if encoders else set())
    )
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize("model", ["sd3", "sd3.5"])
def test_the_last_blocks_stay_as_they_are(make_sd3: MakeSd3Cell, sd3_models: dict[str, Path], model: str) -> None:
    """Both streams of them, and nothing else."""
    cell = make_sd3(FULL, model)
    cell(*STEPS, *CACHED, "--num_last_block_to_freeze", "1", "--optimizer_args", "weight_decay=0.5")
    before, after = load_file(sd3_models[model]), cell.weights()
    same = {key for key, tensor in after.items() if tensor.equal(before[key])}
    last = "model.diffusion_model.joint_blocks.1."
    assert {key for key in after if key.startswith(last)} <= same
    rest = {key for key in same if key.startswith("model.diffusion_model.") and not key.startswith(last)}
    assert rest == {"model.diffusion_model.pos_embed"}


@pytest.mark.parametrize("model", ["sd3", "sd3.5"])
def test_a_trained_model_says_the_same_in_diffusers(make_sd3: MakeSd3Cell, model: str) -> None:
    """By the conversion of Diffusers itself."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    cell = make_sd3(FULL, model)
    cell(*STEPS, *CACHED)
    path = cell.output / "run.safetensors"
    ours = load_mmdit(Sd3Files(path)).eval()
    given = inputs()
    other = tiny_sd3.diffusers_mmdit(ours)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(cell.weights())
    other.load_state_dict({key: tensor for key, tensor in theirs.items() if key in other.state_dict()}, strict=True)
    with torch.no_grad():
        found = other(
            hidden_states=given["x"],
            encoder_hidden_states=given["context"],
            pooled_projections=given["pooled"],
            timestep=given["timesteps"],
        ).sample
        torch.testing.assert_close(found, ours(**given), rtol=1e-4, atol=1e-4)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 16, 8, 8, generator=generator),
        "timesteps": torch.tensor([250.0, 917.0]),
        "context": torch.randn(2, 9, tiny_sd3.CONTEXT_WIDTH, generator=generator),
        "pooled": torch.randn(2, tiny_sd3.L_WIDTH + tiny_sd3.G_WIDTH, generator=generator),
    }
