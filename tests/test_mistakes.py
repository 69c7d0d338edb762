"""Mistakes that people make: each ends with lines that name it, its place and a cure, and with the right exit code."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.cells import Cell, write_images

USAGE, DATA, RESOURCES = 2, 3, 4
LORA, FULL, INFERENCE = "flux_train_network", "flux_train", "flux_minimal_inference"
LATENTS, TEXTS, METADATA = "tools.cache_latents", "tools.cache_text_encoder_outputs", "tools.show_metadata"


@dataclass
class Place:
    """A folder with what the mistakes need, made once."""

    root: Path
    models: Mapping[str, Path]

    def text(self, name: str, content: str | bytes) -> str:
        """The path of a file with this content."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return str(path)

    def toml(self, content: str) -> str:
        """The path of a TOML file."""
        return self.text("made.toml", content)

    def argv(self, script: str) -> list[str]:
        """A right command line of a script."""
        models, output = self.models, self.root / "out"
        cell = Cell(script, dict(models), self.root / "train", output, ())
        if script in (LORA, FULL):
            network = ("--network_module", "networks.lora_flux", "--network_train_unet_only")
            return [*cell.argv, "--max_train_steps", "1", *(network if script == LORA else ())]
        if script in (LATENTS, TEXTS):
            end = cell.argv.index("--output_dir")
            return cell.argv[:end]
        if script == INFERENCE:
            files = [word for name in ("clip_l", "t5xxl", "ae") for word in (f"--{name}", str(models[name]))]
            files += ["--ckpt_path", str(models["flux"]), "--tokenizer_cache_dir", str(models["tokenizers"])]
            return [*files, "--output_dir", str(output), "--steps", "1", "--width", "64", "--height", "64"]
        return []


