"""What SD3's text encoders say, put together: one sequence of CLIP-L beside CLIP-G, then T5, and a pooled vector.

B texts, L tokens of T5. Names of arrays are those of the text cache, `lg_out` (B, 77, 2048) and `lg_pooled` (B, 2048)
for both CLIP encoders together. Where one of them speaks alone, `l_out` (B, 77, 768) and `l_pooled`, or `g_out` and
`g_pooled`, hold its part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from library.types import Cond

CLIP_TOKENS = 77
"""Of both CLIP encoders; of T5, too, where it is missing."""
CLIP = {"clip_l": "l", "clip_g": "g"}
"""Encoders, and what the names of their own arrays begin with."""
MASKS = {"clip_l": "clip_l_attn_mask", "clip_g": "clip_g_attn_mask", "t5xxl": "t5_attn_mask"}
"""Arrays with the masks of the encoders' tokens."""


def joint_clip(cond: Cond, l_width: int) -> Cond:
    """The arrays with what the CLIP encoders say in `lg_out` and `lg_pooled` only.

    What an encoder said alone replaces its part of them. `l_width`: features of CLIP-L, which come first.
    """
    found = dict(cond)
    for kind in ("out", "pooled"):
        alone = {letter: found.pop(f"{letter}_{kind}", None) for letter in CLIP.values()}
        both = found.get(f"lg_{kind}")
        if both is None or any(part is not None for part in alone.values()):
            l_part = both[..., :l_width] if alone["l"] is None and both is not None else alone["l"]
            g_part = both[..., l_width:] if alone["g"] is None and both is not None else alone["g"]
            assert l_part is not None
            assert g_part is not None
            found[f"lg_{kind}"] = torch.cat((l_part, g_part), dim=-1)
    return found


def context(lg_out: Tensor, t5_out: Tensor | None, width: int) -> Tensor:
    """The sequence (B, 77 + L, width) that the transformer is shown.

    CLIP's part is filled up with zeros. Without T5 its part is 77 zeros.
    """
    clip = F.pad(lg_out, (0, width - lg_out.shape[-1]))
    if t5_out is None:
        t5_out = clip.new_zeros(len(clip), CLIP_TOKENS, width)
    return torch.cat((clip, t5_out.to(clip.dtype)), dim=1)


def without_dropped(cond: Cond, dropped: Mapping[str, Tensor], l_width: int) -> Cond:
    """The arrays with zeros, masks included, where an encoder is dropped.

    Args:
        cond: of `joint_clip`.
        dropped: for each encoder, `clip_l`, `clip_g` or `t5xxl`, which texts lose what it says: (B,) boolean, on the
            device of the arrays.
        l_width: features of CLIP-L, which come first in `lg_out` and `lg_pooled`.
    """
    found = dict(cond)
    for name, lost in dropped.items():
        for array in ("lg_out", "lg_pooled") if name in CLIP else ("t5_out",):
            if array not in found:
                continue
            features = torch.arange(found[array].shape[-1], device=lost.device)
            ends = {"clip_l": features < l_width, "clip_g": features >= l_width}
            found[array] = _zeroed(found[array], lost, ends.get(name))
        if MASKS[name] in found:
            found[MASKS[name]] = _zeroed(found[MASKS[name]], lost)
    return found


def _zeroed(array: Tensor, lost: Tensor, features: Tensor | None = None) -> Tensor:
    """Zeros in the rows that are lost: in all of them, or in some features."""
    where = lost.view(-1, *[1] * (array.dim() - 1))
    return array.masked_fill(where if features is None else where & features, 0)
