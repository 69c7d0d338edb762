"""Times steps with adapters against the same model without adapters. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from step import MATRIX_SIDE, MATRIX_SIDE_GPU, add_shape, shape_of
from workload import Batch, Ceiling, Clock, Timing, adapt, build, measure

from library import devices
from networks.base import Network


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shape(parser)
    parser.add_argument("--kinds", nargs="+", default=["lora"], help="what to time: lora, dora, loha, lokr")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device) if args.device else devices.best_device()
    dtype = devices.dtype_of(args.dtype)
    shape = shape_of(args)
    model = build(shape, device, dtype)
    networks: dict[str, Network] = {}
    for kind in args.kinds:
        networks[kind] = adapt(model, shape.rank, device, kind)
        networks[kind].restore()
    batch = Batch(shape, device, dtype, mixed=dtype != torch.float32)

    def bare() -> None:
        batch.loss(model, inputs_need_gradients=True).backward()

    def adapted(network: Network) -> None:
        for adapter in network.adapters:
            adapter.hook()
        batch.loss(model).backward()
        network.zero_grad(set_to_none=True)
        network.restore()

    clock = Clock(device, args.cpu_time)
    ceiling = Ceiling(clock, dtype, MATRIX_SIDE.get(device.type, MATRIX_SIDE_GPU))
    runs = [bare, *(partial(adapted, network) for network in networks.values())]
    without, *timings = measure(clock, ceiling, runs, args.steps, args.warmup)
    result = {
        "seconds_without": round(without.median, 4),
        "kinds": {
            kind: {"seconds": round(timing.median, 4), "ratio": round(ratio(timing, without), 3)}
            for kind, timing in zip(networks, timings, strict=True)
        },
        "arguments": vars(args),
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"without adapters {result['seconds_without']} s")
    for kind, timing in zip(networks, timings, strict=True):
        print(f"{kind:5} {timing.median:.4f} s: {ratio(timing, without):.3f} of that")


def ratio(one: Timing, other: Timing) -> float:
    """The median of what a step takes as a multiple of the other's at the same time."""
    return median(mine / theirs for mine, theirs in zip(one.seconds, other.seconds, strict=True))


if __name__ == "__main__":
    main()
