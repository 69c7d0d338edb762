"""The transformer of SD3 and SD3.5, MMDiT, in the layout and with the names of its authors' checkpoints.

B images, H x W image tokens (2x2 latent cells each, N in all), L text tokens, D width, d width of a head. Wherever
image and text tokens form one sequence, the text comes first.

Source: Stability-AI/sd3.5; "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv
2403.03206), with the RMS norm of queries and keys and, in SD3.5-medium, the second attention of its successors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.log import DataError
from library.models.attention import attention
from library.models.flux import LastLayer, Modulate, split_heads, timestep_embedding
from library.models.keymaps import count_indices
from library.models.positions import crop

HEAD_WIDTH = 64
"""Of all published models; where queries and keys aren't normed, no tensor tells it."""
_EPS = 1e-6
_SECOND = "joint_blocks.{}.x_block.attn2.qkv.weight"


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are those of SD3-medium."""

    in_channels: int = 16
    latent_channels: int = 16
    """That come out."""
    patch: int = 2
    """Latent cells per side of a token."""
    depth: int = 24
    width: int = 1536
    head_width: int = HEAD_WIDTH
    mlp_width: int = 6144
    context_width: int = 4096
    pooled_width: int = 2048
    frequencies: int = 256
    """Width of the sinusoidal embedding of the timestep."""
    table_side: int = 192
    """Rows, and columns, of tokens in the table of positions."""
    qk_norm: bool = False
    """Whether queries and keys are normed, as in SD3.5."""
    dual_blocks: frozenset[int] = frozenset()
    """The blocks with a second attention, among image tokens only, as in SD3.5-medium."""

    @property
    def out_channels(self) -> int:
        """Of a token."""
        return self.patch**2 * self.latent_channels

    @property
    def variant(self) -> str:
        """`medium`, `5-medium` or `5-large`."""
        return "5-medium" if self.dual_blocks else "5-large" if self.qk_norm else "medium"

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> MMDiTConfig:
        """The sizes of the checkpoint with these tensors, the authors' names.

        Raises:
            DataError: a tensor that tells a size is missing.
        """
        try:
            width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
            norm = shapes.get("joint_blocks.0.context_block.attn.ln_k.weight")
            depth = count_indices(shapes, r"joint_blocks\.(\d+)\.")
            return cls(
                in_channels=in_channels,
                latent_channels=shapes["final_layer.linear.weight"][0] // patch**2,
                patch=patch,
                depth=depth,
                width=width,
                head_width=norm[0] if norm else HEAD_WIDTH,
                mlp_width=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
                context_width=shapes["context_embedder.weight"][1],
                pooled_width=shapes["y_embedder.mlp.0.weight"][1],
                frequencies=shapes["t_embedder.mlp.0.weight"][1],
                table_side=math.isqrt(shapes["pos_embed"][1]),
                qk_norm=norm is not None,
                dual_blocks=frozenset(i for i in range(depth) if _SECOND.format(i) in shapes),
            )
        except KeyError as missing:
            raise DataError(f"not an SD3 transformer: it has no tensor {missing}", code="E-MODEL-KIND") from None


class MMDiT(nn.Module):
    """SD3: predicts the velocity of latents."""

    pos_embed: Tensor
    """(1, side * side, D), row by row."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.register_buffer("pos_embed", torch.zeros(1, config.table_side**2, config.width))
        self.t_embedder = Embedder(config.frequencies, config.width)
        self.y_embedder = Embedder(config.pooled_width, config.width)
        self.context_embedder = nn.Linear(config.context_width, config.width)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final_layer = LastLayer(config.width, config.out_channels)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """The velocity (B, C, h, w) of noisy latents.

        Args:
            x: (B, C, h, w); odd sides are filled up with what is reflected at their ends.
            timesteps: (B,) in [0, 1000]; 1000 is pure noise.
            context: (B, L, E) from the text encoders.
            pooled: (B, P) from the CLIP encoders.
            positions: (1 or B, N, D) to use instead of the middle of the model's own table.
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.config.patch, 0, -height % self.config.patch), mode="reflect")
        tokens = self.x_embedder(x)  # (B, D, H, W)
        rows, columns = tokens.shape[-2:]
        if positions is None:
            positions = crop(self.pos_embed, rows, columns)
        tokens = tokens.flatten(2).transpose(1, 2) + positions.to(tokens.dtype)  # (B, N, D)

        embedded = timestep_embedding(timesteps, self.config.frequencies, factor=1)
        vec = self.t_embedder(embedded.to(tokens.dtype)) + self.y_embedder(pooled)  # (B, D)
        context = self.context_embedder(context)  # (B, L, D)

        for block in self.joint_blocks:
            context, tokens = block(context, tokens, vec)

        return self._unpatchify(self.final_layer(tokens, vec), rows, columns)[..., :height, :width]

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Latents (B, C, h, w) of tokens (B, N, 4C); features ordered row and column of the patch, channel."""
        patch = self.config.patch
        x = tokens.view(len(tokens), rows, columns, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * patch, columns * patch)


