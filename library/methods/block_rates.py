"""The 23 blocks of SDXL's U-Net that `--block_lr` gives a rate each."""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.log import UserError
from library.models.keymaps_sd import unet_to_ldm

_FIRST = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
"""Number of the first block of each section, by its name in the original layout."""
_MOST = {"input_blocks": 9, "middle_block": 3, "output_blocks": 9}
"""Blocks of the sections that have several."""


def blocks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The block (0 to 22) of each tensor of a U-Net with these shapes, Diffusers names.

    0 embeds time and sizes, 1 to 9 are the input blocks (1 the first convolution), 10 to 12 the middle, 13 to 21 the
    output blocks, 22 the last normalization and convolution.
    Errors: UserError when it isn't laid out as SDXL's.
    """
    found: dict[str, int] = {}
    for original, recipe in unet_to_ldm(shapes).items():
        section, _, rest = original.partition(".")
        match = re.match(r"\d+", rest)
        number = int(match[0]) if match is not None and section in _MOST else 0
        if section not in _FIRST or number >= _MOST.get(section, 1):
            what = f"this U-Net has a block that SDXL's has not: {section}.{number}"
            raise UserError(what, "--block_lr", "give one --learning_rate", code="E-LR")
        found |= dict.fromkeys(recipe.sources, _FIRST[section] + number)
    return found
