"""Kinds of model files are told apart by their headers, and messages say what to do."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch

from library.files import save_safetensors
from library.models import keymaps
from library.models.detect import check, detect
from tests import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = json.loads((GOLDEN / "model_kinds.json").read_text(encoding="utf-8"))
FLUX = {name: tuple(shape) for name, shape in KINDS["flux"].items()}


@pytest.mark.parametrize("label", [label for label in KINDS if label != "about"])
def test_golden_kinds(label: str) -> None:
    shapes = {name: tuple(shape) for name, shape in KINDS[label].items()}
    assert detect(shapes).name == label.split()[0]


def test_flux_variants_and_layouts() -> None:
    assert detect(FLUX).description == "a FLUX.1-dev transformer"
    schnell = {name: shape for name, shape in FLUX.items() if not name.startswith("guidance_in")}
    assert detect(schnell).description == "a FLUX.1-schnell transformer"
    assert detect({"model.diffusion_model." + name: shape for name, shape in FLUX.items()}).roles == ("flux",)
    diffusers = detect(dict.fromkeys(keymaps.flux_to_diffusers(FLUX), ()))
    assert (diffusers.name, diffusers.roles) == ("flux_diffusers", ("flux",))
    assert detect(FLUX | {"img_in.weight": (3072, 384)}).name == "flux_tools"
    complete = {"model.diffusion_model." + name: shape for name, shape in FLUX.items()} | {
        "vae.encoder.conv_in.weight": ()
    }
    assert detect(complete).roles == ("flux", "flux_ae")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "lora"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "lora_diffusers"),
        (["lycoris_double_blocks_0_img_attn_qkv.lokr_w1"], "lycoris"),
        (["lora_unet_x.hada_w1_a"], "lycoris"),
        (["oft_unet_x.oft_blocks"], "oft"),
        (["emb_params"], "textual_inversion"),
        (["clip_l", "clip_g"], "textual_inversion"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight_scale_2"], "scaled"),
        (["double_blocks.0.img_attn.qkv.weight.absmax"], "quantized"),
        (["distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.norm.key_norm.scale"], "chroma"),
        (["double_stream_modulation_img.lin.weight"], "flux2"),
        (
            ["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"],
            "sdxl_refiner",
        ),
        (["down_blocks.0.resnets.0.time_emb_proj.weight", "down_blocks.0.resnets.0.conv1.weight"], "sd_diffusers"),
        (["down_blocks.0.resnets.0.time_emb_proj.weight", "add_embedding.linear_1.weight"], "sdxl_diffusers"),
        (["down_blocks.0.resnets.0.time_emb_proj.weight", "class_embedding.linear_1.weight"], "sd2_unclip"),
        (["input_blocks.1.0.in_layers.0.weight", "label_emb.0.0.weight"], "sdxl"),
        (["cond_stage_model.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"], "sd2_unclip"),
        (["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"], "clip"),
        (["vision_model.embeddings.class_embedding"], "clip_vision"),
        (["whatever"], "unknown"),
        ([], "unknown"),
    ],
)
def test_kinds_by_names(names: list[str], kind: str) -> None:
    assert detect(dict.fromkeys(names, (1, 1))).name == kind


@pytest.mark.parametrize(
    ("kind", "name", "channels", "words"),
    [
        (
            "sd1",
            "model.diffusion_model.input_blocks.0.0.weight",
            9,
            "an inpainting variant (9 input channels) of an SD 1",
        ),
        ("sd2", "model.diffusion_model.input_blocks.0.0.weight", 5, "a depth variant (5 input channels) of an SD 2"),
        ("sdxl", "model.diffusion_model.input_blocks.0.0.weight", 8, "an InstructPix2Pix variant"),
        ("sdxl_diffusers", "conv_in.weight", 9, "of an SDXL U-Net (Diffusers)"),
        ("sdxl_diffusers", "conv_in.weight", 6, "a variant with 6 input channels of an SDXL"),
    ],
)
def test_variants_that_see_more_are_named_and_not_trained(kind: str, name: str, channels: int, words: str) -> None:
    shapes = {key: tuple(shape) for key, shape in KINDS[kind].items()}
    found = detect(shapes | {name: (320, channels, 3, 3)})
    assert words in found.description
    assert not {"sd", "sdxl"} & set(found.roles)
    assert ("sd_vae" in found.roles) == (kind != "sdxl_diffusers")


def test_roles_by_what_is_in_the_file() -> None:
    shapes = {key: tuple(shape) for key, shape in KINDS["sd1"].items()}
    assert detect(shapes).roles == ("sd", "sd_vae")
    unet = {key: shape for key, shape in shapes.items() if key.startswith("model.diffusion_model.")}
    assert detect(unet).roles == ("sd",)
    assert detect(unet).description == "an SD 1.x U-Net"
    refiner = {"down_blocks.0.resnets.0.time_emb_proj.weight": (1, 1), "add_embedding.linear_1.weight": (1536, 2560)}
    assert detect(refiner).name == "sdxl_refiner"


@pytest.mark.parametrize(
    ("width", "roles"), [(768, ("clip_l",)), (1280, ("clip_g",)), (1024, ()), (32, ("clip_l", "clip_g"))]
)
def test_clip_by_width(width: int, roles: tuple[str, ...]) -> None:
    assert detect({"text_model.embeddings.token_embedding.weight": (49408, width)}).roles == roles


def test_t5_variants() -> None:
    encoder = dict.fromkeys(KINDS["t5xxl"], ())
    assert detect(encoder | {"decoder.block.0.layer.0.SelfAttention.q.weight": ()}).name == "t5_full"
    relative = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert detect(encoder | {relative: ()}).roles == ()
    assert detect({"encoder.block.0.layer.0.SelfAttention.q.weight": ()}).roles == ()


def test_right_files_have_no_finding(tmp_path: Path) -> None:
    paths = tiny.write_all(tmp_path)
    for name, option, role in (
        ("flux", "--pretrained_model_name_or_path", "flux"),
        ("ae", "--ae", "flux_ae"),
        ("clip_l", "--clip_l", "clip_l"),
        ("t5xxl", "--t5xxl", "t5xxl"),
    ):
        assert check(paths[name], option, role) is None


def test_message_names_kind_wish_and_way_out(tmp_path: Path) -> None:
    path = tmp_path / "te.safetensors"
    save_safetensors({"text_model.embeddings.token_embedding.weight": torch.zeros(2, 768)}, path)
    finding = check(path, "--t5xxl", "t5xxl")
    assert finding is not None
    assert finding.what == "te.safetensors is a CLIP-L text encoder, but --t5xxl wants a T5-XXL text encoder"
    assert finding.hint == "give it as --clip_l"
    assert finding.where == f"--t5xxl {path}"
    assert finding.error


def test_damaged_missing_and_foreign_files_are_findings(tmp_path: Path) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"PK\x03\x04" + bytes(100))
    whole = tiny.write_clip_l(tmp_path / "clip_l.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, words in (("model.ckpt", "PyTorch"), ("half.safetensors", "truncated"), ("none", "no such file")):
        finding = check(tmp_path / name, "--clip_l", "clip_l")
        assert finding is not None
        assert words in finding.what
        assert "--clip_l" in finding.where


def test_a_big_file_is_judged_by_its_header_alone(tmp_path: Path) -> None:
    shapes = dict(FLUX)
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    path = tmp_path / "flux.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)  # a sparse file of some gigabytes
    started = time.perf_counter()
    assert check(path, "--ae", "flux_ae") is not None
    assert time.perf_counter() - started < 1