class JointBlock(nn.Module):
    """Image and text tokens with weights of their own meet in one attention."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.context_block = SingleDiTBlock(config, is_last=index == config.depth - 1)
        self.x_block = SingleDiTBlock(config, is_dual=index in config.dual_blocks)

    def forward(self, context: Tensor, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """The next context (B, L, D), after the last block that before it, and x (B, N, D)."""
        context_attend, *context_think = self.context_block.modulations(vec)
        x_attend, x_think, *x_again = self.x_block.modulations(vec)

        context_q, context_k, context_v = self.context_block.attn.heads(context_attend.modulate(context))
        x_q, x_k, x_v = self.x_block.attn.heads(x_attend.modulate(x))  # (B, N, H, d)

        q = torch.cat((context_q, x_q), dim=1)  # (B, L+N, H, d)
        k = torch.cat((context_k, x_k), dim=1)
        v = torch.cat((context_v, x_v), dim=1)
        context_attended, x_attended = attention(q, k, v).split_with_sizes((context.shape[1], x.shape[1]), dim=1)

        attended = x_attend.add_gated(x, self.x_block.attn.proj(x_attended))
        if self.x_block.attn2 is not None:
            (again,) = x_again
            alone = attention(*self.x_block.attn2.heads(again.modulate(x)))  # (B, N, D)
            attended = again.add_gated(attended, self.x_block.attn2.proj(alone))
        x = x_think.add_gated(attended, self.x_block.mlp(x_think.modulate(attended)))

        for think in context_think:  # not in the last block
            context = context_attend.add_gated(context, self.context_block.attn.proj(context_attended))
            context = think.add_gated(context, self.context_block.mlp(think.modulate(context)))
        return context, x


class SingleDiTBlock(nn.Module):
    """The weights of one stream in a block."""

    def __init__(self, config: MMDiTConfig, *, is_last: bool = False, is_dual: bool = False) -> None:
        """`is_last`: nothing is made of what is attended; `is_dual`: there is a second attention."""
        super().__init__()
        width = config.width
        self.rows = 2 if is_last else 9 if is_dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.rows * width))
        self.attn = SelfAttention(config, projects=not is_last)
        self.attn2 = SelfAttention(config) if is_dual else None
        self.mlp = nn.Identity() if is_last else MLP(width, config.mlp_width)

    def modulations(self, vec: Tensor) -> tuple[Modulate, ...]:
        """Those of attention, MLP and second attention, as far as there are any; the last block has no gates."""
        rows = self.adaLN_modulation(vec)[:, None].chunk(self.rows, dim=-1)
        gates = (*rows[2::3], rows[-1])[: (self.rows + 1) // 3]
        return tuple(map(Modulate, rows[::3], rows[1::3], gates))


class SelfAttention(nn.Module):
    """The weights around the attention of one stream."""

    def __init__(self, config: MMDiTConfig, *, projects: bool = True) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.ln_q = RMSNorm(config.head_width, eps=_EPS) if config.qk_norm else nn.Identity()
        self.ln_k = RMSNorm(config.head_width, eps=_EPS) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width) if projects else nn.Identity()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, L, H, d)."""
        q, k, v = split_heads(self.qkv(x), 3, self.head_width)
        return self.ln_q(q), self.ln_k(k), v


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, reckoned in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """As x."""
        return F.rms_norm(x, self.normalized_shape, cast(Tensor, self.weight).to(x.dtype), self.eps)


class MLP(nn.Module):
    """What each token thinks alone."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """As x."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class PatchEmbed(nn.Module):
    """From latents to tokens."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) from (B, C, h, w)."""
        out: Tensor = self.proj(x)
        return out


class Embedder(nn.Module):
    """A vector, brought to the width of the model."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D)"""
        out: Tensor = self.mlp(x)
        return out
