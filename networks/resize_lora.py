"""Gives a LoRA another rank, fixed or chosen for each module. Options: `python networks/resize_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import RESIZE_LORA, ResizeLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and resizes."""
    options = parse(RESIZE_LORA, argv)[ResizeLoraOptions]
    from networks.resizing import resize

    resize(options)


if __name__ == "__main__":
    main()
