"""`sd3_minimal_inference.py` on a tiny SD3."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.families.sd3 import Sd3
from library.files import save_safetensors
from library.generate.painter import LoraFile, Painter
from library.log import DataError, UserError
from library.models import attention
from library.models.keymaps_sd3 import ENCODERS
from library.option_groups import SD3_MINIMAL_INFERENCE, Sd3InferenceOptions
from library.options import parse
from networks import lora_sd3
from networks.base import Network
from tests import tiny_sd3

sd3 = pytest.importorskip("library.generate.sd3")

PROMPT, NEGATIVE = "a photo of a red cat", "blurry"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model files by name, and a checkpoint without encoders and autoencoder."""
    folder = tmp_path_factory.mktemp("sd3")
    return {**tiny_sd3.write_all(folder), "bare": tiny_sd3.write_single(folder / "bare.safetensors", parts=())}


@pytest.fixture(scope="module")
def command(files: dict[str, Path]) -> list[str]:
    """The start of a command line with models that are there."""
    return [
        *("--ckpt_path", str(files["sd3"]), "--tokenizer_cache_dir", str(files["tokenizers"])),
        *("--width", "80", "--height", "64", "--steps", "2", "--seed", "3"),
    ]


@pytest.fixture(autouse=True)
def _own_attention() -> Iterator[None]:
    yield
    attention.use(None)


def run(command: list[str], folder: Path, *more: str) -> Image.Image:
    """The only image that a command makes."""
    sd3.generate(parse(SD3_MINIMAL_INFERENCE, [*command, "--output_dir", str(folder), *more]))
    (path,) = folder.iterdir()
    return Image.open(path)


@pytest.fixture(scope="module")
def plain(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    """What the command makes as it is."""
    return run(command, tmp_path_factory.mktemp("plain"))


def test_images_say_how_they_were_made_and_can_be_made_again(
    command: list[str], plain: Image.Image, tmp_path: Path
) -> None:
    assert plain.size == (80, 64)
    assert plain.text == {
        "prompt": "A photo of a cat",
        "negative_prompt": "",
        "seed": "3",
        "steps": "2",
        "cfg": "5.0",
        "size": "80x64",
    }
    more = ("--offload", "--attn_mode", "sdpa", "--width", "65", "--height", "49")
    assert run(command, tmp_path, *more).tobytes() == plain.tobytes(), "sides are raised to multiples of 16"


def test_parts_in_eight_bits(command: list[str], plain: Image.Image, tmp_path: Path) -> None:
    image = run(command, tmp_path, "--bf16", "--mmdit_dtype", "fp8", "--t5xxl_dtype", "fp8")
    difference = np.abs(np.asarray(plain, dtype=int) - np.asarray(image, dtype=int))
    assert 0 < difference.mean() < 25


def test_parts_may_have_files_of_their_own(
    files: dict[str, Path], command: list[str], plain: Image.Image, tmp_path: Path
) -> None:
    separate = [word for name in (*ENCODERS, "vae") for word in (f"--{name}", str(files[name]))]
    bare = ("--ckpt_path", str(files["bare"]))
    assert run(command, tmp_path / "1", *separate, *bare).tobytes() == plain.tobytes()
    with pytest.raises(DataError, match="there is no clip_l"):
        run(command, tmp_path / "2", *bare)


def test_options_decide_the_text(command: list[str]) -> None:
    def family_of(*more: str) -> Sd3:
        return Sd3.from_inference_options(parse(SD3_MINIMAL_INFERENCE, [*command, *more])[Sd3InferenceOptions])

    first = family_of()
    encoders = first.load_encoders(first.encoder_names, torch.device("cpu"), torch.float32)

    def text_of(*more: str) -> dict[str, Tensor]:
        family = family_of(*more)
        with torch.no_grad():
            own = {name: encoders[name] for name in family.encoder_names}
            return family.encode_text(own, family.tokenize([PROMPT]))

    plain, longer, without = text_of(), text_of("--t5xxl_token_length", "90"), text_of("--do_not_use_t5xxl")
    clip, five = text_of("--apply_lg_attn_mask"), text_of("--apply_t5_attn_mask")
    assert plain["t5_out"].shape[1] == 77
    assert longer["t5_out"].shape[1] == 90
    assert "t5_out" not in without
    assert torch.equal(without["lg_out"], plain["lg_out"])
    assert torch.equal(clip["t5_out"], plain["t5_out"])
    assert not torch.allclose(clip["lg_out"], plain["lg_out"], atol=1e-3)
    assert torch.equal(five["lg_out"], plain["lg_out"])
    assert not torch.allclose(five["t5_out"], plain["t5_out"], atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "cfg"), [("medium", 5.0), ("medium", 1.0), ("5-medium", 5.0)])
