"""Tiny checkpoints of SD3 and SD3.5 with the true names of tensors and files, for tests and trials."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.models import autoencoder, clip, keymaps, keymaps_sd3, t5
from library.models.keymaps import Mapped
from library.models.mmdit import MMDiT, MMDiTConfig
from library.models.positions import sincos_table
from tests import tiny, tiny_sd

Variant = Literal["medium", "5-medium", "5-large"]
VARIANTS: tuple[Variant, ...] = ("medium", "5-medium", "5-large")
CLIP_G_FOLDER = tiny_sd.OPEN_CLIP_FOLDER["xl"]
L_WIDTH, G_WIDTH, CONTEXT_WIDTH = 32, 64, 128
"""Of CLIP-L, CLIP-G and T5."""
PARTS = ("vae", *keymaps_sd3.ENCODERS)
"""What a single file can hold beside the transformer."""


def config(variant: Variant = "medium", *, depth: int = 2, table_side: int = 24) -> MMDiTConfig:
    """The sizes of a tiny transformer with all that a variant has."""
    return MMDiTConfig(
        depth=depth,
        width=64 * depth,
        mlp_width=4 * 64 * depth,
        context_width=CONTEXT_WIDTH,
        pooled_width=L_WIDTH + G_WIDTH,
        table_side=table_side,
        qk_norm=variant != "medium",
        dual_blocks=frozenset(range(depth - 1)) if variant == "5-medium" else frozenset(),
    )


def mmdit(variant: Variant = "medium", *, depth: int = 2, table_side: int = 24, seed: int = 21) -> MMDiT:
    """A transformer with random weights, and a true table of positions."""
    model = MMDiT(config(variant, depth=depth, table_side=table_side))
    tiny.fill(model, seed)
    for name, parameter in model.named_parameters():
        if ".ln_" in name:
            parameter.data = 1 + parameter.data
    model.pos_embed.copy_(sincos_table(model.config.width, table_side))
    return model


def encoder(name: str, *, layers: int = 2, seed: int = 24) -> nn.Module:
    """The text encoder `clip_l`, `clip_g` (with a projection) or `t5xxl`; the vocabularies are those of `tiny`."""
    model: nn.Module
    if name == "t5xxl":
        block = "encoder.block.0.layer"
        model = t5.build_t5(
            {
                "shared.weight": (len(tiny.t5_vocabulary()), CONTEXT_WIDTH),
                f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, 2),
                f"{block}.0.SelfAttention.q.weight": (32, CONTEXT_WIDTH),
                f"{block}.1.DenseReluDense.wi_0.weight": (64, CONTEXT_WIDTH),
                f"encoder.block.{layers - 1}.layer.0.SelfAttention.q.weight": (32, CONTEXT_WIDTH),
            }
        )
    else:
        width, second = (L_WIDTH, False) if name == "clip_l" else (G_WIDTH, True)
        shapes = tiny_sd.text_shapes(width, layers, projected=second)
        model = clip.build_clip(shapes, "gelu" if second else "quick_gelu")
    tiny.fill(model, seed + PARTS.index(name))
    return model.eval()


def vae(seed: int = 2) -> nn.Module:
    """An autoencoder of stride 8 with 16 latent channels."""
    model = autoencoder.build_autoencoder(tiny.autoencoder_shapes()).eval()
    tiny.fill(model, seed)
    return model


def encoder_tensors(name: str, seed: int = 24) -> dict[str, Tensor]:
    """The tensors of a text encoder under their names in files of their own, as published."""
    state = encoder(name, seed=seed).state_dict()
    if name == "t5xxl":
        return {key: tensor for key, tensor in state.items() if key != "shared.weight"}
    tensors = {clip.file_name(key): tensor for key, tensor in state.items()}
    return {keymaps.PROJECTION: torch.eye(L_WIDTH)} | tensors


def single_tensors(
    variant: Variant = "medium", parts: Collection[str] = PARTS, *, table_side: int = 24
) -> dict[str, Tensor]:
    """The tensors of a single file with these parts beside the transformer."""
    found: dict[str, Tensor] = {}
    for name, tensor in mmdit(variant, table_side=table_side).state_dict().items():
        found[f"model.diffusion_model.{name}"] = tensor
    for part in parts:
        if part == "vae":
            state = vae().state_dict()
            tensors: Mapping[str, Tensor] = Mapped(state, keymaps.vae_from_diffusers(state))
            prefix = "first_stage_model."
        else:
            tensors, prefix = encoder_tensors(part), keymaps_sd3.ENCODER_PREFIX.format(part)
            found[f"text_encoders.{part}.logit_scale"] = torch.tensor(4.6)
        found |= {prefix + name: tensor for name, tensor in tensors.items()}
    return found


def write_single(
    path: Path,
    variant: Variant = "medium",
    parts: Collection[str] = PARTS,
    *,
    table_side: int = 24,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A single file, by default with everything in it."""
    return tiny.save(single_tensors(variant, parts, table_side=table_side), path, dtype)


