"""Prints the metadata of a safetensors file as JSON. Options: `python tools/show_metadata.py --help`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import files
from library.log import DataError, command
from library.option_groups import SHOW_METADATA, ShowMetadataOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the header of the file only."""
    path = parse(SHOW_METADATA, argv)[ShowMetadataOptions].model
    metadata = files.header(path).metadata
    if not metadata:
        raise DataError("no metadata found", path, "the file was saved without", code="E-METADATA-NONE")
    sys.stdout.write(json.dumps(metadata, indent=4, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
