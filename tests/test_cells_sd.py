"""Networks for SD 1.x, SD 2.x and SDXL by their scripts, on tiny models."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.files import header
from library.models.loading_sd import load_encoders, load_unet
from library.train import loop
from networks import lora
from tests.cells import assert_same, read_json, write_images
from tests.cells_sd import CACHED, LORA, SIZES, MakeSdCell, SdCell, write_models
from tests.test_cells import StopAt, _stop_at

__all__ = ["_stop_at"]

SCRIPTS = {"sd1": "train_network", "sd2": "train_network", "sdxl": "sdxl_train_network"}
ENCODERS = {"sd1": ("te",), "sd2": ("te",), "sdxl": ("te1", "te2")}


@pytest.fixture(scope="session")
def sd_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("sd_models"))


@pytest.fixture
def sd_images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "画像 data" / "3_thing", SIZES).parent


@pytest.fixture
def make(sd_models: dict[str, Path], sd_images: Path, tmp_path: Path) -> MakeSdCell:
    """Makes a cell of a model."""

    def made(model: str, folder: str = "out", *more: str) -> SdCell:
        script = SCRIPTS[model.split()[0]]
        options = (*LORA, *more)
        return SdCell(script, sd_models[model], sd_models["tokenizers"], sd_images, tmp_path / folder, options)

    return made


STEPS = ("--max_train_steps", "3")
WEIGHTS = ("--min_snr_gamma", "5", "--debiased_estimation_loss")
RUNS = {
    "sd1": ("sd1", ()),
    "sd1, cached": ("sd1", CACHED),
    "sd1, long weighted captions, an earlier layer": (
        "sd1",
        ("--clip_skip", "2", "--max_token_length", "150", "--weighted_captions", "--cache_latents"),
    ),
    "sd1, noise": (
        "sd1",
        (
            "--noise_offset",
            "0.1",
            "--adaptive_noise_scale",
            "0.01",
            "--ip_noise_gamma",
            "0.1",
            "--v_pred_like_loss",
            "1",
        ),
    ),
    "sd1, a folder": ("sd1 folder", ("--multires_noise_iterations", "3", "--loss_type", "huber")),
    "sd2, velocity down to pure noise": (
        "sd2",
        ("--v2", "--v_parameterization", "--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred", *WEIGHTS),
    ),
    "sdxl": ("sdxl", (*WEIGHTS, "--loss_type", "smooth_l1", "--huber_schedule", "exponential")),
    "sdxl, cached": ("sdxl", (*CACHED, "--network_train_unet_only")),
    "sdxl, cached but for what is trained": ("sdxl", (*CACHED, "--text_encoder_lr", "0", "1e-3")),
    "sdxl, 225 tokens": ("sdxl", ("--max_token_length", "225", "--weighted_captions", *CACHED)),
    "sdxl, half precision": ("sdxl", ("--mixed_precision", "bf16", "--no_half_vae", "--fp8_base_unet", "--sdpa")),
    "sdxl, convolutions": ("sdxl", ("--network_args", "conv_dim=2", "--min_timestep", "200", "--max_timestep", "600")),
    "sdxl, a folder": ("sdxl folder", ("--alpha_mask", "--cache_latents")),
}
"""A model, and options."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_its_file_loads_back(make: MakeSdCell, sd_models: dict[str, Path], name: str) -> None:
    model, more = RUNS[name]
    cell = make(model)
    cell(*STEPS, *more)
    weights = cell.weights()
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for key, tensor in weights.items() if key.endswith("lora_up.weight"))
    role = "sdxl" if model.startswith("sdxl") else "sd"
    unet, encoders = load_unet(sd_models[model], role=role), load_encoders(sd_models[model], role=role)
    network, _ = lora.create_network_from_weights(
        1.0, cell.output / "run.safetensors", None, [*encoders.values()], unet
    )
    network.apply_to()
    network.load_weights(cell.output / "run.safetensors")
    assert_same(dict(network.state_dict()), weights)