def write_encoder(path: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 24) -> Path:
    """The file of one text encoder."""
    return tiny.save(encoder_tensors(name, seed), path, dtype)


def write_vae(path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The file of an autoencoder."""
    return tiny.write_autoencoder(path, dtype=dtype)


def write_folder(folder: Path, variant: Variant = "medium", *, t5xxl: bool = True) -> Path:
    """A Diffusers folder that `StableDiffusion3Pipeline` loads, tokenizers included, written by Diffusers itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    autoencoder: Any = vae()
    autoencoder.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    parts: dict[str, Any] = {
        "transformer": diffusers_mmdit(mmdit(variant)),
        "vae": autoencoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": projected_clip_l(),
        "text_encoder_2": encoder("clip_g"),
    }
    if t5xxl:
        parts["text_encoder_3"] = encoder("t5xxl")
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None]}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(part).__name__]
    with TemporaryDirectory() as made:
        tokenizers = write_tokenizers(Path(made))
        kinds = (("", tiny.CLIP_FOLDER, "CLIP"), ("_2", CLIP_G_FOLDER, "CLIP"), ("_3", tiny.T5_FOLDER, "T5"))
        for number, source, kind in kinds:
            shutil.copytree(tokenizers / source, folder / f"tokenizer{number}")
            index[f"tokenizer{number}"] = ["transformers", f"{kind}TokenizerFast"]
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def projected_clip_l() -> nn.Module:
    """CLIP-L as Diffusers has it, with a projection that changes nothing."""
    shapes = tiny_sd.text_shapes(L_WIDTH, 2, projected=True)
    model = clip.build_clip(shapes, "quick_gelu").eval()
    tensors = encoder_tensors("clip_l")
    model.load_state_dict(dict(Mapped(tensors, clip.clip_keys(model, tensors))))
    return model


def diffusers_mmdit(model: MMDiT) -> Any:
    """Diffusers' class with the weights of ours."""
    from diffusers import SD3Transformer2DModel

    sizes = model.config
    other = SD3Transformer2DModel(
        sample_size=sizes.table_side * sizes.patch,
        patch_size=sizes.patch,
        in_channels=sizes.in_channels,
        num_layers=sizes.depth,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.width // sizes.head_width,
        joint_attention_dim=sizes.context_width,
        caption_projection_dim=sizes.width,
        pooled_projection_dim=sizes.pooled_width,
        out_channels=sizes.latent_channels,
        pos_embed_max_size=sizes.table_side,
        dual_attention_layers=tuple(sorted(sizes.dual_blocks)),
        qk_norm="rms_norm" if sizes.qk_norm else None,
    ).eval()
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    other.load_state_dict(dict(Mapped(state, keymaps_sd3.mmdit_to_diffusers(shapes))), strict=True)
    return other


def write_tokenizers(folder: Path) -> Path:
    """All three tokenizers as `--tokenizer_cache_dir` wants them.

    That of CLIP-G pads with the token 0, which is `!` in the real one.
    """
    tiny.write_tokenizers(folder)
    second = folder / CLIP_G_FOLDER
    tiny.write_clip_tokenizer(second)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = json.loads((second / name).read_text(encoding="utf-8")) | {
            "pad_token": next(iter(tiny.clip_vocabulary()))
        }
        (second / name).write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_all(
    folder: Path, variant: Variant = "medium", *, table_side: int = 24, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """`sd3`, a single file with everything; files of single parts `clip_l`, `clip_g`, `t5xxl`, `vae`; `tokenizers`."""
    return {
        "sd3": write_single(folder / "sd3.safetensors", variant, table_side=table_side, dtype=dtype),
        **{name: write_encoder(folder / f"{name}.safetensors", name, dtype=dtype) for name in keymaps_sd3.ENCODERS},
        "vae": write_vae(folder / "sd3_vae.safetensors", dtype=dtype),
        "tokenizers": write_tokenizers(folder / "tokenizers"),
    }
