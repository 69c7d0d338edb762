"""Times one LoRA training step on a model of FLUX.1, SD3 or SDXL with random weights. See README.md here."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import workload_sd3
import workload_sdxl
from workload import (
    Batch,
    Ceiling,
    Clock,
    Shape,
    Work,
    adapt,
    build,
    measure,
    peak_memory,
    reset_peak_memory,
    stepping,
    work,
)

from library import devices
from library.models.memory import checkpoint_blocks
from library.train.graphs import REHEARSALS

MATRIX_SIDE = {"cpu": 3072}
MATRIX_SIDE_GPU = 8192
WHOLE = (19, 38)
"""Blocks of FLUX.1."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.profile:
        steps, _ = steps_of(args)
        print(profile(steps[-1], device_of(args)))
        return
    result, counted = measured(args)
    print(json.dumps(result, indent=2) if args.json else report(result, counted))


def device_of(args: argparse.Namespace) -> torch.device:
    """Where to compute."""
    device = torch.device(args.device) if args.device else devices.best_device()
    if args.cuda_graphs and device.type != "cuda":
        raise SystemExit("--cuda_graphs is for Nvidia GPUs")
    return device


def steps_of(args: argparse.Namespace) -> tuple[list[Callable[[], None]], Work]:
    """A step, or with `--cuda_graphs` one that isn't recorded and one that is; and the arithmetic."""
    device, dtype = device_of(args), devices.dtype_of(args.dtype)
    if args.family == "sdxl":
        size = workload_sdxl.WHOLE if args.whole else {}
        sdxl = workload_sdxl.SdxlShape(resolution=args.resolution, batch=args.batch, rank=args.rank, **size)
        return workload_sdxl.training_step(
            sdxl, device, dtype, checkpointing=args.checkpointing, recorded=args.cuda_graphs
        )
    if args.family == "sd3":
        size = workload_sd3.WHOLE if args.whole else {}
        sd3 = workload_sd3.Sd3Shape(resolution=args.resolution, batch=args.batch, rank=args.rank, **size)
        return workload_sd3.training_step(
            sd3, device, dtype, checkpointing=args.checkpointing, recorded=args.cuda_graphs
        )
    shape = shape_of(args)
    model = build(shape, device, dtype)
    return training_step(model, shape, device, dtype, args), work(model, shape)


def measured(args: argparse.Namespace) -> tuple[dict[str, Any], Work]:
    """What a step takes."""
    steps, counted = steps_of(args)
    device = device_of(args)
    clock = Clock(device, args.cpu_time)
    ceiling = Ceiling(clock, devices.dtype_of(args.dtype), MATRIX_SIDE.get(device.type, MATRIX_SIDE_GPU))
    reset_peak_memory(device)
    warmup = args.warmup + (REHEARSALS if args.cuda_graphs else 0)
    *without, timing = measure(clock, ceiling, steps, args.steps, warmup)
    return {
        "seconds_per_step": round(timing.median, 4),
        "fastest_step": round(min(timing.seconds), 4),
        "seconds_without_recording": [round(one.median, 4) for one in without],
        "utilisation": round(timing.utilisation(counted.total), 3),
        "gflop_per_step": round(counted.total / 1e9, 1),
        "matrix_product_gflops": round(timing.rate / 1e9, 1),
        "peak_memory_gb": round((peak_memory(device) or 0) / 1e9, 2),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "arguments": {key: value for key, value in vars(args).items() if key not in ("json", "profile")},
    }, counted


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shape(found)
    found.add_argument("--family", choices=("flux", "sdxl", "sd3"), default="flux", help="kind of model")
    found.add_argument("--checkpointing", action="store_true", help="recompute activations of blocks to save memory")
    found.add_argument("--every", type=int, default=1, help="with --checkpointing: recompute each n-th block")
    found.add_argument("--cuda_graphs", action="store_true", help="time a recorded step, and in turns one that isn't")
    found.add_argument("--whole", action="store_true", help="the whole model, for a GPU")
    found.add_argument("--compile", action="store_true", help="compile each block with torch.compile")
    found.add_argument("--profile", action="store_true", help="print the operations that take longest, and stop")
    found.add_argument("--json", action="store_true", help="print the result as JSON")
    return found


