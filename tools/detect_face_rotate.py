"""Cuts faces out of pictures, turned upright. Options: `python tools/detect_face_rotate.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import DETECT_FACE_ROTATE, FaceOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, and does it."""
    options = parse(DETECT_FACE_ROTATE, argv)[FaceOptions]
    from library.data import faces

    faces.run(options)


if __name__ == "__main__":
    main()
