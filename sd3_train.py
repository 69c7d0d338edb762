"""Fine-tunes SD3 and SD3.5. Options: `--help`, docs/sd3_train.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import SD3_TRAIN
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(SD3_TRAIN, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.sd3 import Sd3
        from library.methods.full import Full

    train(Sd3, Full, options)


if __name__ == "__main__":
    main()