@pytest.fixture(scope="module")
def place(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("mistakes")
    write_images(root / "train" / "2_cat", [(64, 64), (64, 64)])
    write_images(root / "one more" / "2_cat", [(64, 64)])
    (root / "a file").write_bytes(b"x")
    (root / "empty").mkdir()
    (root / "broken" / "2_cat").mkdir(parents=True)
    shutil.copy(root / "train" / "2_cat" / "i0.txt", root / "broken" / "2_cat" / "i0.txt")
    (root / "broken" / "2_cat" / "i0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    (root / "half.safetensors").write_bytes(models["ae"].read_bytes()[:-1000])
    (root / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (root / "old.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 200)
    return Place(root, models)


Argv = Callable[[Place], list[str]]


def words(*argv: str) -> Argv:
    """A part of a command line; `{name}` stands for a path in the place."""
    return lambda place: [word.replace("{root}", str(place.root)) for word in argv]


def config(content: str, option: str = "--config_file") -> Argv:
    """A file for an option."""
    return lambda place: [option, place.toml(content.replace("{root}", place.root.as_posix()))]


def dataset(keys: str) -> Argv:
    """A dataset file with these lines in its one subset."""
    start = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/train/2_cat'\n"
    return config(f"{start}caption_extension = '.txt'\n{keys}", "--dataset_config")


MISTAKES: dict[str, tuple[str, Argv, int, str, tuple[str, ...]]] = {
    # the command line
    "misspelt option": (LORA, words("--netwrok_dim", "4"), USAGE, "E-OPTION", ("--netwrok_dim", "mean network_dim?")),
    "option of another script": (
        FULL,
        words("--network_dim", "4"),
        USAGE,
        "E-OPTION",
        ("--network_dim", "_network.py"),
    ),
    "space without quotes": (
        LORA,
        words("--output_dir", "D:/my", "models"),
        USAGE,
        "E-OPTION",
        ("'models'", '--output_dir "… models"'),
    ),
    "text for a number": (LORA, words("--learning_rate", "fast"), USAGE, "E-OPTION", ("--learning_rate", "1e-4")),
    "impossible choice": (LORA, words("--mixed_precision", "bf61"), USAGE, "E-OPTION", ("bf61", "mean bf16?")),
    "no value": (LORA, words("--seed"), USAGE, "E-OPTION", ("--seed", "give a value")),
    "seed too large": (LORA, words("--seed", "99999999999"), USAGE, "E-OPTION", ("--seed", "4294967295 or less")),
    "batch of nothing": (LATENTS, words("--vae_batch_size", "0"), USAGE, "E-OPTION", ("--vae_batch_size", "1 or more")),
    "nothing to show": (METADATA, words(), USAGE, "E-OPTION", ("--model is missing", "safetensors file")),
    "feature to come": (LORA, words("--deepspeed"), USAGE, "E-LATER", ("--deepspeed", "later")),
    "not with FLUX": (LORA, words("--weighted_captions"), USAGE, "E-REFUSED", ("--weighted_captions", "FLUX can't")),
    "log file nowhere": (
        LORA,
        words("--console_log_file", "{root}/a file/x.log"),
        USAGE,
        "E-LOG-FILE",
        ("--console_log_file", "a folder that can be written"),
    ),
    # the config file
    "no config file": (LORA, words("--config_file", "{root}/no.toml"), USAGE, "E-CONFIG", ("no.toml", "--config_file")),
    "misspelt key": (LORA, config("seed = 1\nnetwrok_dim = 4"), USAGE, "E-CONFIG", ("toml:2", "network_dim?")),
    "no TOML": (LORA, config("seed = 1\noutput_name = me"), USAGE, "E-CONFIG", ("toml:2", "quotes")),
    "Windows path in TOML": (LORA, config('ae = "C:\\models\\ae"'), USAGE, "E-CONFIG", ("toml:1", "single quotes")),
    "foreign module": (LORA, config("optimizer_type = 'my.Adam'"), USAGE, "E-CUSTOM", ("my.Adam", "--allow_custom")),
    "option given in TOML": (LORA, config("seed = 1\n\nfull_bf16 = true"), USAGE, "E-CHECK", ("toml:3", "bf16")),
    # the dataset
    "no dataset": (LORA, words("--train_data_dir", ""), DATA, "E-DATA-NONE", ("no images", "--train_data_dir")),
    "leaf instead of parent": (
        LORA,
        words("--train_data_dir", "{root}/train/2_cat"),
        DATA,
        "E-DATA-FOLDER",
        ("2_cat", "give its parent: --train_data_dir"),
    ),
    "empty folder": (
        LATENTS,
        words("--train_data_dir", "{root}/empty"),
        DATA,
        "E-DATA-FOLDER",
        ("{root}/empty", "1_name"),
    ),
    "misspelt folder": (
        TEXTS,
        words("--train_data_dir", "{root}/trian"),
        DATA,
        "E-DATA-FOLDER",
        ("{root}/trian", "did you mean {root}/train?"),
    ),
    "file for a folder": (
        FULL,
        words("--train_data_dir", "{root}/train/2_cat/i0.png"),
        DATA,
        "E-DATA-FOLDER",
        ("i0.png is a file", "{root}/train"),
    ),
    "captions of another kind": (
        LORA,
        words("--caption_extension", ".caption"),
        DATA,
        "E-CAPTION-EXT",
        ("2_cat", "--caption_extension .txt"),
    ),
    "damaged picture": (
        LORA,
        words("--train_data_dir", "{root}/broken"),
        DATA,
        "E-IMAGE",
        ("i0.png", "--skip_bad_images"),
    ),
    "no resolution": (LORA, words("--resolution", ""), USAGE, "E-DATASET-CONFIG", ("--resolution", "width,height")),
    "small resolution": (
        LORA,
        words("--min_bucket_reso", "256", "--max_bucket_reso", "256"),
        USAGE,
        "E-DATASET-CONFIG",
        ("min_bucket_reso 256", "set min_bucket_reso to 64"),
    ),
    "odd bucket steps": (
        LORA,
        words("--bucket_reso_steps", "20"),
        USAGE,
        "E-BUCKET-STEP",
        ("bucket_reso_steps is 20", "set it to 16"),
    ),
    "no dataset file": (
        LORA,
        words("--dataset_config", "{root}/no.toml"),
        USAGE,
        "E-DATASET-CONFIG",
        ("no.toml", "check --dataset_config"),
    ),
    "misspelt dataset key": (LORA, dataset("num_repeat = 2"), USAGE, "E-DATASET-CONFIG", ("toml:6", "`num_repeats`?")),
    "dataset key of another type": (LORA, dataset("num_repeats = '2'"), USAGE, "E-DATASET-CONFIG", ("toml:6", "whole")),
    "dataset key out of place": (
        LORA,
        dataset("validation_split = 0.1"),
        USAGE,
        "E-DATASET-CONFIG",
        ("toml", "validation_split", "[[datasets]]"),
    ),
    # models
    "no model": (LORA, words("--ae", ""), USAGE, "E-MODEL-NONE", ("--ae", "give --ae FILE")),
    "no such model": (FULL, words("--t5xxl", "{root}/no"), DATA, "E-FILE-MISSING", ("--t5xxl", "check the spelling")),
    "quotes in a path": (LORA, words("--ae", '"ae"'), DATA, "E-FILE-MISSING", ("--ae", "write it without them")),
    "tokenizer nowhere": (
        INFERENCE,
        lambda place: [*alone(place), "--tokenizer_cache_dir", str(place.root / "empty")],
        RESOURCES,
        "E-TOKENIZER",
        ("openai_clip-vit-large-patch14", "--tokenizer_cache_dir"),
    ),
    "no metadata": (METADATA, lambda place: ["--model", str(place.models["ae"])], DATA, "E-METADATA-NONE", ("ae.",)),
    "metadata of a torch file": (METADATA, words("--model", "{root}/old.ckpt"), DATA, "E-FILE-KIND", ("old.ckpt",)),
    # the network
    "no such module": (
        LORA,
        words("--network_module", "networks.lora_fluxx"),
        USAGE,
        "E-NETWORK-MODULE",
        ("--network_module networks.lora_fluxx", "check the spelling"),
    ),
    "unknown argument": (LORA, words("--network_args", "rnak=1"), USAGE, "E-NETWORK-ARGS", ("rnak", "there are")),
    "argument without a name": (LORA, words("--network_args", "1"), USAGE, "E-USAGE", ("--network_args", "such as")),
    "model for a network": (
        LORA,
        lambda place: ["--network_weights", str(place.models["ae"])],
        DATA,
        "E-MODEL-KIND",
        ("--network_weights", "is a FLUX.1 or SD3 autoencoder", "--ae"),
    ),
    "rank of nothing": (
        LORA,
        words("--dim_from_weights"),
        USAGE,
        "E-USAGE",
        ("--dim_from_weights", "--network_weights"),
    ),
    "model for a LoRA": (
        INFERENCE,
        lambda place: ["--lora_weights", f"{place.models['clip_l']};0.5"],
        DATA,
        "E-MODEL-KIND",
        ("--lora_weights", "give it as --clip_l"),
    ),
    "strength in words": (INFERENCE, words("--lora_weights", "a;b"), USAGE, "E-USAGE", ("--lora_weights", ";0.8")),
    "nothing trained": (FULL, words("--learning_rate", "0"), USAGE, "E-NOTHING", ("--learning_rate", "give a")),
    "too many rates": (
        LORA,
        words("--text_encoder_lr", "1", "1", "1"),
        USAGE,
        "E-LR",
        ("--text_encoder_lr", "give one"),
    ),
    # optimizer, schedule, loss
    "misspelt optimizer": (
        LORA,
        words("--optimizer_type", "Adam8bit"),
        USAGE,
        "E-OPTIMIZER",
        ("Adam8bit", "AdamW8bit?"),
    ),
    "optimizer not installed": (
        FULL,
        words("--optimizer_type", "not_there.Fast"),
        RESOURCES,
        "E-PACKAGE",
        ("not_there", "pip install"),
    ),
    "unreadable argument": (LORA, words("--optimizer_args", "a"), USAGE, "E-ARGS", ("--optimizer_args", "key=value")),
    "wrong argument": (LORA, words("--optimizer_args", "wd=1"), USAGE, "E-OPTIMIZER-ARGS", ("wd", "--optimizer_args")),
    "misspelt schedule": (FULL, words("--lr_scheduler", "cosin"), USAGE, "E-LR-NAME", ("cosin", "mean cosine?")),
    "warm-up of a constant": (LORA, words("--lr_warmup_steps", "9"), USAGE, "E-LR-WARMUP", ("constant", "with_warmup")),
    "huber with snr": (LORA, words("--loss_type", "huber"), USAGE, "E-HUBER-SNR", ("--huber_schedule", "exponential")),
    "no timesteps": (
        LORA,
        words("--min_timestep", "500", "--max_timestep", "100"),
        USAGE,
        "E-TIMESTEP-RANGE",
        ("--min_timestep", "below"),
    ),
    "precisions that differ": (FULL, words("--full_bf16"), USAGE, "E-CHECK", ("--full_bf16", "--mixed_precision bf16")),
    "unknown type": (INFERENCE, words("--ae_dtype", "bf61"), USAGE, "E-DTYPE", ("--ae_dtype", "use one of")),
    "no steps": (LORA, words("--max_train_epochs", "0"), USAGE, "E-PLAN-EMPTY", ("--max_train_epochs 0", "at least 1")),
    "begin after the end": (LORA, words("--initial_step", "5"), USAGE, "E-CHECK", ("--initial_step", "raise")),
    # output
    "output in a file": (
        LORA,
        words("--output_dir", "{root}/a file"),
        RESOURCES,
        "E-DISK-WRITE",
        ("--output_dir", "a fi"),
    ),
    "images in a file": (
        INFERENCE,
        words("--output_dir", "{root}/a file/x"),
        RESOURCES,
        "E-DISK-WRITE",
        ("--output_dir", "check the path"),
    ),
    "logs in a file": (FULL, words("--logging_dir", "{root}/a file"), RESOURCES, "E-DISK-WRITE", ("--logging_dir",)),
    "no output folder": (LORA, words("--output_dir", ""), USAGE, "E-CHECK", ("--output_dir", "give --output_dir")),
    "no output name": (LORA, words("--output_name", ""), USAGE, "E-CHECK", ("--output_name", "give a name")),
    "folder in the name": (FULL, words("--output_name", "a/b"), USAGE, "E-CHECK", ("'a/b'", "--output_dir")),
    "no folder for logs": (LORA, words("--log_with", "tensorboard"), USAGE, "E-CHECK", ("--log_with", "--logging_dir")),
    "tracker settings": (LORA, config("a =", "--log_tracker_config"), USAGE, "E-CONFIG", ("--log_tracker_config", "[")),
    "no thumbnail": (
        LORA,
        words("--metadata_thumbnail", "{root}/no.png"),
        DATA,
        "E-FILE-MISSING",
        ("--metadata_thumbnail", "spelling"),
    ),
    "no such state": (LORA, words("--resume", "{root}/no"), DATA, "E-STATE-NONE", ("--resume", "check --resume")),
    "no state at all": (FULL, words("--resume", "{root}/empty"), DATA, "E-STATE-NONE", ("--resume", "run.json")),
    "resume from nowhere": (
        LORA,
        words("--resume", "x", "--resume_from_huggingface"),
        USAGE,
        "E-HUB-PATH",
        ("x", "user/repo/path"),
    ),
    "no repository": (LORA, words("--huggingface_repo_id", "my lora"), USAGE, "E-CHECK", ("my lora", "user/name")),
    "no prompts": (
        LORA,
        words("--sample_prompts", "{root}/no.txt"),
        DATA,
        "E-FILE-MISSING",
        ("--sample_prompts", "no.t"),
    ),
    "prompts of another kind": (
        LORA,
        words("--sample_prompts", "{root}/old.ckpt"),
        USAGE,
        "E-PROMPT-FILE",
        ("--sample_prompts", ".txt"),
    ),
    "prompt of another type": (
        LORA,
        config("[prompt]\n[[prompt.subset]]\nprompt = 'a'\nwidth = 'x'\n", "--sample_prompts"),
        USAGE,
        "E-PROMPT-TYPE",
        ("--sample_prompts", "width"),
    ),
}
"""What is done wrong: script, what is added to a right command line, exit and error code, what the lines must hold."""


def alone(place: Place) -> list[str]:
    """The text encoders in a folder without tokenizers, as options."""
    folder = place.root / "encoders"
    folder.mkdir(exist_ok=True)
    return [
        word
        for name in ("clip_l", "t5xxl")
        for word in (f"--{name}", str(shutil.copy(place.models[name], folder / f"{name}.safetensors")))
    ]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def fail(script: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Exit code and last lines of the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(argv)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return ended.value.code, error.strip().splitlines()[-5:]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_place_and_a_cure(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    script, argv, exit_code, code, said = MISTAKES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found, lines = fail(script, [*place.argv(script), *argv(place)], capsys)
    last = "\n".join(line for line in lines if line.startswith("error["))
    assert f"error[{code}]" in last, lines
    assert found == exit_code
    for part in said:
        assert part.replace("{root}", str(place.root)) in last
    assert all(line.count(" - ") >= 1 for line in last.splitlines()), "no place or no cure"


def test_the_catalogue_covers_every_script_and_kind() -> None:
    scripts, _, exits, codes, _ = (set(column) for column in zip(*MISTAKES.values(), strict=True))
    assert len(MISTAKES) >= 40
    assert scripts == {LORA, FULL, INFERENCE, LATENTS, TEXTS, METADATA}
    assert exits == {USAGE, DATA, RESOURCES}
    assert len(codes) > 25


# wrong model files

OPTIONS = {
    "pretrained_model_name_or_path": "a FLUX.1 transformer",
    "clip_l": "a CLIP-L text encoder",
    "t5xxl": "a T5-XXL text encoder",
    "ae": "a FLUX.1 autoencoder",
}
OF_OPTION = {"flux": "pretrained_model_name_or_path", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
LOOKS = {
    "flux": "a FLUX.1-dev transformer",
    "clip_l": "a CLIP text encoder",
    "t5xxl": "a T5 text encoder",
    "ae": "a FLUX.1 or SD3 autoencoder",
}
OTHERS = {
    "sdxl": (["conditioner.embedders.1.model.ln_final.weight"], "an SDXL checkpoint", "sdxl scripts"),
    "sd1": (["cond_stage_model.transformer.x", "input_blocks.1.0.in_layers.0.weight"], "an SD 1.x", "scripts for SD"),
    "sd3": (["joint_blocks.0.context_block.attn.qkv.weight"], "an SD3 transformer", "sd3 scripts"),
    "flux2": (["double_stream_modulation_img.lin.weight"], "a FLUX.2 transformer", "FLUX.1"),
    "chroma": (["distilled_guidance_layer.in_proj.weight"], "a Chroma transformer", "FLUX.1"),
    "scaled twice": (["double_blocks.0.img_attn.qkv.weight_scale_2"], "'scaled' form", "bf16"),
    "lora": (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "a LoRA (kohya", "--network_weights"),
    "control net": (["controlnet_blocks.0.weight"], "a ControlNet", "error-codes"),
    "umt5": (
        [f"encoder.block.{n}.layer.0.SelfAttention.{end}" for n in (0, 1) for end in ("q.weight",)]
        + ["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
        "a UMT5 text encoder",
        "T5-XXL v1.1",
    ),
    "something": (["what.is.this"], "of an unknown kind", "right file"),
}


def refused(place: Place, option: str, path: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the option's file is refused with."""
    start = time.perf_counter()
    code, lines = fail(LORA, [*place.argv(LORA), f"--{option}", str(path)], capsys)
    assert time.perf_counter() - start < 1
    assert code == DATA
    errors = [line for line in lines if line.startswith("error[")]
    assert len(errors) == 1, errors
    assert f"--{option} {path}" in errors[0]
    return errors[0]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", LOOKS)
def test_a_model_given_to_the_wrong_option(
    place: Place, capsys: pytest.CaptureFixture[str], model: str, option: str
) -> None:
    if OF_OPTION[model] == option:
        return
    line = refused(place, option, place.models[model], capsys)
    assert f"is {LOOKS[model]}, but --{option} wants {OPTIONS[option]}" in line
    assert f"give it as --{OF_OPTION[model]}" in line


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_belongs_elsewhere(place: Place, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    names, looks, hint = OTHERS[kind]
    path = place.root / f"{kind}.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    for option in OPTIONS:
        line = refused(place, option, path, capsys)
        assert looks in line
        assert hint in line


@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_that_is_no_model(place: Place, capsys: pytest.CaptureFixture[str], option: str) -> None:
    expected = {
        "page.safetensors": ("E-FILE-KIND", "not a safetensors file"),
        "old.ckpt": ("E-FILE-DAMAGED", "PyTorch checkpoint"),
        "a file": ("E-FILE-KIND", "not a safetensors file"),
        "empty": ("E-FILE-MISSING", "no .safetensors file in this folder"),
    }
    for name, (code, what) in expected.items():
        line = refused(place, option, place.root / name, capsys)
        assert code in line
        assert what in line


@pytest.mark.parametrize("option", OPTIONS)
def test_half_a_download(place: Place, capsys: pytest.CaptureFixture[str], option: str) -> None:
    path = place.root / "large.safetensors"
    entry = {"w": {"dtype": "BF16", "shape": [2_485_000_000], "data_offsets": [0, 4_970_000_000]}}
    head = json.dumps(entry).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(4_070_000_000)
    line = refused(place, option, path, capsys)
    assert "E-FILE-TRUNCATED" in line
    assert "file is 4.07 GB, header says 4.97 GB" in line
    path.unlink()


def test_all_mistakes_are_told_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--ae", str(place.models["clip_l"]), "--t5xxl", "nowhere", "--output_name", "a?", "--full_fp16"]
    code, lines = fail(LORA, [*place.argv(LORA), *wrong, "--lr_scheduler", "cosin"], capsys)
    assert code == DATA
    assert {line.split("]")[0] for line in lines} == {
        *("error[E-MODEL-KIND", "error[E-FILE-MISSING", "error[E-CHECK", "error[E-LR-NAME"),
    }


# layouts of the dataset


def test_layouts_of_folders(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    root = place.root / "layouts"
    picture = place.root / "train" / "2_cat" / "i0.png"

    def put(*folders: str, name: str = "a.png") -> None:
        for folder in folders:
            (root / folder).mkdir(parents=True)
            shutil.copy(picture, root / folder / name)

    put("flat", "unnumbered/cat", "nested/10_cat/more", "deeper/set/10_cat", "zero/0_cat", "leaf/10_cat")
    put("leftovers/__MACOSX", name="._a.png")
    put("others/10_cat", name="a.psd")
    expected = {
        "flat": ("1 image lie directly", f"move them to {root / 'flat' / '1_flat'}"),
        "unnumbered": ("doesn't begin with a number", f"rename it to {root / 'unnumbered' / '1_cat'}"),
        "nested": ("those are not searched", str(root / "nested" / "10_cat" / "more")),
        "deeper": ("one level deeper", f"give --train_data_dir {root / 'deeper' / 'set'}"),
        "zero": ("its number of repeats is 0", f"rename it to {root / 'zero' / '1_cat'}"),
        "leaf/10_cat": ("lie directly", f"give its parent: --train_data_dir {root / 'leaf'}"),
        "leftovers": ("the folder is empty", "put the images into"),
        "others": ("1 x .psd", "convert the pictures"),
        "nowhere": ("doesn't exist", "did you mean"),
        "xyz": ("doesn't exist", "there is no xyz in"),
        "flat/a.png": ("is a file", "give the folder above"),
    }
    for layout, (what, hint) in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            code, lines = fail(LORA, [*place.argv(LORA), "--train_data_dir", str(root / layout)], capsys)
        assert code == DATA, layout
        text = "\n".join(lines)
        assert what in text, layout
        assert hint in text, layout


def test_tiny_models_are_right_where_they_belong(place: Place, tmp_path: Path) -> None:
    """The command lines above are right but for the mistake."""
    for script in (LATENTS, TEXTS):
        importlib.import_module(script).main(place.argv(script))
    assert sorted(path.name for path in (place.root / "train" / "2_cat").glob("i0*.npz"))
    tiny.write_flux(tmp_path / "schnell.safetensors", guidance=False)
    importlib.import_module(LORA).main(
        [*place.argv(LORA), "--pretrained_model_name_or_path", str(tmp_path / "schnell.safetensors")]
    )
    assert (place.root / "out" / "run.safetensors").is_file()
