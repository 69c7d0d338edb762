"""Copies the pictures of a folder with fewer pixels. Options: `python tools/resize_images_to_resolution.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import RESIZE_IMAGES, ResizeImagesOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, and does it."""
    options = parse(RESIZE_IMAGES, argv)[ResizeImagesOptions]
    from library.data import shrinking

    shrinking.run(options)


if __name__ == "__main__":
    main()
