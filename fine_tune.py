"""Fine-tunes Stable Diffusion 1.x or 2.x. Options: `--help`, docs/fine_tune.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import FINE_TUNE
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(FINE_TUNE, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.sd import Sd
        from library.methods.full import Full

    train(Sd, Full, options)


if __name__ == "__main__":
    main()
