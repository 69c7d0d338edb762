"""Names of SD 1.x, SD 2.x and SDXL: golden lists, Diffusers' own classes as other witness, and back without loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.models import clip, keymaps, keymaps_sd, loading_sd
from library.models.keymaps import Mapped, mapped_shapes
from library.models.keymaps_sd import Version
from library.models.unet import build_unet
from tests import tiny_sd

GOLDEN = Path(__file__).parents[2] / "golden"
FILES: dict[Version, str] = {"1": "sd15", "2": "sd2", "xl": "sdxl"}
VERSIONS: tuple[Version, ...] = ("1", "2", "xl")
REAL: dict[Version, dict[str, Any]] = {
    "1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "xl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Settings of the published U-Nets."""


def golden(name: str) -> dict[str, tuple[int, ...]]:
    content = json.loads((GOLDEN / f"{name}_keys.json").read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, shape in content["keys"].items()}


def checkpoint(version: Version) -> dict[str, tuple[int, ...]]:
    return golden(f"{FILES[version]}_checkpoint")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def below(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


@pytest.mark.parametrize("version", VERSIONS)
def test_unet_of_the_golden_checkpoint_is_the_published_one(version: Version) -> None:
    from diffusers import UNet2DConditionModel

    file = checkpoint(version)
    shapes = mapped_shapes(file, keymaps_sd.unet_from_file(below_unet(file)))
    with torch.device("meta"):
        published = UNet2DConditionModel(**REAL[version])
        ours = build_unet(shapes)
    assert shapes == shapes_of(published)
    assert shapes_of(ours) == shapes
    assert {name: ours.config[name] for name in REAL[version]} == REAL[version]
    different = {name for name in published.config if ours.config[name] != published.config[name]}
    assert different <= {"_use_default_values"}
    back = mapped_shapes(shapes, keymaps_sd.unet_to_ldm(shapes))
    assert back == below(file, "model.diffusion_model.")


def below_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name.startswith("model.diffusion_model.")}


def test_diffusers_names_of_sdxl_are_the_golden_ones() -> None:
    file = checkpoint("xl")
    shapes = mapped_shapes(file, keymaps_sd.unet_from_file(file))
    assert shapes == golden("sdxl_unet_diffusers")
    assert len(shapes) == 1680


def test_a_whole_file_gives_its_unet_only() -> None:
    assert set(keymaps_sd.unet_from_file(checkpoint("1"))) == set(
        keymaps_sd.unet_from_file(below_unet(checkpoint("1")))
    )


@pytest.mark.parametrize(
    ("version", "name", "prefix", "heads"),
    [
        ("1", "text_encoder", "cond_stage_model.transformer.", 12),
        ("2", "text_encoder", "cond_stage_model.model.", 16),
        ("xl", "text_encoder", "conditioner.embedders.0.transformer.", 12),
        ("xl", "text_encoder_2", "conditioner.embedders.1.model.", 20),
    ],
)
def test_encoders_of_the_golden_checkpoints(version: Version, name: str, prefix: str, heads: int) -> None:
    file = checkpoint(version)
    is_open = version == "2" or name == "text_encoder_2"
    read = keymaps_sd.open_clip_from_file if is_open else keymaps_sd.clip_from_file
    shapes = mapped_shapes(file, read(file, version))
    with torch.device("meta"):
        model = loading_sd.build_encoder(shapes, name, version)
    assert {clip.file_name(key): shape for key, shape in shapes_of(model).items()} == shapes
    assert model.config.num_attention_heads == heads
    assert model.config.hidden_act == ("gelu" if is_open else "quick_gelu")
    assert model.config.num_hidden_layers == (23 if version == "2" else 32 if name == "text_encoder_2" else 12)
    back = keymaps_sd.open_clip_to_ldm(shapes) if is_open else {key: keymaps.Recipe((key,)) for key in shapes}
    if version == "2":
        back |= keymaps_sd.made_up_sd2(shapes)
    extras = {"logit_scale": ()} if name == "text_encoder_2" else {}
    assert mapped_shapes(shapes, back) | extras == below(file, prefix)


@pytest.mark.parametrize("version", VERSIONS)
def test_autoencoder_of_the_golden_checkpoints(version: Version) -> None:
    file = checkpoint(version)
    shapes = mapped_shapes(file, keymaps_sd.vae_from_file(file))
    with torch.device("meta"):
        assert shapes_of(loading_sd.build_vae(shapes)) == shapes
    assert mapped_shapes(shapes, keymaps.vae_from_diffusers(shapes)) == below(file, "first_stage_model.")
    assert len(shapes) == 248


@pytest.mark.parametrize("version", VERSIONS)
def test_all_tensors_of_the_golden_checkpoints_are_someones(version: Version) -> None:
    file = checkpoint(version)
    known = [keymaps_sd.unet_from_file(file), keymaps_sd.vae_from_file(file)]
    if version != "2":
        known.append(keymaps_sd.clip_from_file(file, version))
    if version != "1":
        known.append(keymaps_sd.open_clip_from_file(file, version))
    sources = {source for recipes in known for recipe in recipes.values() for source in recipe.sources}
    left = {name.rpartition("model.")[2] for name in set(file) - sources}
    last = {name for name in left if name.startswith("transformer.resblocks.23.")}
    assert left - last == {"1": set(), "2": {"text_projection", "logit_scale"}, "xl": {"logit_scale"}}[version]
    assert len(last) == (12 if version == "2" else 0)


