"""Makes a LoRA of the difference of two SD3 transformers. Options: `python networks/sd3_extract_lora.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import SD3_EXTRACT_LORA, Sd3ExtractLoraOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses and extracts."""
    options = parse(SD3_EXTRACT_LORA, argv)[Sd3ExtractLoraOptions]
    from networks.model_extracting import extract
    from networks.sd3_files import SD3

    extract(SD3, options)


if __name__ == "__main__":
    main()
