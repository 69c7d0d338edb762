"""Fine-tunes the whole transformer of FLUX.1. Options: `--help`, docs/flux_train.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import FLUX_TRAIN
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(FLUX_TRAIN, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.flux import Flux
        from library.methods.full import Full

    train(Flux, Full, options)


if __name__ == "__main__":
    main()
