"""Merges networks into FLUX.1, or with each other. Options: `python networks/flux_merge_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import FLUX_MERGE_LORA, FluxMergeLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(FLUX_MERGE_LORA, argv)[FluxMergeLoraOptions]
    from networks.flux_merging import merge

    merge(options)


if __name__ == "__main__":
    main()
