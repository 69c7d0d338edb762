"""Enlarges pictures by refining their latents. Options: `python tools/latent_upscaler.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import LATENT_UPSCALER, LatentUpscalerOptions
from library.options import parse

if TYPE_CHECKING:
    from library.generate.upscaling import LatentUpscaler


def create_upscaler(*, weights: str, **others: object) -> LatentUpscaler:
    """What image generators call that use this file as a module."""
    from library.generate import upscaling

    return upscaling.create_upscaler(weights=weights, **others)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, and does it."""
    options = parse(LATENT_UPSCALER, argv)[LatentUpscalerOptions]
    from library.generate import upscaling

    upscaling.run(options)


if __name__ == "__main__":
    main()
