"""Makes a LoRA of the difference of two FLUX.1 transformers. Options: `python networks/flux_extract_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import FLUX_EXTRACT_LORA, FluxExtractLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and extracts."""
    options = parse(FLUX_EXTRACT_LORA, argv)[FluxExtractLoraOptions]
    from networks.flux_files import FLUX
    from networks.model_extracting import extract

    extract(FLUX, options)


if __name__ == "__main__":
    main()
