"""Converts LoRAs and other adapters between the layouts of programs. Options: `networks/convert_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import CONVERT_LORA, ConvertLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and converts."""
    options = parse(CONVERT_LORA, argv)[ConvertLoraOptions]
    from networks.layout_conversion import convert

    convert(options)


if __name__ == "__main__":
    main()
