"""The FLUX.1 transformer, in the layout and with the names of its authors' checkpoints.

B images, N image tokens (2x2 latent cells each), L text tokens, D width, H heads of width d. Wherever image and text
tokens form one sequence, the text comes first.

Source: black-forest-labs/flux; "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(arXiv 2403.03206) for the two-stream block, "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442)
for the parallel single-stream block, "RoFormer" (arXiv 2104.09864) for the rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.log import DataError
from library.models.attention import attention
from library.models.keymaps import count_indices

PATCH = 2
"""Latent cells per side of a token."""
THETA = 10_000
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer; the defaults are those of FLUX.1-dev."""

    in_channels: int = 64
    out_channels: int = 64
    width: int = 3072
    head_width: int = 128
    mlp_width: int = 12288
    double_blocks: int = 19
    single_blocks: int = 38
    context_width: int = 4096
    pooled_width: int = 768
    frequencies: int = 256
    """Width of the sinusoidal embedding of timestep and guidance."""
    guidance: bool = True
    """Whether the guidance strength is an input (dev) or not (schnell)."""

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_width

    @property
    def axes(self) -> tuple[int, int, int]:
        """Rotary features per head for the three position axes: (unused, row, column)."""
        side = self.head_width * 7 // 16
        return self.head_width - 2 * side, side, side

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
        """The sizes of the checkpoint with these tensors, BFL names.

        Raises:
            DataError: a tensor that tells a size is missing.
        """
        try:
            width, in_channels = shapes["img_in.weight"]
            return cls(
                in_channels=in_channels,
                out_channels=shapes["final_layer.linear.weight"][0],
                width=width,
                head_width=shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0],
                mlp_width=shapes["double_blocks.0.img_mlp.0.weight"][0],
                double_blocks=count_indices(shapes, r"double_blocks\.(\d+)\."),
                single_blocks=count_indices(shapes, r"single_blocks\.(\d+)\."),
                context_width=shapes["txt_in.weight"][1],
                pooled_width=shapes["vector_in.in_layer.weight"][1],
                frequencies=shapes["time_in.in_layer.weight"][1],
                guidance="guidance_in.in_layer.weight" in shapes,
            )
        except KeyError as missing:
            what = f"not a FLUX.1 transformer: it has no tensor {missing}"
            raise DataError(what, code="E-MODEL-KIND") from None


class Flux(nn.Module):
    """FLUX.1: predicts the velocity of packed latents."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.width)
        self.txt_in = nn.Linear(config.context_width, config.width)
        self.time_in = MLPEmbedder(config.frequencies, config.width)
        self.vector_in = MLPEmbedder(config.pooled_width, config.width)
        self.guidance_in = MLPEmbedder(config.frequencies, config.width) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.single_blocks))
        self.final_layer = LastLayer(config.width, config.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, N, C) of noisy packed latents.

        Args:
            img: (B, N, C) from `patchify`.
            img_ids: (B, N, 3) from `image_ids`.
            txt: (B, L, E) from the T5 encoder.
            txt_ids: (B, L, 3), zeros.
            timesteps: (B,) in [0, 1]; 1 is pure noise.
            pooled: (B, P) from the CLIP encoder.
            guidance: (B,) guidance strength; models without a guidance input ignore it.
            txt_mask: (B, L) boolean, False for text tokens that nobody may look at.
        """
        img = self.img_in(img)  # (B, N, D)
        txt = self.txt_in(txt)  # (B, L, D)
        vec = self.time_in(self._embed(timesteps, img))  # (B, D)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model needs a guidance strength")
            vec = vec + self.guidance_in(self._embed(guidance, img))
        vec = vec + self.vector_in(pooled)

        rotation = rotary_tables(torch.cat((txt_ids, img_ids), dim=1), self.config.axes)
        mask = None if txt_mask is None else key_mask(txt_mask, img.shape[1])

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotation, mask)

        x = torch.cat((txt, img), dim=1)  # (B, L+N, D)
        for block in self.single_blocks:
            x = block(x, vec, rotation, mask)

        velocity: Tensor = self.final_layer(x[:, txt.shape[1] :], vec)  # (B, N, C)
        return velocity

    def _embed(self, t: Tensor, like: Tensor) -> Tensor:
        return timestep_embedding(t, self.config.frequencies).to(like.dtype)


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own meet in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, mlp_width = config.width, config.mlp_width

        self.img_mod = Modulation(width, 2)
        self.img_attn = SelfAttention(width, config.head_width)
        self.img_mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width)
        )

        self.txt_mod = Modulation(width, 2)
        self.txt_attn = SelfAttention(width, config.head_width)
        self.txt_mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width)
        )

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rotation: Rotation, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next img (B, N, D) and txt (B, L, D)."""
        img_attend, img_think = self.img_mod(vec)
        txt_attend, txt_think = self.txt_mod(vec)

        img_q, img_k, img_v = self.img_attn.heads(img_attend.modulate(img))  # (B, N, H, d)
        txt_q, txt_k, txt_v = self.txt_attn.heads(txt_attend.modulate(txt))  # (B, L, H, d)

        q = torch.cat((txt_q, img_q), dim=1)  # (B, L+N, H, d)
        k = torch.cat((txt_k, img_k), dim=1)
        v = torch.cat((txt_v, img_v), dim=1)
        attended = attention(rotate(q, rotation), rotate(k, rotation), v, mask)  # (B, L+N, D)
        txt_attended, img_attended = attended.split_with_sizes((txt.shape[1], img.shape[1]), dim=1)

        img = img_attend.add_gated(img, self.img_attn.proj(img_attended))
        img = img_think.add_gated(img, self.img_mlp(img_think.modulate(img)))

        txt = txt_attend.add_gated(txt, self.txt_attn.proj(txt_attended))
        txt = txt_think.add_gated(txt, self.txt_mlp(txt_think.modulate(txt)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """All tokens with the same weights; attention and MLP side by side."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.split = (3 * config.width, config.mlp_width)
        self.head_width = config.head_width
        self.modulation = Modulation(config.width, 1)
        self.linear1 = nn.Linear(config.width, sum(self.split))
        self.linear2 = nn.Linear(config.width + config.mlp_width, config.width)
        self.norm = QKNorm(config.head_width)

    def forward(self, x: Tensor, vec: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """The next x (B, L+N, D)."""
        modulation: Modulate
        (modulation,) = self.modulation(vec)
        qkv, hidden = self.linear1(modulation.modulate(x)).split_with_sizes(self.split, dim=-1)
        q, k, v = split_heads(qkv, 3, self.head_width)  # (B, L+N, H, d)
        q, k = self.norm(q, k)
        attended = attention(rotate(q, rotation), rotate(k, rotation), v, mask)  # (B, L+N, D)
        both = torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1)
        return modulation.add_gated(x, self.linear2(both))


