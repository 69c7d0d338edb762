"""Times a LoRA step against the same model without adapters. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median

import torch
from step import MATRIX_SIDE, MATRIX_SIDE_GPU, add_shape, shape_of
from workload import Batch, Ceiling, Clock, adapt, build, measure

from library import devices


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shape(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device) if args.device else devices.best_device()
    dtype = devices.dtype_of(args.dtype)
    shape = shape_of(args)
    model = build(shape, device, dtype)
    network = adapt(model, shape.rank, device)
    batch = Batch(shape, device, dtype, mixed=dtype != torch.float32)

    def bare() -> None:
        network.restore()
        batch.loss(model, inputs_need_gradients=True).backward()

    def adapted() -> None:
        if not network.adapters[0].hooked:
            for adapter in network.adapters:
                adapter.hook()
        batch.loss(model).backward()
        network.zero_grad(set_to_none=True)

    clock = Clock(device, args.cpu_time)
    ceiling = Ceiling(clock, dtype, MATRIX_SIDE.get(device.type, MATRIX_SIDE_GPU))
    without, with_adapters = measure(clock, ceiling, [bare, adapted], args.steps, args.warmup)
    ratio = median(one / other for one, other in zip(with_adapters.seconds, without.seconds, strict=True))
    result = {
        "ratio": round(ratio, 3),
        "seconds_with": round(with_adapters.median, 4),
        "seconds_without": round(without.median, 4),
        "arguments": vars(args),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"with adapters {result['seconds_with']} s, without {result['seconds_without']} s: ratio {result['ratio']}"
        )


if __name__ == "__main__":
    main()
