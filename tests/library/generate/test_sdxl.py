"""`sdxl_minimal_inference.py` on a tiny SDXL."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.log import UserError
from library.option_groups import SDXL_MINIMAL_INFERENCE, SdxlInferenceOptions
from library.options import parse
from tests import tiny, tiny_sd

sdxl = pytest.importorskip("library.generate.sdxl")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The start of a command line with models that are there."""
    folder = tmp_path_factory.mktemp("sdxl")
    model = tiny_sd.write_single(folder / "xl.safetensors", "xl")
    tiny.write_clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    tiny.write_clip_tokenizer(folder / "tokenizers" / tiny_sd.OPEN_CLIP_FOLDER["xl"])
    return [
        *("--ckpt_path", str(model), "--tokenizer_cache_dir", str(folder / "tokenizers"), "--dtype", "float32"),
        *("--width", "72", "--height", "64", "--steps", "2", "--seed", "3"),
    ]


def run(command: list[str], folder: Path, *more: str) -> Image.Image:
    """The only image that a command makes."""
    sdxl.generate(parse(SDXL_MINIMAL_INFERENCE, [*command, "--output_dir", str(folder), *more]))
    (path,) = folder.iterdir()
    return Image.open(path)


def test_images_say_how_they_were_made_and_can_be_made_again(command: list[str], tmp_path: Path) -> None:
    first = run(command, tmp_path / "1")
    assert first.size == (72, 64)
    assert first.text == {
        "prompt": "A photo of a cat",
        "negative_prompt": "",
        "seed": "3",
        "steps": "2",
        "cfg": "7.0",
        "sampler": "euler",
        "size": "72x64",
    }
    assert run(command, tmp_path / "2", "--offload").tobytes() == first.tobytes()
    others = {
        "prompt2": ("--prompt2", "a dog"),
        "zero": ("--v_parameterization", "--zero_terminal_snr"),
    }
    images = [run(command, tmp_path / name, *more).tobytes() for name, more in others.items()]
    assert len({first.tobytes(), *images}) == len(images) + 1


@pytest.mark.parametrize("more", [[], ["--merge_lora_weights"]], ids=["applied", "merged"])
def test_networks(command: list[str], tmp_path: Path, more: list[str]) -> None:
    lora = pytest.importorskip("networks.lora")
    model = tiny_sd.unet("xl")
    network = lora.create_network(1.0, 2, 2.0, None, [None, None], model)
    network.apply_to()
    torch.manual_seed(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = tmp_path / "lora.safetensors"
    network.save_weights(file, None, {})
    plain = run(command, tmp_path / "plain")
    networks = [run(command, tmp_path / name, "--lora_weights", f"{file};{name}", *more) for name in ("0", "0.8")]
    assert networks[0].tobytes() == plain.tobytes()
    assert networks[1].tobytes() != plain.tobytes()


def test_a_model_may_say_what_it_predicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    model = tiny_sd.write_single(tmp_path / "v.safetensors", "xl", more=marks)
    with caplog.at_level(logging.INFO):
        settings = sdxl.settings_of(SdxlInferenceOptions(ckpt_path=str(model)))
    assert settings.v_parameterization
    assert settings.zero_terminal_snr
    assert "predicts velocity" in caplog.text


def test_types() -> None:
    half = sdxl.types_of(SdxlInferenceOptions(ckpt_path="x"), ("one", "two"))
    assert half == {"one": torch.float16, "two": torch.float16, "unet": torch.float16, "vae": torch.float32}
    brain = sdxl.types_of(SdxlInferenceOptions(ckpt_path="x", dtype="bf16"), ())
    assert brain == {"unet": torch.bfloat16, "vae": torch.bfloat16}
    chosen = sdxl.types_of(SdxlInferenceOptions(ckpt_path="x", vae_dtype="bf16"), ())
    assert chosen["vae"] == torch.bfloat16


def test_mistakes_are_told_before_anything_is_loaded(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora"):
        run(command, tmp_path, "--lora_weights", str(tmp_path / "lora.safetensors"))
    with pytest.raises(UserError):
        run([*command, "--ckpt_path", str(tmp_path / "none.safetensors")], tmp_path)


def test_options_that_do_nothing_are_named(command: list[str]) -> None:
    more = ("--negative_prompt", "bad", "--cfg_scale", "1", "--merge_lora_weights")
    found = list(sdxl._idle(parse(SDXL_MINIMAL_INFERENCE, [*command, *more])))
    assert [finding.where for finding in found] == ["--negative_prompt", "--merge_lora_weights"]
    found = list(sdxl._idle(parse(SDXL_MINIMAL_INFERENCE, [*command, "--interactive"])))
    assert [finding.where for finding in found] == ["--seed"]
