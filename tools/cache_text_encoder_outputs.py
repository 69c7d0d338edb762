"""Encodes the captions of a dataset once and stores the results. Options: `--help`, docs/caching.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import garbage
from library.log import command
from library.option_groups import CACHE_TEXT_ENCODER_OUTPUTS
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and fills the cache."""
    options = parse(CACHE_TEXT_ENCODER_OUTPUTS, argv)
    with garbage.left_alone():
        from library.cache_tools import cache_text_encoder_outputs

    cache_text_encoder_outputs(options)


if __name__ == "__main__":
    main()
