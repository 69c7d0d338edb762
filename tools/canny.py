"""Draws the edges of a picture, as guides for ControlNets. Options: `python tools/canny.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import CANNY, CannyOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, and does it."""
    options = parse(CANNY, argv)[CannyOptions]
    from library.data import edges

    edges.run(options)


if __name__ == "__main__":
    main()
