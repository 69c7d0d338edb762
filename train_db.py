"""Fine-tunes Stable Diffusion 1.x or 2.x on a subject or a style. Options: `--help`, docs/train_db.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import TRAIN_DB
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(TRAIN_DB, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.sd import Sd
        from library.methods.full import Full

    train(Sd, Full, options)


if __name__ == "__main__":
    main()