class LastLayer(nn.Module):
    """From tokens to packed latents."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, N, C) from x (B, N, D)."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(torch.addcmul(shift, 1 + scale, _layer_norm(x)))
        return out


class SelfAttention(nn.Module):
    """The weights around the attention of one stream."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(head_width)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, L, H, d)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_width)
        return *self.norm(q, k), v


class QKNorm(nn.Module):
    """RMS norm of queries and keys, per head."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normed q and k."""
        return self.query_norm(q), self.key_norm(k)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, reckoned in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """As x."""
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), _EPS)  # float32 inside for every type


class Modulate(NamedTuple):
    """Shift, scale and gate (B, 1, D) of one half of a block."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, x: Tensor) -> Tensor:
        """(1 + scale) * LN(x) + shift."""
        return torch.addcmul(self.shift, 1 + self.scale, _layer_norm(x))

    def add_gated(self, x: Tensor, change: Tensor) -> Tensor:
        """x + gate * change."""
        return torch.addcmul(x, self.gate, change)


class Modulation(nn.Module):
    """What timestep, guidance and pooled text make of the norms and gates of a block."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, 3 * count * width)

    def forward(self, vec: Tensor) -> tuple[Modulate, ...]:
        """`count` modulations."""
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.count, dim=-1)
        return tuple(Modulate(*parts[3 * i : 3 * i + 3]) for i in range(self.count))


class MLPEmbedder(nn.Module):
    """A vector, brought to the width of the model."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_width, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D)"""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Rotation(NamedTuple):
    """Rotary tables, float32, (B, L, 1, d): each pair of features shares an angle."""

    cos: Tensor
    sin: Tensor
    """Negative at the first feature of each pair."""


def split_heads(x: Tensor, count: int, width: int) -> tuple[Tensor, ...]:
    """`count` tensors (B, L, H, width) of x (B, L, count * H * width)."""
    return x.view(*x.shape[:-1], count, -1, width).unbind(-3)


def rotary_tables(ids: Tensor, axes: tuple[int, ...], theta: float = THETA) -> Rotation:
    """Tables for `rotate` from positions (B, L, len(axes)); `axes` are the numbers of features per position axis."""
    device = ids.device if ids.device.type != "mps" else torch.device("cpu")  # MPS knows no float64
    positions = ids.to(device=device, dtype=torch.float64)
    angles = torch.cat([positions[..., i, None] * _frequencies(axis, theta, device) for i, axis in enumerate(axes)], -1)
    cos = torch.stack((angles.cos(), angles.cos()), dim=-1).flatten(-2)
    sin = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)
    return Rotation(*(table[:, :, None].to(torch.float32).to(ids.device) for table in (cos, sin)))


def _frequencies(axis: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, axis, 2, dtype=torch.float64, device=device) / axis
    return theta**-exponents  # (axis / 2,)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, L, H, d) with each adjacent pair of features turned by the angle of its position, in float32."""
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin).to(x.dtype)


def timestep_embedding(t: Tensor, width: int, period: float = 10_000, factor: float = 1000) -> Tensor:
    """Cosines, then sines, of `factor * t` at `width / 2` frequencies: (B, width) float32 from t (B,)."""
    half = width // 2
    frequencies = torch.exp(-math.log(period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = factor * t.to(torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def key_mask(txt_mask: Tensor, image_tokens: int) -> Tensor:
    """Attention mask (B, 1, 1, L+N): which text tokens may be seen; image tokens always may."""
    return F.pad(txt_mask.bool(), (0, image_tokens), value=True)[:, None, None]


def patchify(latents: Tensor) -> Tensor:
    """Tokens (B, N, 4C) of latents (B, C, h, w), row by row; features ordered channel, row, column of the patch."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, h, w) of tokens (B, N, 4C); height and width in latent cells."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height // PATCH, width // PATCH), PATCH)


def image_ids(latents: Tensor) -> Tensor:
    """Positions (B, N, 3) float32 of the tokens of latents (B, C, h, w): zero, row, column."""
    batch, _, height, width = latents.shape
    sides = (1, height // PATCH, width // PATCH)
    grid = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32, device=latents.device) for side in sides))
    return grid.expand(batch, -1, -1)


def text_ids(txt: Tensor) -> Tensor:
    """Positions (B, L, 3) of text tokens (B, L, E): all zero."""
    return torch.zeros(*txt.shape[:2], 3, device=txt.device)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)