def test_the_pipeline_of_diffusers_makes_the_same(
    variant: tiny_sd3.Variant, cfg: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    steps, seed, size = 6, 11, (80, 64)
    folder = tiny_sd3.write_folder(tmp_path / "model", variant)
    kept: list[Tensor] = []
    decode = Sd3.decode_latents

    def decoding(self: Sd3, vae: nn.Module, latents: Tensor) -> Tensor:
        kept.append(latents)
        return decode(self, vae, latents)

    monkeypatch.setattr(Sd3, "decode_latents", decoding)
    image = run(
        ["--ckpt_path", str(folder), "--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--cfg_scale", str(cfg)],
        tmp_path / "out",
        *("--width", str(size[0]), "--height", str(size[1]), "--steps", str(steps), "--seed", str(seed)),
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    sigmas = (
        Sd3.from_inference_options(Sd3InferenceOptions(ckpt_path=str(folder))).objective().schedule(steps, 20, False)
    )
    noise = torch.randn(1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    theirs: list[Tensor] = []
    (picture,) = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=cfg,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        sigmas=sigmas[:-1].tolist(),
        latents=noise,
        max_sequence_length=77,
        callback_on_step_end=lambda pipe, step, time, found: theirs.append(found["latents"]) or found,
    ).images
    assert float((kept[0] - noise).abs().max()) > 0.1
    torch.testing.assert_close(kept[0], theirs[-1], rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(image, dtype=int)).max() <= 1


# networks


def with_prefix(**arguments: str) -> Callable[[nn.Module], Network]:
    return lambda model: lora_sd3.create_network(1.0, 2, 2.0, None, [None] * 3, model, **arguments)


KINDS = {"lora": with_prefix(), "dora": with_prefix(algo="dora"), "loha": with_prefix(algo="loha")} | {
    "lokr": with_prefix(algo="lokr", factor="4"),
    "split": with_prefix(split_qkv="True"),
}


def network_file(path: Path, network: Network) -> Path:
    """The file of a network with random weights."""
    network.apply_to()
    torch.manual_seed(5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    network.save_weights(path, None, {})
    return path


def layer_of(files: dict[str, Path], network: Path, *, merge: bool = False) -> nn.Linear:
    """A layer of the transformer as the script has it, with a network of half the strength."""
    family = Sd3.from_inference_options(options_of(ckpt_path=str(files["sd3"])))
    types, loras = sd3.types_of(options_of()), [LoraFile(str(network), 0.5)]
    painter = Painter(family, types, torch.device("cpu"), sd3.plugin_of, loras=loras, merge=merge)
    layer = painter._part("unet").get_submodule("joint_blocks.0.x_block.attn.qkv")
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_all_kinds(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_sd3.mmdit()
    network = KINDS[kind](model)
    file = network_file(tmp_path / "net.safetensors", network)
    layer = model.get_submodule("joint_blocks.0.x_block.attn.qkv")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
    network.set_multiplier(0.5)
    expected = layer(x)
    network.set_multiplier(0.0)
    assert not torch.allclose(layer(x), expected, atol=1e-2)
    for merge in (False, True):
        torch.testing.assert_close(layer_of(files, file, merge=merge)(x), expected, rtol=1e-4, atol=1e-4)


def test_several_networks_have_strengths_that_can_be_typed(
    command: list[str], plain: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [tiny_sd3.encoder(name) for name in ENCODERS]
    text = lora_sd3.create_network(1.0, 2, 2.0, None, encoders, None, train_t5xxl="True")
    made = {"text": text, "image": KINDS["lora"](tiny_sd3.mmdit())}
    paths = [network_file(tmp_path / f"{name}.safetensors", network) for name, network in made.items()]
    for name, network in made.items():
        assert all(adapter.name.startswith("lora_te") == (name == "text") for adapter in network.created)
    ends = ("--m 0,0", "--m 0.8,0", "--m 0,0.5", "--g 2 --m 0,0")
    lines = [*(f"A photo of a cat --d 3 {end}" for end in ends), ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    more = ("--interactive", "--lora_weights", *(f"{path};0.8" for path in paths))
    start = [word for word in command if word not in ("--seed", "3")]
    sd3.generate(parse(SD3_MINIMAL_INFERENCE, [*start, "--output_dir", str(tmp_path / "typed"), *more]))
    images = [
        Image.open(path) for path in sorted((tmp_path / "typed").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    ]
    assert [image.text["cfg"] for image in images] == ["5.0", "5.0", "5.0", "2.0"]
    typed = [image.tobytes() for image in images]
    assert len(set(typed)) == 4
    assert typed[0] == plain.tobytes()
    more = ("--lora_weights", f"{paths[1]};0.5", "--merge_lora_weights")
    merged = np.asarray(run(command, tmp_path / "merged", *more), dtype=int)
    assert np.abs(merged - np.asarray(images[2], dtype=int)).max() <= 2


NAMES = {
    "it is a LoRA for SDXL": ("lora_unet_input_blocks_4_1_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    "it is a LoRA for FLUX": ("lora_unet_double_blocks_0_img_attn_qkv",),
    "an OFT network": ("oft_unet_joint_blocks_0_x_block_attn_qkv",),
    "text encoders only": ("lora_te1_text_model_encoder_layers_99_mlp_fc1",),
}


@pytest.mark.parametrize("kind", NAMES)
def test_networks_for_other_models_are_refused_before_anything_is_loaded(
    kind: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sd3, "load_tokenizers", lambda self: pytest.fail("something is loaded"))
    file = tmp_path / "other.safetensors"
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    parts = {"oft_blocks": torch.ones(2, 2, 2)} if "OFT" in kind else pair
    save_safetensors({f"{name}.{key}": tensor for name in NAMES[kind] for key, tensor in parts.items()}, file)
    with pytest.raises(DataError, match=f"no weight fits this model: .*{kind}") as caught:
        run(command, tmp_path / "out", "--lora_weights", str(file))
    assert caught.value.code == "E-NETWORK-FILE"


def test_outlines_have_the_names_of_what_is_loaded(files: dict[str, Path]) -> None:
    family = Sd3.from_inference_options(Sd3InferenceOptions(ckpt_path=str(files["sd3"])))
    outlines = [family.outline(name) for name in ENCODERS], family.outline("unet")
    loaded = [tiny_sd3.encoder(name) for name in ENCODERS], tiny_sd3.mmdit()
    for outline, model in zip((*outlines[0], outlines[1]), (*loaded[0], loaded[1]), strict=True):
        assert {name: one.shape for name, one in outline.named_parameters()} == {
            name: one.shape for name, one in model.named_parameters()
        }
        assert all(parameter.is_meta for parameter in outline.parameters())


# options


def options_of(**values: object) -> Sd3InferenceOptions:
    return dataclasses.replace(Sd3InferenceOptions(ckpt_path="x"), **values)  # type: ignore[arg-type]


def test_types() -> None:
    full = sd3.types_of(options_of())
    assert set(full) == {*ENCODERS, "unet", "vae"}
    assert set(full.values()) == {torch.float32}
    half = sd3.types_of(options_of(fp16=True))
    assert half == {**dict.fromkeys((*ENCODERS, "unet"), torch.float16), "vae": torch.float32}
    assert set(sd3.types_of(options_of(bf16=True)).values()) == {torch.bfloat16}
    own = sd3.types_of(options_of(bf16=True, t5xxl_dtype="fp8", mmdit_dtype="fp16", vae_dtype="fp32"))
    assert (own["t5xxl"], own["unet"], own["vae"]) == (torch.float8_e4m3fn, torch.float16, torch.float32)
    assert own["clip_l"] == own["clip_g"] == torch.bfloat16
    with pytest.raises(UserError, match="--fp16 and --bf16"):
        sd3.types_of(options_of(fp16=True, bf16=True))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--attn_mode", "best"), "'best'"),
        (("--attn_mode", "xformers"), "package xformers"),
        (("--t5xxl", "{clip_l}"), "wants a T5"),
        (("--ckpt_path", "{vae}"), "wants an SD3 checkpoint"),
        (("--lora_weights", "{vae}"), "wants a LoRA"),
        (("--lora_weights", "none.safetensors"), "none.safetensors"),
        (("--height", "400"), "--height - give 384 or less"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    more: tuple[str, str],
    words: str,
    files: dict[str, Path],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sd3, "load_tokenizers", lambda self: pytest.fail("something is loaded"))
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        run(command, tmp_path, more[0], more[1].format(**files))


def test_options_that_do_nothing_are_named(command: list[str]) -> None:
    def named(*more: str) -> list[str]:
        options = parse(SD3_MINIMAL_INFERENCE, [*command, *more])
        group = options[Sd3InferenceOptions]
        found = sd3._idle(options, Sd3.from_inference_options(group), sd3.types_of(group))
        return [finding.where for finding in found]

    assert named() == []
    assert named("--negative_prompt", "bad", "--cfg_scale", "1", "--merge_lora_weights", "--vae_dtype", "fp8") == [
        "--negative_prompt",
        "--merge_lora_weights",
        "--vae_dtype",
    ]
    of_t5 = ("--t5xxl", "x", "--t5xxl_token_length", "9", "--t5xxl_dtype", "fp8", "--apply_t5_attn_mask")
    assert named("--do_not_use_t5xxl", *of_t5) == [word for word in of_t5 if word.startswith("--")]
    assert named("--interactive") == ["--seed"]


def test_a_missing_t5_is_told_unless_it_is_not_wanted(files: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_sd3.write_single(tmp_path / "short.safetensors", parts=("clip_l", "clip_g", "vae"))
    found = Sd3.from_inference_options(options_of(ckpt_path=str(model))).findings()
    assert ["there is no T5" in finding.what for finding in found] == [True]
    for name in ("short", "sd3"):
        path = model if name == "short" else files[name]
        family = Sd3.from_inference_options(options_of(ckpt_path=str(path), do_not_use_t5xxl=True))
        assert family.findings() == []
        assert family.encoder_names == ("clip_l", "clip_g")
