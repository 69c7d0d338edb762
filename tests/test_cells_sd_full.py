"""Fine-tuning and DreamBooth of SD 1.x, SD 2.x and SDXL by their scripts, on tiny models."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from library.files import header
from library.models.loading_sd import load_encoders, load_unet, load_vae
from tests.cells import assert_same, read_json, write_images
from tests.cells_sd import SIZES, SdCell, write_models
from tests.test_cells import StopAt, _stop_at

__all__ = ["_stop_at"]

BOTH = "--train_text_encoder"


@pytest.fixture(scope="module")
def sd_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("sd_models"))


@pytest.fixture
def sd_images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "画像 data" / "3_thing", SIZES).parent


@pytest.fixture
def make(sd_models: dict[str, Path], sd_images: Path, tmp_path: Path) -> Any:
    """Makes a cell of a script and a model."""

    def made(script: str, model: str, folder: str = "out", *more: str) -> SdCell:
        return SdCell(script, sd_models[model], sd_models["tokenizers"], sd_images, tmp_path / folder, more)

    return made


STEPS = ("--max_train_steps", "2")


def parts_of(path: Path, role: str) -> dict[str, dict[str, Tensor]]:
    """All weights of a checkpoint by part, read by what also loads base models."""
    parts: dict[str, nn.Module] = {"unet": load_unet(path, role=role)}  # type: ignore[arg-type]
    parts |= load_encoders(path, role=role)  # type: ignore[arg-type]
    parts["vae"] = load_vae(path, role=role)  # type: ignore[arg-type]
    return {name: part.state_dict() for name, part in parts.items()}


def moved(before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
    """Parts of which anything is another."""
    assert before.keys() == after.keys()
    assert all(before[part].keys() == after[part].keys() for part in before)
    return {
        part
        for part, tensors in before.items()
        if any(not tensor.equal(after[part][name]) for name, tensor in tensors.items())
    }


RUNS = {
    "dreambooth": ("train_db", "sd1", (), {"unet", "text_encoder"}),
    "dreambooth, the encoder never": ("train_db", "sd1", ("--stop_text_encoder_training", "-1"), {"unet"}),
    "dreambooth, the encoder at no rate": ("train_db", "sd1", ("--learning_rate_te", "0"), {"unet"}),
    "dreambooth, only the encoder": (
        *("train_db", "sd1", ("--learning_rate", "0", "--learning_rate_te", "1e-3"), {"text_encoder"}),
    ),
    "dreambooth, a folder": (
        "train_db",
        "sd1 folder",
        ("--no_token_padding", "--cache_latents"),
        {"unet", "text_encoder"},
    ),
    "dreambooth, velocity": (
        *("train_db", "sd2", ("--v2", "--v_parameterization", "--zero_terminal_snr"), {"unet", "text_encoder"}),
    ),
    "tuning": ("fine_tune", "sd1", (), {"unet"}),
    "tuning, the encoder": (
        *("fine_tune", "sd1", (BOTH, "--learning_rate_te", "1e-4", "--clip_skip", "2"), {"unet", "text_encoder"}),
    ),
    "tuning, cached": ("fine_tune", "sd1", ("--cache_latents", "--cache_text_encoder_outputs"), {"unet"}),
    "sdxl": ("sdxl_train", "sdxl", ("--weighted_captions",), {"unet"}),
    "sdxl, all": ("sdxl_train", "sdxl", (BOTH,), {"unet", "text_encoder", "text_encoder_2"}),
    "sdxl, uphill": ("sdxl_train", "sdxl", ("--learning_rate", "-1e-3"), {"unet"}),
    "sdxl, the first encoder": (
        *("sdxl_train", "sdxl", ("--learning_rate", "0", BOTH, "--learning_rate_te1", "1e-3"), {"text_encoder"}),
    ),
    "sdxl, the second encoder": (
        "sdxl_train",
        "sdxl folder",
        (BOTH, "--learning_rate_te1", "0", "--cache_text_encoder_outputs", "--gradient_checkpointing"),
        {"unet", "text_encoder_2"},
    ),
    "sdxl, half precision": (
        "sdxl_train",
        "sdxl v",
        ("--mixed_precision", "bf16", "--full_bf16", "--cache_latents", "--cache_text_encoder_outputs", BOTH),
        {"unet", "text_encoder", "text_encoder_2"},
    ),
    "sdxl, blocks": (
        "sdxl_train",
        "sdxl",
        ("--block_lr", ",".join(["1e-3"] * 10 + ["0"] * 13), "--optimizer_type", "Adafactor", "--fused_backward_pass"),
        {"unet"},
    ),
}
"""Script, model, options, and the parts that are trained."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_moves_what_its_table_says_and_its_model_loads_back(
    make: Any, sd_models: dict[str, Path], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    script, model, more, trained = RUNS[name]
    cell = make(script, model)
    caplog.set_level(logging.INFO)
    cell(*STEPS, *more)
    (table,) = (message for message in caplog.messages if message.startswith("trained\n"))
    rows = [line.split() for line in table.splitlines()[2:]]
    assert {row[0] for row in rows if "frozen" not in row} == trained
    role = "sdxl" if model.startswith("sdxl") else "sd"
    saved = cell.output / ("run" if model.endswith("folder") else "run.safetensors")
    after = parts_of(saved, role)
    assert moved(parts_of(sd_models[model], role), after) == trained
    assert all(tensor.isfinite().all() for part in after.values() for tensor in part.values())


