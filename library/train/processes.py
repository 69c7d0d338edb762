"""Starting the processes of a run, and waiting for one another without a time limit."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from library.devices import best_device
from library.log import ResourceError, UserError, get_logger
from library.option_groups import DistributedOptions, PrecisionOptions

if TYPE_CHECKING:
    from library.options import Options

logger = get_logger(__name__)

PATIENCE = timedelta(days=7)
"""How long processes wait for one another between the phases, where one may have much more to do than another."""

NOT_HERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Variables with which the launcher's configuration asks for what isn't there."""


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that the launcher has started."""
    return int(environment.get("WORLD_SIZE", "1"))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among them; also before the process group is there."""
    return int(environment.get("RANK", "0"))


def prepare_environment(environment: dict[str, str] | os._Environ[str], platform: str = sys.platform) -> str | None:
    """Sets what several processes on Windows need; gives the backend that must be used there, else None.

    Torch for Windows has neither NCCL nor libuv, and would stop with an error about them.
    """
    if platform != "win32":
        return None
    environment.setdefault("USE_LIBUV", "0")
    return "gloo"


def start(options: Options) -> Any:
    """The accelerator of this process: device, mixed precision, process group.

    Errors: UserError when the device can't compute in the wanted precision, or the launcher wants a sharded model.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    precision, device = options[PrecisionOptions], best_device()
    _refuse(precision.mixed_precision, device, os.environ)
    backend = prepare_environment(os.environ)
    minutes = options[DistributedOptions].ddp_timeout
    group = InitProcessGroupKwargs(
        **({"backend": backend} if backend else {}), **({"timeout": timedelta(minutes=minutes)} if minutes else {})
    )
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision.mixed_precision,
        # losses are weighted for sums, whatever the launcher's configuration says of accumulation
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # no weight is used twice in a pass: cast copies of all weights would only fill the memory
        kwargs_handlers=[group, AutocastKwargs(cache_enabled=False)],
    )
    if accelerator.scaler is not None and precision.full_fp16:
        accelerator.scaler = HalfScaler(accelerator.device.type)
    if accelerator.num_processes != world_size():
        raise ResourceError(
            f"the launcher started {world_size()} processes, but they can't find one another",
            "accelerate launch",
            "give it --num_processes 1, or check its configuration with `accelerate env`",
            code="E-PROCESSES",
        )
    logger.info(
        "device %s, mixed precision %s, %d process(es)",
        accelerator.device,
        accelerator.mixed_precision,
        accelerator.num_processes,
    )
    return accelerator


def _refuse(mixed_precision: str, device: torch.device, environment: Mapping[str, str]) -> None:
    """Errors: UserError for what accelerate would do differently than asked, or stop at with a traceback."""
    wanted = [name for variable, name in NOT_HERE.items() if environment.get(variable, "").lower() in ("true", "1")]
    if wanted:
        raise UserError(
            f"its configuration asks for {wanted[0]}, which comes later",
            "accelerate launch",
            "use another configuration: accelerate config, or --config_file FILE before the script's name",
            code="E-LATER",
        )
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU", "--mixed_precision fp16", "use bf16 or no on the CPU", code="E-PRECISION")


class HalfScaler(torch.amp.GradScaler):
    """Scales losses where the trained weights are fp16 themselves, as `--full_fp16` has them; torch's own refuses."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16=True)


def wait_for_all() -> None:
    """Waits until all processes are here, however long it takes, without an open collective of the training's group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.new_group(timeout=PATIENCE, backend="gloo")
        dist.barrier(group)
        dist.destroy_process_group(group)


def leave() -> None:
    """Takes leave of the other processes after work well done: threads that still talk to them crash at the exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_main(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that writes files and talks to the user; also before the process group is there."""
    return rank(environment) == 0


def new_seed() -> int:
    """A seed of 32 bits that nobody has chosen."""
    return random.SystemRandom().getrandbits(32)


def agree(number: int) -> int:
    """The number of the first process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return number
    box = [number]
    dist.broadcast_object_list(box, src=0)
    return box[0]
