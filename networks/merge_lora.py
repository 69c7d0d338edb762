"""Merges networks into SD 1.x and 2.x, or with each other. Options: `python networks/merge_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import MERGE_LORA, MergeModelOptions, MergeNetworksOptions, MergeVersionOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(MERGE_LORA, argv)
    from networks.sd_merging import SD, merge

    merge(options[MergeModelOptions], options[MergeNetworksOptions], SD, v2=options[MergeVersionOptions].v2)


if __name__ == "__main__":
    main()
