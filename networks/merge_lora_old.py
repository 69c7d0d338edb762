"""The old name of `merge_lora.py`. Options: `python networks/merge_lora_old.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command, get_logger
from library.option_groups import MERGE_LORA_OLD, MergeModelOptions, MergeNetworksOptions, MergeVersionOptions
from library.options import parse

logger = get_logger(__name__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and merges."""
    options = parse(MERGE_LORA_OLD, argv)
    logger.warning("merge_lora_old.py is merge_lora.py now: alphas count, and the old program's sums are gone")
    from networks.sd_merging import SD, merge

    merge(options[MergeModelOptions], options[MergeNetworksOptions], SD, v2=options[MergeVersionOptions].v2)


if __name__ == "__main__":
    main()