@pytest.mark.parametrize("model", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_resuming_twice_is_the_same_as_running_straight(make: MakeSdCell, model: str) -> None:
    common = ("--max_train_steps", "6", "--lr_scheduler", "cosine", "--network_dropout", "0.1", "--noise_offset", "0.1")
    straight, broken = make(model, "straight"), make(model, "broken")
    straight(*common, "--save_state_on_train_end")
    for steps in (2, 5, 6):
        StopAt.step = steps
        resume = ("--resume", "auto") if steps > 2 else ()
        broken(*common, "--save_every_n_steps", str(steps), "--save_state", *resume)
    assert_same(straight.weights(), broken.weights())
    one, other = (load_file(cell.output / "run-state" / "optimizer.safetensors") for cell in (straight, broken))
    assert_same(one, other)


class Fed:
    """Notes what goes into the model by name of the image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        prepare = loop.task_of

        def noting(run: Any, batch: Any) -> loop.Task:
            inputs = {"latents": run.latents(batch), **run.cond(batch)}
            for row, name in enumerate(batch.names):
                self.tensors[Path(name).name] = {key: tensor[row].clone() for key, tensor in inputs.items()}
            return prepare(run, batch)

        monkeypatch.setattr(loop, "task_of", noting)

    def take(self) -> dict[str, dict[str, Tensor]]:
        found, self.tensors = self.tensors, {}
        return found


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_what_is_cached_is_what_is_encoded_on_the_spot(
    make: MakeSdCell, sd_images: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (sd_images / "3_thing").rename(sd_images / "1_thing")
    fed, disk = Fed(monkeypatch), ("--cache_latents_to_disk", "--cache_text_encoder_outputs")
    disk += ("--cache_text_encoder_outputs_to_disk",) if model == "sdxl" else ()
    found = []
    for number, more in enumerate(((), CACHED, disk, disk)):
        make(model, f"out{number}")("--max_train_epochs", "1", "--network_train_unet_only", *more)
        found.append(fed.take())
    assert len(found[0]) == 5
    for cached in found[1:]:
        for name, tensors in found[0].items():
            assert_same(cached[name], tensors)
    folder = sd_images / "1_thing"
    with np.load(folder / f"i2_0128x0064_{model.rstrip('1')}.npz") as arrays:
        assert arrays["latents"].shape == (4, 8, 16)
        scale = {"sd1": 0.18215, "sdxl": 0.13025}[model]
        assert torch.equal(torch.from_numpy(arrays["latents"]) * scale, found[0]["i2.png"]["latents"])
    assert len(list(folder.glob("*_te_outputs.npz"))) == (5 if model == "sdxl" else 0)
    assert ("sizes" in found[0]["i2.png"]) == (model == "sdxl")
    if model == "sdxl":
        assert found[0]["i2.png"]["sizes"].tolist() == [64, 128, 0, 0, 64, 128]


@pytest.mark.parametrize("model", ["sd2", "sdxl"])
def test_samples_are_the_same_twice_and_change_nothing(make: MakeSdCell, tmp_path: Path, model: str) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ["a cat --w 72 --h 64 --s 2 --d 1 --n a dog", "a dog --w 64 --h 64 --s 2 --d 2 --l 1 --ss euler"]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    more = ("--cache_latents", "--cache_text_encoder_outputs", "--text_encoder_lr", "0") if model == "sdxl" else ()
    plain = make(model, "plain", *more)
    plain(*STEPS)
    pictures = []
    for folder in ("one", "two"):
        cell = make(model, folder, *more)
        cell(*STEPS, "--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--sample_at_first")
        assert_same(plain.weights(), cell.weights())
        files = sorted((cell.output / "sample").glob("run_0*.png"))
        assert [Image.open(file).size for file in files] == [(72, 64), (64, 64)] * 2
        pictures.append([np.asarray(Image.open(file)) for file in files])
    assert all(np.array_equal(one, two) for one, two in zip(*pictures, strict=True))
    assert not np.array_equal(pictures[0][0], pictures[0][2])


# needs A5: what is trained

RATES = {"given": "1e-2", "zero": "0", "absent": None}


def combinations(model: str) -> list[tuple[str, ...]]:
    return list(itertools.product(RATES, repeat=1 + len(ENCODERS[model])))


def trained_by(model: str, rates: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """The options of some rates, of the U-Net and of each encoder; and the parts that they train.

    Rates of encoders are one list, so that one that is absent stands for its neighbour's: of two, the first counts for
    both, and only all may be absent.
    """
    denoiser, *encoders = rates
    options = [] if denoiser == "absent" else ["--unet_lr", str(RATES[denoiser])]
    given = [str(RATES[rate]) for rate in encoders if rate != "absent"]
    options += ["--text_encoder_lr", *given] if given else []
    spread = [*given, *given[-1:] * len(encoders)][: len(encoders)] if given else ["1e-3"] * len(encoders)
    parts = {name for name, rate in zip(ENCODERS[model], spread, strict=True) if float(rate)}
    return options, parts | (set() if denoiser == "zero" else {"unet"})


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        pytest.param(model, rates, marks=() if rates in set(combinations(model)[::4]) else pytest.mark.slow)
        for model in ("sd1", "sdxl")
        for rates in combinations(model)
    ],
)
def test_a5_exactly_what_the_table_calls_trained_is_trained(
    make: MakeSdCell, caplog: pytest.LogCaptureFixture, model: str, rates: tuple[str, ...]
) -> None:
    options, trained = trained_by(model, rates)
    cell = make(model)
    caplog.set_level(logging.INFO)
    if not trained:
        with pytest.raises(SystemExit):
            cell(*STEPS, *options)
        return
    cell("--max_train_steps", "2", *options)
    (table,) = (message for message in caplog.messages if message.startswith("trained\n"))
    rows = [line.split() for line in table.splitlines()[2:]]
    names = {"text_encoder": ENCODERS[model][0], "text_encoder_2": ENCODERS[model][-1], "unet": "unet"}
    assert {names[row[0]] for row in rows if "frozen" not in row} == trained
    weights = cell.weights()
    assert {key.split("_")[1] for key in weights} == trained
    for part in trained:
        moved = [
            key for key, tensor in weights.items() if key.split("_")[1] == part and "lora_up" in key and tensor.any()
        ]
        assert moved, part


@pytest.mark.parametrize(("model", "more", "part"), [("sdxl", (), "te1"), ("sd1", ("--clip_skip", "2"), "te")])
def test_layers_without_effect_are_left_alone(make: MakeSdCell, model: str, more: tuple[str, ...], part: str) -> None:
    found = []
    for steps in ("1", "3"):
        cell = make(model, steps, *more)
        cell("--max_train_steps", steps, "--optimizer_args", "weight_decay=0.5")
        found.append(cell.weights())
    for layer, same in ((0, False), (1, True)):
        name = f"lora_{part}_text_model_encoder_layers_{layer}_mlp_fc1.lora_down.weight"
        assert found[0][name].equal(found[1][name]) == same


# needs A10: what the model predicts


def test_a10_what_the_model_says_of_itself_counts(make: MakeSdCell, caplog: pytest.LogCaptureFixture) -> None:
    told, silent, other = make("sdxl v", "told"), make("sdxl v", "silent"), make("sdxl", "other")
    told(*STEPS, "--v_parameterization", "--zero_terminal_snr")
    caplog.clear()
    silent(*STEPS)
    assert any("predicts velocity, and was trained down to pure noise" in message for message in caplog.messages)
    other(*STEPS)
    assert_same(told.weights(), silent.weights())
    with pytest.raises(AssertionError):
        assert_same(silent.weights(), other.weights())
    metadata = header(silent.output / "run.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == "True"


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("sdxl v", "--no_v_parameterization", "predicts velocity, as its tensor v_pred says, and not noise"),
        ("sd1 folder", "--v_parameterization", "predicts noise, as its scheduler_config.json says, and not velocity"),
        ("sd1", "--v2", "is an SD 1.x checkpoint, not one of SD 2.x"),
        ("sd2", "--no_v2", "is an SD 2.x checkpoint, not one of SD 1.x"),
        ("sdxl", "--v2", "sdxl_train_network.py is for SDXL"),
        ("sd1", "--clip_skip=3", "the text encoder has 2 layers"),
        ("sd1", "--scale_v_pred_loss_like_noise_pred", "for models that predict velocity"),
        ("sd1", "--cache_text_encoder_outputs_to_disk", "no such files for Stable Diffusion"),
    ],
)
def test_contradictions_are_said_before_anything_is_loaded(
    make: MakeSdCell, capsys: pytest.CaptureFixture[str], model: str, more: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        make(model)(*STEPS, more)
    assert ended.value.code
    assert said in capsys.readouterr().err


def test_masks_hide_what_they_cover(make: MakeSdCell, sd_images: Path, tmp_path: Path) -> None:
    """What is under the mask makes no difference to the gradient, cached or not."""
    folder = sd_images / "3_thing"
    masks = tmp_path / "masks"
    masks.mkdir()
    for image in folder.glob("*.png"):
        with Image.open(image) as picture:
            Image.new("RGB", picture.size, "black").save(masks / image.name)
    config = {
        "datasets": [
            {
                "resolution": 96,
                "enable_bucket": True,
                "min_bucket_reso": 64,
                "max_bucket_reso": 128,
                "subsets": [
                    {"image_dir": str(folder), "conditioning_data_dir": str(masks), "caption_extension": ".txt"},
                ],
            }
        ]
    }
    (tmp_path / "data.json").write_text(json.dumps(config), encoding="utf-8")
    for cached in ((), ("--cache_latents",)):
        cell = make("sdxl", f"out{len(cached)}", "--dataset_config", str(tmp_path / "data.json"), "--masked_loss")
        cell(*STEPS, "--optimizer_type", "SGDNesterov", "--optimizer_args", "momentum=0.9", *cached)
        assert not any(tensor.any() for key, tensor in cell.weights().items() if key.endswith("lora_up.weight"))


# what saves memory

SAVING = {
    "recomputed": ("--gradient_checkpointing",),
    "each third block recomputed, inputs in main memory": (
        *("--gradient_checkpointing", "--checkpoint_every_n_blocks", "3", "--cpu_offload_checkpointing"),
    ),
    "some blocks streamed": ("--blocks_to_swap", "7"),
    "all blocks streamed": ("--blocks_to_swap", "999", "--gradient_checkpointing"),
    "attention by name": ("--attn_mode", "torch"),
}


@pytest.mark.parametrize("model", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_what_saves_memory_changes_nothing(make: MakeSdCell, model: str) -> None:
    plain, saving = make(model, "plain"), make(model, "saving")
    plain("--max_train_steps", "2", *CACHED)
    for more in SAVING.values():
        saving("--max_train_steps", "2", *CACHED, *more)
        assert_same(plain.weights(), saving.weights())


# metadata


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_files_say_how_they_were_made(make: MakeSdCell, sd_models: dict[str, Path], golden: Any, model: str) -> None:
    more = ("--v_parameterization",) if model == "sd2" else ()
    vae = ("--vae", str(sd_models["sdxl folder"] / "vae")) if model == "sdxl" else ()
    clip_skip = () if model == "sdxl" else ("--clip_skip", "2")
    cell = make(model)
    cell("--max_train_steps", "1", "--min_snr_gamma", "5", "--noise_offset", "0.05", *more, *vae, *clip_skip)
    found = header(cell.output / "run.safetensors").metadata
    changing = ("session_id", "started_at", "finished_at", "commit_hash", "modelspec.date", "model_hash", "legacy_hash")
    kept = {name: value for name, value in found.items() if not name.endswith(changing)}
    golden(f"metadata_{model}.json", dict(sorted(kept.items())))


@pytest.mark.parametrize("model", ["sd2"])
def test_little_is_said_where_no_more_is_wanted(make: MakeSdCell, model: str) -> None:
    cell = make(model)
    cell("--max_train_steps", "1", "--no_metadata")
    found = header(cell.output / "run.safetensors").metadata
    facts = {name: value for name, value in found.items() if name.startswith("ss_")}
    assert facts == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
    }


# several processes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_two_processes_give_the_weights_of_one(make: MakeSdCell, sd_images: Path, model: str) -> None:
    for name in ("i2", "i3"):
        (sd_images / "3_thing" / f"{name}.png").unlink()
    (sd_images / "3_thing").rename(sd_images / "4_thing")
    # a large eps: norms of two channels at a single pixel, as the lowest level has here, make much of a little rounding
    common = (
        "--max_train_steps",
        "4",
        "--max_grad_norm",
        "0.5",
        "--optimizer_args",
        "eps=1e-2",
        "--noise_offset",
        "0.1",
    )
    one, two = make(model, "one"), make(model, "two")
    one(*common, "--train_batch_size", "2")
    two.launch(2, *common, "--train_batch_size", "1", "--save_state")
    weights = two.weights()
    distances = {name: float((tensor - weights[name]).abs().max()) for name, tensor in one.weights().items()}
    assert max(distances.values()) < 1e-6, distances
    assert read_json(two.output / "run-state" / "train_state.json")["current_step"] == 4


# tools


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_caches_of_the_tools_are_those_that_the_training_wants(
    make: MakeSdCell, sd_models: dict[str, Path], caplog: pytest.LogCaptureFixture, model: str
) -> None:
    from tools import cache_latents, cache_text_encoder_outputs

    cell = make(model, "out", "--network_train_unet_only")
    named = ("--sdxl",) if model == "sdxl" else ()
    at = cell.argv.index("--learning_rate")
    options = [*cell.argv[:at], *cell.argv[at + 2 : cell.argv.index("--network_module")], "--max_token_length", "150"]
    cache_latents.main([*options, *named])
    more = ["--max_token_length", "150", "--cache_latents_to_disk", "--cache_text_encoder_outputs"]
    if model == "sdxl":
        cache_text_encoder_outputs.main([*options, *named])
        more += ["--cache_text_encoder_outputs_to_disk"]
    else:
        with pytest.raises(SystemExit):
            cache_text_encoder_outputs.main(options)
    caplog.clear()
    caplog.set_level(logging.INFO)
    cell("--max_train_steps", "1", *more)
    reused = [message for message in caplog.messages if "5 reused, 0 encoded" in message]
    assert len(reused) == (2 if model == "sdxl" else 1), caplog.messages
