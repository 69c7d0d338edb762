"""Converts FLUX.1 from Diffusers to one file. Options: `python tools/convert_diffusers_to_flux.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import CONVERT_DIFFUSERS_TO_FLUX, ConvertDiffusersToFluxOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and converts."""
    options = parse(CONVERT_DIFFUSERS_TO_FLUX, argv)[ConvertDiffusersToFluxOptions]
    from networks.flux_converting import convert_model

    convert_model(options)


if __name__ == "__main__":
    main()
