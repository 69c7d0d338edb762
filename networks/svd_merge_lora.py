"""Merges networks into a LoRA of a given rank. Options: `python networks/svd_merge_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import SVD_MERGE_LORA, MergeNetworksOptions, SvdMergeOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(SVD_MERGE_LORA, argv)
    from networks.sd_merging import merge_by_svd

    merge_by_svd(options[MergeNetworksOptions], options[SvdMergeOptions])


if __name__ == "__main__":
    main()
