"""Trains a LoRA or another network on Stable Diffusion 1.x or 2.x. Options: `--help`, docs/train_network.md."""

from __future__ import annotations

from collections.abc import Sequence

from library import garbage
from library.log import command
from library.option_groups import TRAIN_NETWORK
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the options, which needs none of the heavy imports below, and trains."""
    options = parse(TRAIN_NETWORK, argv)
    with garbage.left_alone():
        from library.app import train
        from library.families.sd import Sd
        from library.methods.adapter import Adapter

    train(Sd, Adapter, options)


if __name__ == "__main__":
    main()
