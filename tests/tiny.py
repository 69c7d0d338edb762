"""Tiny checkpoints and tokenizers with the true names of tensors and files, for tests and trials."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files import save_safetensors
from library.models import autoencoder, clip, keymaps, t5
from library.models.flux import Flux, FluxConfig

CLIP_FOLDER = "openai_clip-vit-large-patch14"
T5_FOLDER = "google_t5-v1_1-xxl"
WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "painting", "the", "in", "style", "girl", "house", "sky")


def fill(module: nn.Module, seed: int) -> None:
    """Give all parameters of a module random values of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.1 * noise
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith(("weight", "scale")):
            parameter.data = 1 + parameter.data


def save(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> Path:
    """Write tensors in a type."""
    save_safetensors({name: tensor.detach().to(dtype) for name, tensor in tensors.items()}, path)
    return path


def flux_model(
    *,
    guidance: bool = True,
    width: int = 64,
    head_width: int = 32,
    double: int = 1,
    single: int = 2,
    context_width: int = 32,
    pooled_width: int = 32,
    seed: int = 1,
) -> Flux:
    """A FLUX.1 transformer of this size with random weights."""
    config = FluxConfig(
        width=width,
        head_width=head_width,
        mlp_width=4 * width,
        double_blocks=double,
        single_blocks=single,
        context_width=context_width,
        pooled_width=pooled_width,
        guidance=guidance,
    )
    model = Flux(config)
    fill(model, seed)
    return model


def write_flux(
    path: Path,
    *,
    guidance: bool = True,
    width: int = 64,
    head_width: int = 32,
    double: int = 1,
    single: int = 2,
    context_width: int = 32,
    pooled_width: int = 32,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Path:
    """A FLUX.1 transformer, BFL names."""
    model = flux_model(
        guidance=guidance,
        width=width,
        head_width=head_width,
        double=double,
        single=single,
        context_width=context_width,
        pooled_width=pooled_width,
        seed=seed,
    )
    return save({prefix + name: tensor for name, tensor in model.state_dict().items()}, path, dtype)


def autoencoder_shapes(base: int = 8, multipliers: tuple[int, ...] = (1, 1, 2, 2)) -> dict[str, tuple[int, ...]]:
    """The few shapes of an autoencoder that tell its size, LDM names; stride 2 ** (levels - 1), 16 latent channels."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv_in.weight": (base, 3, 3, 3),
        "decoder.conv_in.weight": (base * multipliers[-1], 16, 3, 3),
        "decoder.conv_out.weight": (3, base, 3, 3),
        "encoder.mid.attn_1.q.weight": (base * multipliers[-1], base * multipliers[-1], 1, 1),
    }
    for level, multiplier in enumerate(multipliers):
        shapes[f"encoder.down.{level}.block.0.conv1.weight"] = (base * multiplier, 1, 3, 3)
    return shapes


def write_autoencoder(
    path: Path, *, base: int = 8, diffusers: bool = False, dtype: torch.dtype = torch.float32, seed: int = 2
) -> Path:
    """An autoencoder of stride 8 with 16 latent channels, LDM or Diffusers names."""
    model = autoencoder.build_autoencoder(autoencoder_shapes(base))
    fill(model, seed)
    tensors: Mapping[str, Tensor] = model.state_dict()
    if not diffusers:
        tensors = keymaps.Mapped(tensors, keymaps.vae_from_diffusers(tensors))
    return save(tensors, path, dtype)


def write_clip_l(
    path: Path,
    *,
    width: int = 32,
    layers: int = 2,
    vocabulary: int | None = None,
    positions: int = 77,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
) -> Path:
    """A CLIP text encoder, Hugging Face names; the vocabulary is that of the tiny tokenizer."""
    shapes: dict[str, tuple[int, ...]] = {
        keymaps.CLIP_TOKENS: (vocabulary or len(clip_vocabulary()), width),
        "text_model.encoder.layers.0.mlp.fc1.weight": (2 * width, width),
        f"text_model.encoder.layers.{layers - 1}.mlp.fc1.weight": (2 * width, width),
        "text_model.embeddings.position_embedding.weight": (positions, width),
    }
    model = clip.build_clip(shapes)
    fill(model, seed)
    return save({clip.file_name(name): tensor for name, tensor in model.state_dict().items()}, path, dtype)


def write_t5(
    path: Path,
    *,
    width: int = 32,
    heads: int = 2,
    layers: int = 2,
    vocabulary: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 4,
) -> Path:
    """A T5 encoder, Hugging Face names; the vocabulary is that of the tiny tokenizer."""
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (vocabulary or len(t5_vocabulary()), width),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (width, width),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (2 * width, width),
        f"encoder.block.{layers - 1}.layer.0.SelfAttention.q.weight": (width, width),
    }
    model = t5.build_t5(shapes)
    fill(model, seed)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return save(tensors, path, dtype)


def byte_letters() -> list[str]:
    """The 256 characters by which byte-level tokenizers write bytes, in the order of the bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def clip_merges() -> list[tuple[str, str]]:
    """Merges that make one token of each of a few words."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    return list(merges)


def clip_vocabulary() -> dict[str, int]:
    """Token -> id of the tiny CLIP tokenizer; the end token is the last, as in the real one."""
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in clip_merges()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces and scores of the tiny T5 tokenizer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS]
    pieces += [(chr(code), -6.0) for code in range(ord("!"), ord("~") + 1)]
    return pieces


def write_tokenizers(folder: Path) -> Path:
    """Both tokenizers as `--tokenizer_cache_dir` wants them."""
    write_clip_tokenizer(folder / CLIP_FOLDER)
    _write_t5_tokenizer(folder / T5_FOLDER)
    return folder


def write_clip_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    merges = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in clip_merges())])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8", newline="\n")
    _write_json(folder / "vocab.json", clip_vocabulary())
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", special)
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", config)


def _write_t5_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(t5_vocabulary(), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    config = special | {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8", newline="\n")


def write_all(folder: Path, *, guidance: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """All that a FLUX script needs: `flux`, `ae`, `clip_l`, `t5xxl` files and the `tokenizers` folder."""
    return {
        "flux": write_flux(folder / "flux.safetensors", guidance=guidance, dtype=dtype),
        "ae": write_autoencoder(folder / "ae.safetensors", dtype=dtype),
        "clip_l": write_clip_l(folder / "clip_l.safetensors", dtype=dtype),
        "t5xxl": write_t5(folder / "t5xxl.safetensors", dtype=dtype),
        "tokenizers": write_tokenizers(folder / "tokenizers"),
    }
