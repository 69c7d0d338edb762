"""Memory of training steps of FLUX.1: forecast and measured. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from library import devices
from library.models.activations import Amount, Numerics, Training
from library.models.ledger_flux import FluxActivations
from tests.allocations import Allocations, without_data
from tests.flux_steps import Case, Trained

SLICE, WHOLE = (1, 2), (19, 38)
"""Double and single blocks: of a slice that takes seconds, and of FLUX.1-dev."""


@dataclass(frozen=True)
class Row:
    """A case, in bytes of activations and gradients."""

    name: str
    foreseen: int
    measured: int

    @property
    def error(self) -> float:
        """Of the forecast, as a share."""
        return self.foreseen / self.measured - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--device", default=devices.best_device().type, help="cpu counts tensors without data")
    found.add_argument("--whole", action="store_true", help="all 57 blocks instead of 3")
    found.add_argument("--resolution", type=int, nargs="+", default=[512, 1024], help="image sides in pixels")
    found.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    found.add_argument("--json", action="store_true", help="print the result as JSON")
    args = found.parse_args(argv)
    rows = [Row(name, foreseen(case), measured(case)) for name, case in cases(args)]
    if args.json:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return
    for row in rows:
        mib = (f"{size / 2**20:9.1f} MiB" for size in (row.foreseen, row.measured))
        print(f"{row.name:<44} forecast {next(mib)}  measured {next(mib)}  {row.error:+.1%}")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """What is measured, with a name."""
    double, single = WHOLE if args.whole else SLICE
    for side in args.resolution:
        amount = Amount(images=1, image_tokens=(side // 16) ** 2, text_tokens=512)
        sizes = {"width": 3072, "head": 128, "double": double, "single": single, "dtype": torch.bfloat16}
        base = Case(amount=amount, device=args.device, **sizes)
        for kind, case in (("LoRA", replace(base, rank=args.rank)), ("whole", base)):
            for every, how in ((0, ""), (1, ", recomputing"), (2, ", every second block recomputing")):
                if kind == "LoRA" or not args.whole:  # all weights and their gradients need a very large GPU
                    yield f"{side} px, {kind}{how}", replace(case, every=every)


def foreseen(case: Case) -> int:
    """What the ledger says."""
    size = case.dtype.itemsize
    training = Training(rank=case.rank, whole=not case.rank, size=4 if case.rank else size, checkpoint_every=case.every)
    numerics = Numerics.of(case.device, size)
    return FluxActivations(case.config).step(case.amount, numerics, training).peak


def measured(case: Case) -> int:
    """What the device says; on the CPU tensors are counted, and nothing is computed."""
    device = torch.device(case.device)
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(without_data())
        trained = Trained(case)
        trained.recompute()
        if device.type == "cpu":
            counter = Allocations(trained.held)
            before = counter.live
            with counter:
                trained.backward()
            return counter.peak - before
        before = sum(tensor.nbytes for tensor in trained.held)
        devices.reset_peak_memory(device)
        trained.backward()
        devices.synchronize(device)
        return devices.peak_memory(device) - before


if __name__ == "__main__":
    main()
