"""LoRAs for FLUX.1 in two layouts: that of sd-scripts, and that of AI-toolkit, Diffusers and PEFT.

They differ in names, in alpha, which the latter has folded into its matrices, and in fused layers: where one layer of
the authors holds queries, keys and values (and the MLP's input), Diffusers has a layer for each. Parts that differ
become one LoRA by stacking the down matrices and a block-diagonal up matrix; parts with one down matrix by stacking the
up matrices. Both ways the change of the weight stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from library.log import DataError
from library.models.keymaps import flux_names
from networks import reading
from networks.adapter_file import is_finite
from networks.splitting import diagonal

DENOISERS = ("transformer.", "diffusion_model.")
"""What the names of the transformer begin with in the layout of Diffusers; the first is written."""
ENCODERS = {"text_encoder.": "lora_te1_", "text_encoder_2.": "lora_te3_"}
"""Beginnings of the names of text encoders there -> in files of sd-scripts."""
Tensors = Mapping[str, Tensor]

UNET = "lora_unet_"
MLP_RATIO = 4
"""Width of the MLP over that of the model, for files that don't show it."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Layers whose halves are the other way round in Diffusers."""

_WRAPPER = re.compile(r"^(base_model\.model\.)?")
_FACTORS = {
    "down": ("lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_down.weight"),
    "up": ("lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_up.weight"),
    "alpha": ("alpha",),
}
_BARE = re.compile(r"(single_)?transformer_blocks\.\d+\.|(double|single)_blocks\.\d+\.")
_CLIP = re.compile(r"text_model_encoder_layers_(\d+)_(?:(self_attn)_((?:q|k|v|out)_proj)|(mlp)_(fc[12]))")
_T5 = re.compile(r"encoder_block_(\d+)_layer_(\d+)_(?:(SelfAttention)_([qkvo])|(DenseReluDense)_(wi_0|wi_1|wo))")


@dataclass
class Converted:
    """The result of a conversion."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Keys that have no counterpart."""
    modules: int = 0
    """How many modules of the source were converted."""


