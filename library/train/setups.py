"""What of a run's options decides how much memory it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from library.models.activations import Gradients, Numerics
from library.option_groups import (
    CacheOptions,
    EmaOptions,
    FluxFullOptions,
    LengthOptions,
    MemoryOptions,
    NetworkOptions,
    OffloadOptions,
    OptimizerOptions,
    PrecisionOptions,
    TextCacheOptions,
    VaePrecisionOptions,
)
from library.train.activations import Shapes, matrices
from library.types import DENOISER, Size

if TYPE_CHECKING:
    from library.data.items import Item
    from library.models.quantized import Storage
    from library.options import Options


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides the memory of a run. Sizes are bytes of an element."""

    full: bool
    """Whether the denoiser itself is trained instead of something beside it."""
    trained_elements: int
    trained_size: int = 4
    compute: int = 2
    """Of what frozen parts are held and computed in."""
    rank: int = 0
    """Of the adapters on the denoiser; 0 with `full`, and where only text encoders get some."""
    trained_encoders: frozenset[str] = frozenset()
    optimizer: str = "AdamW"
    gradients: Gradients = "all"
    accumulates: bool = False
    """Whether gradients of several batches are added up."""
    storage: str | None = None
    """How the frozen denoiser is stored, a key of `library.models.quantized.SCHEMES`."""
    encoder_storage: str | None = None
    cached_text: bool = False
    cached_latents: bool = False
    checkpoint_every: int = 0
    """Each n-th block computes again; 0: none."""
    offload: bool = False
    swap: int = 0
    """As --blocks_to_swap."""
    ema: Literal["device", "main memory"] | None = None
    batch: int = 1
    size: Size = Size(1024, 1024)  # noqa: RUF009 - immutable
    """Of the images of the largest batch."""
    token_limits: tuple[tuple[str, int], ...] = ()
    """Text tokens by encoder; the longest go through the denoiser."""
    text_batch: int = 1
    vae_batch: int = 1
    vae_size: int = 2
    sample: Size | None = None
    """Of the largest sample image; None: none are made."""
    device: str = "cuda"

    @property
    def numerics(self) -> Numerics:
        """How the device computes."""
        return Numerics.of(self.device, self.compute)

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer works during the backward pass."""
        return self.gradients != "all"

    def tokens(self, encoder: str) -> int:
        """Of a text."""
        return dict(self.token_limits).get(encoder, 77)

    @property
    def text_tokens(self) -> int:
        """That go through the denoiser."""
        return max((tokens for _, tokens in self.token_limits), default=0)


def setup_of(
    options: Options,
    shapes: Mapping[str, Shapes],
    *,
    trained_elements: int,
    trained_encoders: Iterable[str] = (),
    trains_denoiser: bool = True,
    batch: int,
    size: Size,
    token_limits: Mapping[str, int],
    samples: Sequence[Size] = (),
    units: int,
    device: str = "cuda",
) -> Setup:
    """The setup that a training script's options mean.

    Args:
        shapes: `Family.part_shapes()`.
        trained_elements: `Method.trained_elements(shapes)`.
        batch, size: images of the largest batch, and their size, see `largest_batch`.
        token_limits: `Family.token_limits()`.
        samples: sizes of the sample images.
        units: `ActivationModel.swap_units`.
        device: kind of the device that trains, such as `cuda`.

    Errors: UserError when two ways to store weights contradict each other.
    """
    precision, memory, network = options[PrecisionOptions], options[MemoryOptions], _group(options, NetworkOptions)
    compute = 4 if precision.mixed_precision == "no" else 2
    rank = _rank(network, shapes[DENOISER], trained_elements) if network and trains_denoiser else 0
    cache, text, vae = options[CacheOptions], options[TextCacheOptions], _group(options, VaePrecisionOptions)
    storage = storage_of(options)
    return Setup(
        full=network is None,
        trained_elements=trained_elements,
        trained_size=compute if precision.full_bf16 or precision.full_fp16 else 4,
        compute=compute,
        rank=rank,
        trained_encoders=frozenset(trained_encoders),
        optimizer=_optimizer(options[OptimizerOptions]),
        gradients=_gradients(options),
        accumulates=options[LengthOptions].gradient_accumulation_steps > 1,
        storage=None if network is None else storage.denoiser,
        encoder_storage=storage.encoders,
        cached_text=text.cache_text_encoder_outputs or text.cache_text_encoder_outputs_to_disk,
        cached_latents=cache.cache_latents or cache.cache_latents_to_disk,
        checkpoint_every=memory.checkpoint_every_n_blocks if memory.gradient_checkpointing else 0,
        offload=memory.gradient_checkpointing and options[OffloadOptions].cpu_offload_checkpointing,
        swap=swap_of(options, units),
        ema=_average(options),
        batch=batch,
        size=size,
        token_limits=tuple(token_limits.items()),
        text_batch=text.text_encoder_batch_size or batch,
        vae_batch=cache.vae_batch_size,
        vae_size=4 if vae is not None and vae.no_half_vae else compute,
        sample=max(samples, key=lambda sample: sample.area, default=None),
        device=device,
    )


def largest_batch(items: Iterable[Item], batch_sizes: Sequence[int]) -> tuple[int, Size]:
    """Images and size of the batch with the most pixels; `batch_sizes` are those of the datasets."""
    batches = {(batch_sizes[item.dataset], item.assignment.bucket) for item in items}
    return max(batches, key=lambda batch: batch[0] * batch[1].area)


def _group(options: Options, group: type[Any]) -> Any:
    return options[group] if options.has(group) else None


def _rank(network: NetworkOptions, denoiser: Shapes, trained_elements: int) -> int:
    """That of the option, or the one that a low-rank network of so many elements has."""
    if network.network_dim and not network.dim_from_weights:
        return network.network_dim
    sides = sum(map(sum, matrices(denoiser).values()))
    return max(1, round(trained_elements / max(1, sides)))


def storage_of(options: Options) -> Storage:
    """How frozen weights are stored and multiplied. Errors: UserError for options that contradict one another."""
    from library.models.quantized import scheme_of

    precision, network = options[PrecisionOptions], _group(options, NetworkOptions)
    return scheme_of(
        fp8_base=precision.fp8_base,
        fp8_base_unet=network is not None and network.fp8_base_unet,
        fp8_scaled=precision.fp8_scaled,
        int8_base=precision.int8_base,
        nf4_base=precision.nf4_base,
        fp8_compute=precision.fp8_compute,
        int8_compute=precision.int8_compute,
    )


def _optimizer(options: OptimizerOptions) -> str:
    if options.use_8bit_adam:
        return "AdamW8bit"
    return "Lion" if options.use_lion_optimizer else options.optimizer_type or "AdamW"


def _gradients(options: Options) -> Gradients:
    if options[OptimizerOptions].fused_backward_pass:
        return "none"
    return "block" if cut_of(options) else "all"


BLOCKS, NUMBER = "blockwise_fused_optimizers", "fused_optimizer_groups"
"""Options that cut the parameters into parts, each with an optimizer that steps during the backward pass."""


def cut_of(options: Options) -> str | None:
    """Which of `BLOCKS` and `NUMBER` is wanted; None: neither."""
    offered = (name for name in (BLOCKS, NUMBER) if options.script.option(name) and name not in options.script.ignored)
    return next((name for name in offered if options.value(name)), None)


def swap_of(options: Options, units: int) -> int:
    """What `--blocks_to_swap` and its old spellings come to; `units`: see `ActivationModel.swap_units`."""
    full, network = _group(options, FluxFullOptions), _group(options, NetworkOptions)
    swap = options[OffloadOptions].blocks_to_swap if options.has(OffloadOptions) else None
    if swap is not None:
        return swap
    if full is not None and (full.double_blocks_to_swap or full.single_blocks_to_swap):
        return (full.double_blocks_to_swap or 0) + -(-(full.single_blocks_to_swap or 0) // 2)
    return units // 2 if network is not None and network.split_mode else 0


def _average(options: Options) -> Literal["device", "main memory"] | None:
    ema = _group(options, EmaOptions)
    if ema is None or ema.ema_decay is None:
        return None
    return "main memory" if ema.ema_on_cpu else "device"