def test_frozen_blocks_stay_and_each_has_its_rate_in_the_logs(
    make: Any, sd_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.train import trackers

    seen: list[str] = []
    rates = trackers.learning_rates
    monkeypatch.setattr(
        "library.observing.learning_rates", lambda *all_of_it: [seen.extend(found := rates(*all_of_it)), found][1]
    )
    cell = make("sdxl_train", "sdxl")
    cell(*STEPS, "--block_lr", ",".join(["0", "1e-3", *["0"] * 20, "1e-4"]), "--logging_dir", str(cell.output / "logs"))
    assert set(seen) == {"lr/block1", "lr/block22"}
    before, after = (load_unet(path, role="sdxl").state_dict() for path in (sd_models["sdxl"], saved(cell)))
    changed = {name.split(".")[0] for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed == {"conv_in", "conv_norm_out", "conv_out"}


def saved(cell: SdCell, name: str = "run.safetensors") -> Path:
    return cell.output / name


# formats

FORMATS = [
    ("train_db", "sd1", "ckpt", "run.ckpt"),
    ("train_db", "sd1", "diffusers", "run"),
    ("fine_tune", "sd2", "diffusers_safetensors", "run"),
    ("sdxl_train", "sdxl", "ckpt", "run.ckpt"),
    ("sdxl_train", "sdxl", "diffusers_safetensors", "run"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "model", "kind", "name"), FORMATS)
def test_every_format_holds_the_same_and_loads(
    make: Any, sd_models: dict[str, Path], script: str, model: str, kind: str, name: str
) -> None:
    common = ("--max_train_steps", "1", *(() if script == "train_db" else (BOTH,)))
    plain, cell = make(script, model, "plain", *common), make(script, model, "kind", *common)
    plain("--save_model_as", "safetensors")
    cell("--save_model_as", kind, "--ema_decay", "0.5")
    role, path = "sdxl" if model == "sdxl" else "sd", saved(cell, name)
    first, second = parts_of(saved(plain), role), parts_of(path, role)
    assert not moved(first, second)
    average = path.with_name(path.name.replace("run", "run-ema"))
    assert moved(first, parts_of(average, role)) == first.keys() - {"vae"}
    for of, file in ((first, saved(plain)), (second, path)):
        if file.is_dir() or model != "sd2":  # of which there is no folder here to take the configuration from
            assert_same(unet_in_diffusers(file, sd_models, model), of["unet"])
    if kind == "ckpt":
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == 1
    assert header(saved(plain)).metadata["modelspec.title"] == "run"


def unet_in_diffusers(path: Path, sd_models: dict[str, Path], model: str) -> dict[str, Tensor]:
    """The U-Net of a folder's pipeline, or of a file, as Diffusers loads it by itself."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    if path.is_dir():
        kind = StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline
        return dict(kind.from_pretrained(str(path), local_files_only=True).unet.state_dict())
    config = str(sd_models[f"{model} folder"])
    unet = UNet2DConditionModel.from_single_file(str(path), config=config, subfolder="unet", local_files_only=True)
    return dict(unet.state_dict())


def test_the_precision_of_files_is_that_of_the_option(make: Any) -> None:
    cell = make("train_db", "sd1")
    cell(*STEPS, "--save_precision", "bf16")
    assert {info.dtype for info in header(saved(cell)).tensors.values() if info.dtype.startswith(("F", "B"))} == {
        "BF16"
    }


def test_old_folders_go_and_none_is_left_half(make: Any) -> None:
    cell = make("fine_tune", "sd1 folder")
    cell("--max_train_steps", "4", "--save_every_n_steps", "1", "--save_last_n_steps", "1", "--ema_decay", "0.9")
    names = {path.name for path in cell.output.iterdir()}
    kept = {f"run-step{step:08d}{ending}" for step in (3, 4) for ending in ("", "-ema")}
    assert names - {"sample"} == kept | {"run", "run-ema"}
    for name in kept:
        assert parts_of(cell.output / name, "sd")


def test_folders_are_uploaded_as_such(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []

    class Api:
        def create_repo(self, **_: Any) -> None:
            pass

        def upload_folder(self, *, folder_path: str, path_in_repo: str, **_: Any) -> None:
            assert (Path(folder_path) / "model_index.json").is_file()
            sent.append((Path(folder_path).name, path_in_repo))

    monkeypatch.setattr("library.hub.connect", lambda token: Api())
    make("fine_tune", "sd1")(*STEPS, "--save_model_as", "diffusers", "--huggingface_repo_id", "me/model")
    assert sent == [("run", "run")]


# resuming

RESUMED = {
    "dreambooth, across the stop": ("train_db", "sd1", ("--stop_text_encoder_training", "2")),
    "dreambooth, stopped at the break": (
        "train_db",
        "sd1",
        ("--stop_text_encoder_training", "3", "--ema_decay", "0.9"),
    ),
    "tuning": ("fine_tune", "sd2", (BOTH, "--noise_offset", "0.1")),
    "sdxl": ("sdxl_train", "sdxl", (BOTH, "--learning_rate_te2", "0", "--learning_rate_te1", "1e-4")),
    "sdxl, groups": ("sdxl_train", "sdxl", ("--fused_optimizer_groups", "3")),
}


LONGER = ("dreambooth, stopped at the break", "tuning", "sdxl, groups")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONGER else ()) for name in RESUMED]
)
def test_resuming_twice_is_the_same_as_running_straight(make: Any, name: str) -> None:
    script, model, more = RESUMED[name]
    common = ("--max_train_steps", "4", "--lr_scheduler", "cosine", "--cache_latents", *more)
    straight, broken = make(script, model, "straight"), make(script, model, "broken")
    straight(*common, "--save_state_on_train_end")
    for steps in (1, 3, 4):
        StopAt.step = steps
        resume = ("--resume", "auto") if steps > 1 else ()
        broken(*common, "--save_every_n_steps", str(steps), "--save_state", *resume)
    assert_same(straight.weights(), broken.weights())
    states = sorted((straight.output / "run-state").glob("*.safetensors"))
    assert any(path.stem.startswith("optimizer") for path in states)
    for path in states:
        if not path.stem.startswith("rng"):
            assert_same(load_file(path), load_file(broken.output / "run-state" / path.name))


def test_the_text_encoder_stands_still_after_its_last_step(make: Any) -> None:
    cell = make("train_db", "sd1")
    cell("--max_train_steps", "4", "--save_every_n_steps", "1", "--stop_text_encoder_training", "2")
    steps = [parts_of(saved(cell, f"run-step{step:08d}.safetensors"), "sd") for step in (1, 2, 3, 4)]
    changes = [moved(one, other) for one, other in pairwise(steps)]
    assert changes == [{"unet", "text_encoder"}, {"unet"}, {"unet"}]


# what saves memory

SAVING = {
    "groups": ("--fused_optimizer_groups", "5"),
    "each parameter alone": ("--fused_backward_pass",),
    "recomputed": ("--gradient_checkpointing", "--checkpoint_every_n_blocks", "2"),
    "streamed": ("--blocks_to_swap", "7", "--fused_backward_pass"),
}


@pytest.mark.parametrize("name", SAVING)
def test_what_saves_memory_changes_nothing(make: Any, name: str) -> None:
    common = ("--max_grad_norm", "0", BOTH, "--learning_rate_te1", "1e-4", *STEPS)
    plain, saving = make("sdxl_train", "sdxl", "plain"), make("sdxl_train", "sdxl", "saving")
    plain(*common)
    saving(*common, *SAVING[name])
    assert_same(plain.weights(), saving.weights())


# data


def test_regularization_images_count_as_told(make: Any, sd_images: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Need D13: they are counted, and weigh what the option says."""
    regular = sd_images.parent / "reg" / "1_thing"
    regular.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 9, 9)).save(regular / f"r{number}.png")
    caplog.set_level(logging.INFO)
    weights = []
    for weight in ("1", "0.5"):
        cell = make("train_db", "sd1", f"out{weight}", "--cache_latents", "--train_batch_size", "2", *STEPS)
        cell("--reg_data_dir", str(regular.parent), "--prior_loss_weight", weight)
        weights.append(cell.weights())
    assert any("regularization" in message for message in caplog.messages)
    with pytest.raises(AssertionError):
        assert_same(*weights)


