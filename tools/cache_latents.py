"""Encodes the images of a dataset once and stores the latents beside them. Options: `--help`, docs/caching.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import garbage
from library.log import command
from library.option_groups import CACHE_LATENTS
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and fills the cache."""
    options = parse(CACHE_LATENTS, argv)
    with garbage.left_alone():
        from library.cache_tools import cache_latents

    cache_latents(options)


if __name__ == "__main__":
    main()
