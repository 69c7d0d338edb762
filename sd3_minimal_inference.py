"""Makes images with SD3 or SD3.5. Options: `python sd3_minimal_inference.py --help`, docs/inference.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import SD3_MINIMAL_INFERENCE
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and makes images."""
    options = parse(SD3_MINIMAL_INFERENCE, argv)
    with garbage.left_alone():
        from library.generate.sd3 import generate

    generate(options)


if __name__ == "__main__":
    main()