def test_metadata_files_with_captions(make: Any, sd_images: Path, tmp_path: Path) -> None:
    folder = sd_images / "3_thing"
    content = {str(path): {"caption": "a thing", "tags": "one, two"} for path in sorted(folder.glob("*.png"))}
    (tmp_path / "meta.json").write_text(json.dumps(content), encoding="utf-8")
    cell = make("fine_tune", "sd1")
    cell(*STEPS, "--train_data_dir", str(folder), "--in_json", str(tmp_path / "meta.json"), "--dataset_repeats", "2")
    assert all(tensor.isfinite().all() for tensor in cell.weights().values())


def test_captions_that_are_not_filled_up_say_something_else(make: Any) -> None:
    padded, short = make("train_db", "sd1", "padded", *STEPS), make("train_db", "sd1", "short", *STEPS)
    padded()
    short("--no_token_padding")
    with pytest.raises(AssertionError):
        assert_same(padded.weights(), short.weights())


@pytest.mark.parametrize(
    ("script", "model", "more", "said"),
    [
        ("train_db", "sd1", "--no_token_padding --train_batch_size 2", "no batch of 2 images"),
        ("train_db", "sdxl", "", "SDXL"),
        ("sdxl_train", "sdxl", "--v2", "sdxl_train.py is for SDXL"),
        ("sdxl_train", "sdxl", "--block_lr 1,2", "2 rates for 23 blocks"),
        ("sdxl_train", "sdxl", "--learning_rate 0", "nothing would be trained"),
        ("fine_tune", "sd1", "--int8_base", "can't be held in so few bits"),
        ("fine_tune", "sd1", "--cache_text_encoder_outputs_to_disk", "no such files"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    make: Any, capsys: pytest.CaptureFixture[str], script: str, model: str, more: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        make(script, model)(*STEPS, *more.split())
    assert ended.value.code
    assert said in capsys.readouterr().err


# several processes


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(make: Any, sd_images: Path) -> None:
    for name in ("i2", "i3"):
        (sd_images / "3_thing" / f"{name}.png").unlink()
    (sd_images / "3_thing").rename(sd_images / "4_thing")
    common = ("--max_train_steps", "4", "--optimizer_type", "torch.optim.SGD", "--stop_text_encoder_training", "2")
    common += ("--optimizer_args", "momentum=0.9")
    one, two = make("train_db", "sd1", "one"), make("train_db", "sd1", "two")
    one(*common, "--train_batch_size", "2")
    two.launch(2, *common, "--train_batch_size", "1", "--save_state")
    weights = two.weights()
    distances = {
        name: float((tensor.float() - weights[name].float()).abs().max()) for name, tensor in one.weights().items()
    }
    assert max(distances.values()) < 1e-6, distances
    assert read_json(two.output / "run-state" / "train_state.json")["current_step"] == 4
