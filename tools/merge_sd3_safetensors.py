"""Joins the parts of SD3 into one file. Options: `python tools/merge_sd3_safetensors.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import MERGE_SD3_SAFETENSORS, MergeSd3Options
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and joins."""
    options = parse(MERGE_SD3_SAFETENSORS, argv)[MergeSd3Options]
    from networks.sd3_joining import join

    join(options)


if __name__ == "__main__":
    main()
