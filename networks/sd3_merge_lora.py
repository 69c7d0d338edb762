"""Merges networks into SD3, or with each other. Options: `python networks/sd3_merge_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import SD3_MERGE_LORA, Sd3MergeLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(SD3_MERGE_LORA, argv)[Sd3MergeLoraOptions]
    from networks.sd3_merging import merge

    merge(options)


if __name__ == "__main__":
    main()
