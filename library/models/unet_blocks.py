"""The blocks of the U-Nets of SD 1.x, SD 2.x and SDXL."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable


def block_paths(names: Collection[str]) -> tuple[str, ...]:
    """Paths of the blocks, in the order in which they compute, of a U-Net whose tensors have these names.

    Blocks are what computes again, is compiled, and is streamed as a whole: residual blocks, layers of transformers,
    changes of the resolution.
    """
    levels = _count(names, r"down_blocks\.(\d+)\.")
    paths: list[str] = []
    for side in (*_numbered("down_blocks", levels), "mid_block", *_numbered("up_blocks", levels)):
        here = [name.removeprefix(f"{side}.") for name in names if name.startswith(f"{side}.")]
        for index in range(_count(here, r"resnets\.(\d+)\.")):
            paths.append(f"{side}.resnets.{index}")
            layers = f"attentions.{index}.transformer_blocks"
            paths += _numbered(f"{side}.{layers}", _count(here, re.escape(layers) + r"\.(\d+)\."))
        for kind in ("downsamplers", "upsamplers"):
            paths += _numbered(f"{side}.{kind}", _count(here, kind + r"\.(\d+)\."))
    return tuple(paths)


def _count(names: Iterable[str], pattern: str) -> int:
    """1 + the largest index in the names that begin like this."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{index}" for index in range(count)]