def test_projection_is_transposed_and_joint_weights_are_split_in_thirds() -> None:
    tower = {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in small_tower().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.items()}
    read = Mapped(tower, keymaps_sd.open_clip_from_file(shapes, "xl"))
    assert torch.equal(read["text_projection.weight"], tower["conditioner.embedders.1.model.text_projection"].T)
    joint = tower["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
    layer = "text_model.encoder.layers.0.self_attn."
    parts = [read[f"{layer}{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), joint)
    back = dict(Mapped(read, keymaps_sd.open_clip_to_ldm(read)))
    assert back.keys() == small_tower().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in small_tower().items())


def test_a_projection_stored_as_a_linear_layer_is_not_transposed() -> None:
    tower = small_tower()
    tower["text_projection.weight"] = tower.pop("text_projection")
    file = {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in tower.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    read = Mapped(file, keymaps_sd.open_clip_from_file(shapes, "xl"))
    assert torch.equal(read["text_projection.weight"], tower["text_projection.weight"])


def small_tower() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "token_embedding.weight": (5, 4),
        "positional_embedding": (3, 4),
        "ln_final.weight": (4,),
        "text_projection": (4, 6),
        "transformer.resblocks.0.ln_1.bias": (4,),
        "transformer.resblocks.0.mlp.c_fc.weight": (8, 4),
        "transformer.resblocks.0.attn.in_proj_weight": (12, 4),
        "transformer.resblocks.0.attn.in_proj_bias": (12,),
        "transformer.resblocks.0.attn.out_proj.weight": (4, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_early_files_without_the_level_text_model() -> None:
    prefix = "cond_stage_model.transformer."
    file = dict.fromkeys([f"{prefix}embeddings.token_embedding.weight", f"{prefix}embeddings.position_ids"])
    assert list(keymaps_sd.clip_from_file(file, "1")) == ["text_model.embeddings.token_embedding.weight"]


@pytest.mark.parametrize(("blocks", "kept"), [(24, 23), (23, 23), (3, 2)])
def test_sd2_never_uses_its_last_block(blocks: int, kept: int) -> None:
    assert keymaps_sd.open_clip_layers("2", blocks) == kept
    assert keymaps_sd.open_clip_layers("xl", blocks) == blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_per_block": 1},
        {"mid_block_type": "UNetMidBlock2D"},  # without attention in the middle, as SSD-1B and Vega
        {"mid_block_type": None},
        {
            "transformer_layers_per_block": (1, [2, 2], [1, 2]),
            "reverse_transformer_layers_per_block": ([1, 1, 2], [2, 1, 1], 1),
            "mid_block_type": "UNetMidBlock2D",
        },
    ],
    ids=["one block per level", "no attention in the middle", "no middle", "uneven depths"],
)
def test_pruned_variants_take_the_same_path(settings: dict[str, Any]) -> None:
    reference = tiny_sd.unet("xl", **settings)
    shapes = shapes_of(reference)
    with torch.device("meta"):
        assert shapes_of(build_unet(shapes)) == shapes
    ldm = mapped_shapes(shapes, keymaps_sd.unet_to_ldm(shapes))
    assert "input_blocks.0.0.weight" in ldm
    assert not any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in ldm)
    assert mapped_shapes(ldm, keymaps_sd.unet_from_file(ldm)) == shapes


def test_projections_get_the_shape_of_the_version() -> None:
    shapes = shapes_of(tiny_sd.unet("1"))
    name = "down_blocks.0.attentions.0.proj_in.weight"
    assert shapes[name] == (32, 32, 1, 1)
    wide = {
        key: (*shape[:1], 768) if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else shape
        for key, shape in shapes.items()
    }
    flat = {
        key: shape[:2] if ".proj_in.weight" in key or ".proj_out.weight" in key else shape
        for key, shape in wide.items()
    }
    assert mapped_shapes(flat, keymaps_sd.unet_from_file(flat))[name] == (32, 32, 1, 1)
    assert mapped_shapes(flat, keymaps_sd.unet_to_ldm(flat))["input_blocks.1.1.proj_in.weight"] == (32, 32, 1, 1)


def test_module_names_for_adapters() -> None:
    modules = keymaps_sd.UnetLayout.of(golden("sdxl_unet_diffusers")).modules()
    back = {diffusers: ldm for ldm, diffusers in modules.items()}
    for diffusers, ldm in {
        "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": "input_blocks.4.1.transformer_blocks.1.ff.net.2",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "up_blocks.2.resnets.1.conv_shortcut": "output_blocks.7.0.skip_connection",
        "add_embedding.linear_1": "label_emb.0.0",
    }.items():
        assert keymaps_sd.renamed(diffusers, back) == ldm
        assert keymaps_sd.renamed(ldm, modules) == diffusers


def test_unknown_names_stay_and_are_seen() -> None:
    file = {"model.diffusion_model.input_blocks.0.0.weight": (1,), "model.diffusion_model.surprise": (1,)}
    assert "surprise" in keymaps_sd.unet_from_file(file)
