"""Merges networks into SDXL, or with each other. Options: `python networks/sdxl_merge_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import SDXL_MERGE_LORA, MergeModelOptions, MergeNetworksOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(SDXL_MERGE_LORA, argv)
    from networks.sd_merging import XL, merge

    merge(options[MergeModelOptions], options[MergeNetworksOptions], XL)


if __name__ == "__main__":
    main()
