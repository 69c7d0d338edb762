"""Makes LoRAs of smaller ranks of a DyLoRA. Options: `python networks/extract_lora_from_dylora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import EXTRACT_LORA_FROM_DYLORA, ExtractDyloraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and extracts."""
    options = parse(EXTRACT_LORA_FROM_DYLORA, argv)[ExtractDyloraOptions]
    from networks.resizing import split_dylora

    split_dylora(options)


if __name__ == "__main__":
    main()
