"""Tiny checkpoints of SD 1.x, SD 2.x and SDXL with the true names of tensors and files, for tests and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.files import save_safetensors
from library.models import autoencoder, clip, keymaps, keymaps_sd
from library.models.keymaps import Mapped
from library.models.keymaps_sd import Version
from library.models.loading_sd import build_encoder
from tests import tiny

OPEN_CLIP_FOLDER = {"2": "stabilityai_stable-diffusion-2", "xl": "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"}
WIDTHS = {"text_encoder": 32, "text_encoder_2": 64}
"""Of the text encoders; the outputs of SDXL's are joined."""
VAE_SCALES = {"1": 0.18215, "2": 0.18215, "xl": 0.13025}


def unet_settings(version: Version, width: int = 32) -> dict[str, Any]:
    """Arguments of Diffusers' U-Net with all levels of a version, `width` channels on the first."""
    if version == "xl":
        return {
            "block_out_channels": (width, 2 * width, 2 * width),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": tuple(max(1, channels // 64) for channels in (width, 2 * width, 2 * width)),
            "cross_attention_dim": sum(WIDTHS.values()),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": WIDTHS["text_encoder_2"] + 6 * 256,
        }
    channels = (width, 2 * width, 2 * width, 2 * width)
    heads = 8 if version == "1" else tuple(max(1, number // 64) for number in channels)
    return {
        "block_out_channels": channels,
        "attention_head_dim": heads,
        "cross_attention_dim": WIDTHS["text_encoder"],
        "use_linear_projection": version == "2",
    }


def unet(version: Version, *, width: int = 32, seed: int = 11, **more: Any) -> nn.Module:
    """A U-Net with random weights, made by Diffusers from its settings."""
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(**unet_settings(version, width) | more).eval()
    tiny.fill(model, seed)
    return model


def text_shapes(width: int, layers: int, *, projected: bool = False) -> dict[str, tuple[int, ...]]:
    """The few shapes of a text encoder that tell its size; its vocabulary is that of the tiny tokenizer."""
    shapes: dict[str, tuple[int, ...]] = {
        keymaps.CLIP_TOKENS: (len(tiny.clip_vocabulary()), width),
        "text_model.encoder.layers.0.mlp.fc1.weight": (2 * width, width),
        f"text_model.encoder.layers.{layers - 1}.mlp.fc1.weight": (2 * width, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    return shapes | ({keymaps.PROJECTION: (width, width)} if projected else {})


def encoders(version: Version, *, layers: int = 2, seed: int = 12) -> dict[str, nn.Module]:
    """The text encoders with random weights, by name. That of SD 2.x has the layers that are used."""
    wanted = ("text_encoder", "text_encoder_2") if version == "xl" else ("text_encoder",)
    models = {
        name: build_encoder(text_shapes(WIDTHS[name], layers, projected=name == "text_encoder_2"), name, version).eval()
        for name in wanted
    }
    for index, model in enumerate(models.values()):
        tiny.fill(model, seed + index)
    return models


def vae(*, base: int = 8, seed: int = 14) -> nn.Module:
    """An autoencoder of stride 8 with 4 latent channels."""
    shapes = tiny.autoencoder_shapes(base) | {
        "decoder.conv_in.weight": (2 * base, 4, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }
    model = autoencoder.build_autoencoder(shapes).eval()
    tiny.fill(model, seed)
    return model


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a text encoder under their names in files."""
    return {clip.file_name(name): tensor for name, tensor in model.state_dict().items()}


def single_tensors(version: Version, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a single file, as published: SD 2.x with its unused last layer, OpenCLIP towers with extras."""
    parts = {"unet": unet(version, seed=11 + seed), **encoders(version, seed=12 + seed), "vae": vae(seed=14 + seed)}
    state = parts["unet"].state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tensors = _prefixed("model.diffusion_model.", Mapped(state, keymaps_sd.unet_to_ldm(shapes)))
    ldm_vae = Mapped(parts["vae"].state_dict(), keymaps.vae_from_diffusers(parts["vae"].state_dict()))
    tensors |= _prefixed("first_stage_model.", ldm_vae)
    first = file_tensors(parts["text_encoder"])
    if version == "2":
        tower = Mapped(first, keymaps_sd.open_clip_to_ldm(first) | keymaps_sd.made_up_sd2(first))
        tower = dict(tower) | {"text_projection": torch.full((32, 32), 0.5), "attn_mask": torch.zeros(77, 77)}
        return tensors | _prefixed("cond_stage_model.model.", tower)
    if version == "1":
        return tensors | _prefixed("cond_stage_model.transformer.", first)
    second = file_tensors(parts["text_encoder_2"])
    tower = dict(Mapped(second, keymaps_sd.open_clip_to_ldm(second))) | {"logit_scale": torch.tensor(4.6)}
    tensors |= _prefixed("conditioner.embedders.0.transformer.", first)
    return tensors | _prefixed("conditioner.embedders.1.model.", tower)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write_single(
    path: Path,
    version: Version,
    *,
    more: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A single file with all parts, `.safetensors` or `.ckpt` by its name; `more`: tensors that are there, too."""
    tensors = single_tensors(version, seed=seed) | dict(more or {})
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_safetensors(tensors, path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 470000}, path)
    return path


def write_folder(folder: Path, version: Version, *, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A Diffusers folder with all parts and tokenizers, written by Diffusers and Transformers themselves."""
    from diffusers import DDIMScheduler

    parts = {"unet": unet(version, seed=11 + seed), **encoders(version, seed=12 + seed), "vae": vae(seed=14 + seed)}
    parts["vae"].register_to_config(scaling_factor=VAE_SCALES[version])
    for name, model in parts.items():
        model.save_pretrained(folder / name)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    ).save_pretrained(folder / "scheduler")
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if version == "xl" else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    for name in encoders(version):
        index[name] = ["transformers", classes[name]]
        tokenizer = name.replace("text_encoder", "tokenizer")
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
        tiny.write_clip_tokenizer(folder / tokenizer)
    if version != "xl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