class Factors(NamedTuple):
    """A LoRA on one layer."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of the down matrix."""
        return self.down.shape[0]


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are names of the layout of Diffusers."""
    return any(_split(name) is not None for name in names)


# Diffusers -> sd-scripts


def from_diffusers(tensors: Mapping[str, Tensor]) -> Converted:
    """The LoRA in the layout of sd-scripts.

    Errors: DataError when a module lacks one of its matrices, or shapes don't fit together.
    """
    found, result = _modules(tensors)
    table = _table(tensors)
    owners = {theirs: (ours, index) for ours, names in table.items() for index, theirs in enumerate(names)}
    widths = _mlp_widths(found)
    fused: dict[str, list[Factors | None]] = {}
    for (start, path), factors in found.items():
        if start in ENCODERS:
            _put(result.tensors, ENCODERS[start] + path.replace(".", "_"), factors)
        elif path in table:  # the authors' names behind a prefix of ComfyUI
            _put(result.tensors, UNET + path.replace(".", "_"), factors)
        elif path in owners:
            ours, index = owners[path]
            factors = _swapped(factors) if ours in SWAPPED else factors
            fused.setdefault(ours, [None] * len(table[ours]))[index] = factors
        else:
            result.unknown += [key for key in tensors if (parts := _split(key)) and parts[1] == path]
            continue
        result.modules += 1
    for ours, layers in fused.items():
        _put(result.tensors, UNET + ours.replace(".", "_"), fuse(layers, ours, widths))
    return result


def fuse(parts: Sequence[Factors | None], name: str, mlp_width: int | None = None) -> Factors:
    """One LoRA on a layer that holds several, one below the other; None: a part that isn't changed.

    Args:
        mlp_width: rows of the fourth part, where it isn't there to tell.

    Errors: DataError when the inputs differ in width.
    """
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    width = present[0].down.shape[1]
    if any(part.down.shape[1] != width for part in present):
        what = f"{name}: the parts have inputs of different widths"
        raise DataError(what, "network weights", "the file is damaged or not for FLUX.1", code="E-NETWORK-SHAPE")
    usual = [width] * 3 + [mlp_width or MLP_RATIO * width]
    rows = [usual[index] if part is None else part.up.shape[0] for index, part in enumerate(parts)]
    ups = [None if part is None else _scaled(part.up, part.alpha / part.rank) for part in parts]
    first = present[0]
    if len(present) == len(parts) and all(torch.equal(part.down, first.down) for part in present):
        return Factors(first.down, torch.cat([up for up in ups if up is not None]), first.rank)
    rank = sum(part.rank for part in present)
    up = first.up.new_zeros(sum(rows), rank)
    column = 0
    for start, part in zip(accumulate(rows, initial=0), ups, strict=False):
        if part is not None:
            up[start : start + part.shape[0], column : column + part.shape[1]] = part
            column += part.shape[1]
    return Factors(torch.cat([part.down for part in present]), up, rank)


# sd-scripts -> Diffusers


def to_diffusers(tensors: Mapping[str, Tensor]) -> Converted:
    """The LoRA in the layout of Diffusers, alpha folded into the matrices.

    Errors: DataError when a module is of another kind than LoRA.
    """
    result = Converted()
    table = {UNET + ours.replace(".", "_"): names for ours, names in _table(tensors).items()}
    swapped = {UNET + ours.replace(".", "_") for ours in SWAPPED}
    result.unknown += [key for key in tensors if "." not in key]
    for module, parts in reading.by_module(tensors).items():
        encoder = _encoder_path(module)
        names = [encoder] if encoder else [DENOISERS[0] + name for name in table.get(module, ())]
        if not names:
            result.unknown += [f"{module}.{key}" for key in parts]
            continue
        factors = fold(_plain(module, parts))
        factors = _swapped(factors) if module in swapped else factors
        for name, (down, up, _) in zip(names, separate(factors, len(names)), strict=True):
            result.tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        result.modules += 1
    return result


def fold(factors: Factors) -> Factors:
    """The same change with alpha equal to the rank; small scales are shared between the matrices by powers of two."""
    down_scale, up_scale = factors.alpha / factors.rank, 1.0
    while 0 < abs(down_scale) * 2 < up_scale:
        down_scale, up_scale = down_scale * 2, up_scale / 2
    return Factors(_scaled(factors.down, down_scale), _scaled(factors.up, up_scale), factors.rank)


def separate(factors: Factors, count: int) -> list[Factors]:
    """A LoRA for each of the layers that are fused in one; see `fuse`. Errors: DataError when the rows don't fit."""
    if count == 1:
        return [factors]
    rows, width = factors.up.shape[0], factors.down.shape[1]
    sizes = [rows // 3] * 3 if count == 3 else [width] * 3 + [rows - 3 * width]
    if sum(sizes) != rows or min(sizes) < 1:
        what = f"{rows} outputs don't make {count} layers"
        raise DataError(what, "network weights", "the file is damaged or not for FLUX.1", code="E-NETWORK-SHAPE")
    blocks = diagonal(factors.up, sizes) if factors.rank % count == 0 else None
    if blocks is None:
        return [Factors(factors.down, up, factors.rank) for up in factors.up.split_with_sizes(sizes)]
    downs = factors.down.chunk(count)
    rank = factors.rank // count
    return [Factors(down, up, rank) for down, up in zip(downs, blocks.split_with_sizes(sizes), strict=True)]


# names


def _modules(tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], Factors], Converted]:
    """The modules of a file by beginning and path. Errors: DataError when a matrix is missing."""
    pieces: dict[tuple[str, str], dict[str, Tensor]] = {}
    result = Converted()
    for key in tensors:
        parts = _split(key)
        if parts is None:
            result.unknown.append(key)
        else:
            pieces.setdefault(parts[:2], {})[parts[2]] = tensors[key]
    found = {}
    for (start, path), named in pieces.items():
        if not named.keys() >= {"down", "up"}:
            what = f"{start}{path} has only one of its two matrices"
            raise DataError(what, "network weights", "the file is incomplete", code="E-NETWORK-FILE")
        found[start, path] = _checked(start + path, named["down"], named["up"], named.get("alpha"))
    return found, result


