"""Prints statistics of the weights of a network. Options: `python networks/check_lora_weights.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import command
from library.option_groups import CHECK_LORA_WEIGHTS, CheckLoraWeightsOptions
from library.options import parse


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each tensor as it is read."""
    options = parse(CHECK_LORA_WEIGHTS, argv)[CheckLoraWeightsOptions]
    from networks.statistics_of_weights import statistics

    for line in statistics(options.file, everything=options.show_all_keys):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