def add_shape(found: argparse.ArgumentParser) -> None:
    """Options that all benchmarks of a step have."""
    defaults = Shape()
    found.add_argument("--width", type=int, default=defaults.width, help="width of the transformer")
    found.add_argument("--head_width", type=int, default=defaults.head_width, help="width of an attention head")
    found.add_argument("--double", type=int, default=defaults.double_blocks, help="double-stream blocks")
    found.add_argument("--single", type=int, default=defaults.single_blocks, help="single-stream blocks")
    found.add_argument("--resolution", type=int, default=defaults.resolution, help="image side in pixels")
    found.add_argument("--text_tokens", type=int, default=defaults.text_tokens, help="T5 tokens")
    found.add_argument("--batch", type=int, default=defaults.batch, help="images per step")
    found.add_argument("--rank", type=int, default=defaults.rank, help="rank of the LoRA")
    found.add_argument("--dtype", default="fp32", help="type of weights and arithmetic")
    found.add_argument("--device", help="such as cpu or cuda; the best one when left out")
    found.add_argument("--threads", type=int, help="processor threads; torch's choice when left out")
    found.add_argument("--cpu_time", action="store_true", help="processor time instead of wall time; needs --threads 1")
    found.add_argument("--steps", type=int, default=5, help="steps to time")
    found.add_argument("--warmup", type=int, default=1, help="steps before that")


def shape_of(args: argparse.Namespace) -> Shape:
    """What the options say about the amount of work."""
    double, single = WHOLE if getattr(args, "whole", False) else (args.double, args.single)
    return Shape(
        width=args.width,
        head_width=args.head_width,
        double_blocks=double,
        single_blocks=single,
        resolution=args.resolution,
        text_tokens=args.text_tokens,
        batch=args.batch,
        rank=args.rank,
    )


def training_step(
    model: torch.nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[Callable[[], None]]:
    """Forward, backward and optimizer step of a LoRA; with `--cuda_graphs` the same once more, recorded."""
    network = adapt(model, shape.rank, device)
    if args.compile:
        for block in [*model.double_blocks, *model.single_blocks]:
            block.compile()
    if args.checkpointing:
        checkpoint_blocks(model, args.every, draws=False)
    batch = Batch(shape, device, dtype, mixed=dtype != torch.float32)
    kinds = (False, True) if args.cuda_graphs else (False,)
    return [stepping(device, model, network, batch, recorded=kind) for kind in kinds]


def profile(step: Callable[[], None], device: torch.device) -> str:
    """Table of operations, longest first."""
    step()
    with torch.profiler.profile(record_shapes=True) as recorded:
        step()
        devices.synchronize(device)
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    by_operation = recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=45)
    by_shape = recorded.key_averages(group_by_input_shape=True)
    return by_operation + "\n" + by_shape.table(sort_by=order, row_limit=40, max_shapes_column_width=90)


def report(result: dict[str, Any], counted: Work) -> str:
    """The result for people."""
    parts = ((counted.forward, "forward"), (counted.input_gradients, "input gradients"), (counted.adapters, "LoRA"))
    shares = ", ".join(f"{name} {operations / counted.total:.0%}" for operations, name in parts)
    without = "".join(f"without       {seconds} s\n" for seconds in result["seconds_without_recording"])
    return without + "\n".join(
        (
            f"step          {result['seconds_per_step']} s (median; fastest {result['fastest_step']} s)",
            f"work          {result['gflop_per_step']} GFLOP ({shares})",
            f"matrix rate   {result['matrix_product_gflops']} GFLOP/s in this process",
            f"utilisation   {result['utilisation']}",
            f"peak memory   {result['peak_memory_gb']} GB",
        )
    )


if __name__ == "__main__":
    main()