def _split(key: str) -> tuple[str, str, str] | None:
    """Beginning, path and matrix (down, up, alpha) that a name means; None: it isn't of this layout."""
    name = _WRAPPER.sub("", key)
    start = next((start for start in (*DENOISERS, *ENCODERS) if name.startswith(start)), "")
    if not start and not _BARE.match(name):
        return None
    for matrix, ends in _FACTORS.items():
        end = next((end for end in ends if name.endswith("." + end)), None)
        if end:
            path = name.removeprefix(start).removesuffix("." + end)
            return (start if start in ENCODERS else DENOISERS[0]), path, matrix
    return None


def _table(names: Iterable[str]) -> dict[str, list[str]]:
    """Paths of the authors' layers -> of Diffusers', for as many blocks as a file has."""
    indices = [int(number) for name in names for number in re.findall(r"blocks[._](\d+)[._]", name)]
    count = 1 + max(indices, default=-1)
    return {
        ours.removesuffix(".weight"): [name.removesuffix(".weight") for name in theirs]
        for ours, theirs in flux_names(count, count).items()
        if ours.endswith(".weight")
    }


def _encoder_path(module: str) -> str | None:
    """The name there of a text encoder's module; None: it isn't one."""
    if module.startswith("lora_te1_") and (match := _CLIP.fullmatch(module.removeprefix("lora_te1_"))):
        number, *rest = match.groups()
        return ".".join(("text_encoder.text_model.encoder.layers", number, *filter(None, rest)))
    for prefix in ("lora_te3_", "lora_te2_"):  # the latter from programs that number the encoders of FLUX
        if module.startswith(prefix) and (match := _T5.fullmatch(module.removeprefix(prefix))):
            block, layer, *rest = match.groups()
            return ".".join(("text_encoder_2.encoder.block", block, "layer", layer, *filter(None, rest)))
    return None


def _mlp_widths(found: Mapping[tuple[str, str], Factors]) -> int | None:
    """The width of the MLP in single blocks, where a file shows it."""
    for (_, path), factors in found.items():
        if path.endswith(".proj_mlp"):
            return factors.up.shape[0]
        if re.fullmatch(r"single_transformer_blocks\.\d+\.proj_out", path):
            return factors.down.shape[1] - factors.up.shape[0]
    return None


def _plain(module: str, parts: Mapping[str, Tensor]) -> Factors:
    if not {"lora_down.weight", "lora_up.weight"} <= parts.keys() <= {"lora_down.weight", "lora_up.weight", "alpha"}:
        what = f"{module} isn't a plain LoRA: it has {', '.join(sorted(parts)[:3])}"
        hint = "convert it with networks/convert_lora.py"
        raise DataError(what, "network weights", hint, code="E-NETWORK-FILE")
    return _checked(module, parts["lora_down.weight"], parts["lora_up.weight"], parts.get("alpha"))


def _checked(name: str, down: Tensor, up: Tensor, alpha: Tensor | None) -> Factors:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        what = f"{name}: matrices of {tuple(down.shape)} and {tuple(up.shape)} don't make a LoRA"
        raise DataError(what, "network weights", "the file is damaged or not for FLUX.1", code="E-NETWORK-SHAPE")
    for tensor in (down, up):
        if not is_finite(tensor):
            raise DataError(f"{name} holds NaN or inf", "network weights", "train it anew", code="E-TENSOR-FINITE")
    return Factors(down, up, float(down.shape[0]) if alpha is None else float(alpha))


def _put(tensors: dict[str, Tensor], module: str, factors: Factors) -> None:
    tensors |= {
        f"{module}.lora_down.weight": factors.down,
        f"{module}.lora_up.weight": factors.up,
        f"{module}.alpha": torch.tensor(factors.alpha).to(factors.down.dtype),
    }


def _swapped(factors: Factors) -> Factors:
    return factors._replace(up=torch.cat(factors.up.chunk(2)[::-1]))


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)
