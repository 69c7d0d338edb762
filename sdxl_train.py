"""Fine-tunes SDXL. Options: `--help`, docs/sdxl_train.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import SDXL_TRAIN
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(SDXL_TRAIN, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.sdxl import Sdxl
        from library.methods.full import Full

    train(Sdxl, Full, options)


if __name__ == "__main__":
    main()
