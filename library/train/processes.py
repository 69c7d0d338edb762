"""Starting the processes of a run, and waiting for one another without a time limit."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from library.devices import best_device
from library.log import ResourceError, get_logger
from library.option_groups import DistributedOptions, PrecisionOptions

if TYPE_CHECKING:
    from library.options import Options

logger = get_logger(__name__)

PATIENCE = timedelta(days=7)
"""How long processes wait for one another between the phases, where one may have much more to do than another."""


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes that the launcher has started."""
    return int(environment.get("WORLD_SIZE", "1"))


def prepare_environment(environment: dict[str, str] | os._Environ[str], platform: str = sys.platform) -> str | None:
    """Sets what several processes on Windows need; gives the backend that must be used there, else None.

    Torch for Windows has neither NCCL nor libuv, and would stop with an error about them.
    """
    if platform != "win32":
        return None
    environment.setdefault("USE_LIBUV", "0")
    return "gloo"


def start(options: Options) -> Any:
    """The accelerator of this process: device, mixed precision, process group."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    backend = prepare_environment(os.environ)
    minutes = options[DistributedOptions].ddp_timeout
    group = InitProcessGroupKwargs(
        **({"backend": backend} if backend else {}), **({"timeout": timedelta(minutes=minutes)} if minutes else {})
    )
    accelerator = Accelerator(
        cpu=best_device().type == "cpu",
        mixed_precision=options[PrecisionOptions].mixed_precision,
        kwargs_handlers=[group],
    )
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


def wait_for_all() -> None:
    """Waits until all processes are here, however long it takes, without an open collective of the training's group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.new_group(timeout=PATIENCE, backend="gloo")
        dist.barrier(group)
        dist.destroy_process_group(group)


def is_main(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that writes files and talks to the user; also before the process group is there."""
    return environment.get("RANK", "0") == "0"


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
