"""Converts a LoRA for FLUX.1 from one layout to the other. Options: `python networks/convert_flux_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import CONVERT_FLUX_LORA, ConvertFluxLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and converts."""
    options = parse(CONVERT_FLUX_LORA, argv)[ConvertFluxLoraOptions]
    from networks.flux_converting import convert

    convert(options)


if __name__ == "__main__":
    main()
