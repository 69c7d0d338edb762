"""How models get into memory: in which type, on which device, what is computed again, compiled, streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from library import devices
from library.log import get_logger
from library.models import attention, compiling, memory, quantized, streaming
from library.option_groups import (
    MemoryOptions,
    NetworkOptions,
    OffloadOptions,
)
from library.train.forecast import blocks_of, named_blocks
from library.train.plan import readable_bytes
from library.train.setups import storage_of, swap_of
from library.types import DENOISER, Chance, Models

if TYPE_CHECKING:
    from library.assembly import Job, Setting
    from library.families.base import Family
    from library.models.loading import Finished
    from library.models.streaming import Streaming
    from library.options import Options

logger = get_logger(__name__)


def blocks_to_stream(options: Options, family: Family) -> int:
    """How many of the denoiser's blocks are streamed."""
    model = family.activations()
    blocks, units = len(blocks_of(family.part_shapes()[DENOISER], model.block_lists)), model.swap_units
    return streaming.swapped_blocks(blocks, swap_of(options, units), units)


def choose_attention(options: Options) -> None:
    """Chooses what computes attention. Errors: UserError when its package isn't installed."""
    group = options[MemoryOptions]
    if group.attn_mode is not None:
        attention.use(group.attn_mode)
    else:
        attention.use("xformers" if group.xformers else None, "--xformers" if group.xformers else "")


# loading


@dataclass(frozen=True)
class Place:
    """Where a text encoder that isn't trained runs, and in which type; None: like all others.

    A type of eight bits is one to store weights in, beside that which all others have to compute in.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @property
    def scheme(self) -> str | None:
        """How weights are stored, see `library.models.quantized`; None: like all others."""
        return "fp8" if self.dtype is not None and quantized.is_float8(self.dtype) else None

    @classmethod
    def of(cls, options: Options, encoder: str) -> Place:
        """What `--<encoder>_device` and `--<encoder>_dtype` say, in scripts that have them. Errors: UserError."""

        def given(kind: str) -> str | None:
            name = f"{encoder}_{kind}"
            return options.value(name) if options.script.option(name) else None

        device, dtype = given("device"), given("dtype")
        return cls(
            devices.device_of(device, f"--{encoder}_device") if device else None,
            devices.dtype_of(dtype, f"--{encoder}_dtype") if dtype else None,
        )


def load_encoders(job: Setting, names: Sequence[str], trained: frozenset[str]) -> dict[str, nn.Module]:
    """The named text encoders; those that aren't trained in few bits, and where they are to be, if that is wanted."""
    scheme = storage_of(job.options).encoders
    beside = job.options.has(NetworkOptions)  # what is trained isn't the encoder itself
    loaded: dict[str, nn.Module] = {}
    for name in names:
        place = Place.of(job.options, name)
        if name in trained and place != Place():
            logger.warning("%s is trained, so --%s_device and --%s_dtype do nothing", name, name, name)
            place = Place()
        kind = None if name in trained else place.scheme or scheme
        own = job.precision.trained if name in trained and not beside else job.precision.frozen
        loaded |= job.family.load_encoders(
            [name],
            place.device or job.device,
            own if place.scheme else place.dtype or own,
            quantized.storing(kind) if kind else None,
            quantized.keeps_float8(kind),
        )
    return loaded


def load_denoiser(job: Job, streamed: int) -> nn.Module:
    """The denoiser, stored as wanted; `streamed` of its blocks are in main memory, all else is on the device.

    One weight after the other is brought to the device, stored, and put in its place, so that at no time more is there
    than in the training. Networks that are merged into it need the weights as they were, and main memory for all.
    """
    storage, device, is_network = storage_of(job.options), job.device, job.options.has(NetworkOptions)
    scheme = storage.denoiser if is_network else None
    product = quantized.eight_bit_product(storage.compute, device) if scheme and storage.compute else None
    store = quantized.storing(scheme, product) if scheme else None
    dtype = job.precision.frozen if DENOISER in job.method.frozen() or is_network else job.precision.trained
    at_home = _at_home(job, streamed)
    if is_network and job.options[NetworkOptions].base_weights and (store or streamed):
        denoiser = job.family.load_denoiser(torch.device("cpu"), dtype)
        job.method.loaded(Models(denoiser=denoiser))
        for name, module in denoiser.named_modules():
            _moved(module, device)
            _placed(store, at_home, name, module)
        return denoiser
    finished = None if store is None and not at_home else _Placing(store, at_home)
    return job.family.load_denoiser(device, dtype, finished, quantized.keeps_float8(scheme))


def _at_home(job: Job, streamed: int) -> tuple[str, ...]:
    """Beginnings of the names of the modules that are streamed."""
    names = list(named_blocks(job.family.part_shapes()[DENOISER], job.family.activations().block_lists))
    return tuple(f"{names[index]}." for index in streaming.spread(len(names), streamed))


@dataclass(frozen=True)
class _Placing:
    """What to do with each module that has been read: store it, then put it in its place."""

    store: Finished | None
    at_home: tuple[str, ...]

    def __call__(self, name: str, module: nn.Module) -> None:
        _placed(self.store, self.at_home, name, module)


def _placed(store: Finished | None, at_home: tuple[str, ...], name: str, module: nn.Module) -> None:
    if store is not None:
        store(name, module)
    if at_home and name.startswith(at_home):
        _moved(module, torch.device("cpu"))


def _moved(module: nn.Module, device: torch.device) -> None:
    """Moves the tensors of a module, not those of the modules inside."""
    apply: Callable[..., object] = module._apply
    apply(lambda tensor: tensor.to(device), recurse=False)


# finishing


def finish(job: Job, models: Models, streamed: int) -> Streaming | None:
    """Puts what saves memory or time around the models, whose methods are attached and prepared, in the right order."""
    options, denoiser = job.options, models.denoiser
    assert denoiser is not None
    group = options[MemoryOptions]
    if group.torch_compile:
        compiling.compile_blocks(denoiser, group.dynamo_backend, job.device.type)
    if group.gradient_checkpointing:
        offload = options.has(OffloadOptions) and options[OffloadOptions].cpu_offload_checkpointing
        draws = job.method.chance() > Chance.NOWHERE
        memory.checkpoint_blocks(denoiser, group.checkpoint_every_n_blocks, offload=offload, draws=draws)
        for name in job.method.trained_encoders():
            memory.checkpoint_blocks(models.encoders[name])
    if not streamed:
        return None
    return streaming.stream(denoiser, streamed, job.device)


def report(streaming_: Streaming | None, device: torch.device) -> None:
    """Says what the memory of the device holds."""
    if streaming_ is not None:
        logger.info(
            "streaming: %s of weights in main memory, a ring of %s on the device",
            readable_bytes(streaming_.host_bytes),
            readable_bytes(streaming_.device_bytes),
        )
    logger.info(devices.memory_line(device))
