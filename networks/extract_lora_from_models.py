"""Makes a LoRA of the difference of two SD or SDXL models. Options: `networks/extract_lora_from_models.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import EXTRACT_LORA_FROM_MODELS, ExtractLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and extracts."""
    options = parse(EXTRACT_LORA_FROM_MODELS, argv)[ExtractLoraOptions]
    from networks.sd_extracting import extract

    extract(options)


if __name__ == "__main__":
    main()
