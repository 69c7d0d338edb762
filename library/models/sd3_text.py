"""What SD3's text encoders say, put together: one sequence of CLIP-L beside CLIP-G, then T5, and a pooled vector.

B texts, L tokens of T5. Names of arrays are those of the text cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from library.types import Cond

CLIP_TOKENS = 77
"""Of both CLIP encoders; of T5, too, where it is missing."""


def joint_clip(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Cond:
    """`lg_out` (B, 77, 2048) and `lg_pooled` (B, 2048) of what CLIP-L and CLIP-G say, each hidden states and pooled."""
    (l_hidden, l_pooled), (g_hidden, g_pooled) = first, second
    return {"lg_out": torch.cat((l_hidden, g_hidden), dim=-1), "lg_pooled": torch.cat((l_pooled, g_pooled), dim=-1)}


def context(lg_out: Tensor, t5_out: Tensor | None, width: int) -> Tensor:
    """The sequence (B, 77 + L, width) that the transformer is shown.

    CLIP's part is filled up with zeros. Without T5 its part is 77 zeros.
    """
    clip = F.pad(lg_out, (0, width - lg_out.shape[-1]))
    if t5_out is None:
        t5_out = clip.new_zeros(len(clip), CLIP_TOKENS, width)
    return torch.cat((clip, t5_out.to(clip.dtype)), dim=1)


def draw_dropped(rates: Mapping[str, float], batch: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Which of the texts lose what an encoder says: for each encoder with a rate, (B,) boolean, on the CPU."""
    return {name: torch.rand(batch, generator=generator) < rate for name, rate in rates.items() if rate > 0}


def without_dropped(cond: Cond, dropped: Mapping[str, Tensor], l_width: int) -> Cond:
    """The arrays with zeros, masks included, where an encoder is dropped.

    Args:
        dropped: see `draw_dropped`; keys are `clip_l`, `clip_g` and `t5xxl`.
        l_width: features of CLIP-L, which come first in `lg_out` and `lg_pooled`.
    """
    arrays = {name: slice(None, l_width) if name == "clip_l" else slice(l_width, None) for name in ("clip_l", "clip_g")}
    found = dict(cond)
    for name, lost in dropped.items():
        if name in arrays:
            for array in ("lg_out", "lg_pooled"):
                if array in found:
                    found[array] = found[array].clone()
                    found[array][lost.to(found[array].device), ..., arrays[name]] = 0
        elif "t5_out" in found:
            found["t5_out"] = _zeroed(found["t5_out"], lost)
        mask = f"{name.removesuffix('xxl')}_attn_mask"
        if mask in found:
            found[mask] = _zeroed(found[mask], lost)
    return found


def _zeroed(array: Tensor, lost: Tensor) -> Tensor:
    return array.masked_fill(lost.to(array.device).view(-1, *[1] * (array.dim() - 1)), 0)
