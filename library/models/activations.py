"""What a denoiser needs in memory beside its weights: the questions, and who answers them. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Gradients = Literal["all", "block", "none"]
"""Which gradients of what is trained are held at a time: all, those of one block, or none but the one in use."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much goes through the model at once."""

    images: int
    image_tokens: int
    """Of each image."""
    text_tokens: int
    """Of each caption."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """In which types and with which kernels a device computes; sizes are bytes of an element."""

    compute: int
    norms: int
    """Of what norms take and give: 4 where autocast runs them in float32."""
    fused_norm: bool
    """Whether the RMS norm is one kernel; else it is made of parts, which keep more."""
    attention_scratch: int
    """What the backward pass of attention needs for itself, for each element of the queries."""

    @classmethod
    def of(cls, device: str, compute: int) -> Numerics:
        """Of a kind of device, such as `cuda`, that computes in a type of so many bytes."""
        if device == "cpu":
            return cls(compute=compute, norms=compute, fused_norm=False, attention_scratch=0)
        return cls(compute=compute, norms=4, fused_norm=True, attention_scratch=4)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how memory is saved."""

    rank: int = 0
    """Of the adapters on all linear layers of the blocks; 0: there are none."""
    whole: bool = False
    """Whether the model itself is trained. Without adapters either, its inputs are."""
    size: int = 4
    """Bytes of an element of what is trained."""
    dense: bool = False
    """Whether frozen weights are made dense for each product, because they are stored otherwise."""
    checkpoint_every: int = 0
    """Each n-th block computes again; 0: none."""
    offload: bool = False
    """Whether what checkpointing keeps lies in main memory."""
    gradients: Gradients = "all"
    update: int = 0
    """Bytes for each element of a weight while the optimizer moves it, where it does so in the backward pass."""

    @property
    def inside(self) -> bool:
        """Whether something of the model is trained."""
        return self.whole or self.rank > 0


@dataclass(frozen=True)
class Step:
    """Bytes that a training step takes beside weights and optimizer."""

    peak: int
    """Activations, and gradients of what is trained, when together they are most."""
    gradients_at_peak: int
    gradients: int
    """Of what is trained, when the backward pass is done."""
    offloaded: int
    """In main memory."""


class ActivationModel(Protocol):
    """What a family knows about its denoiser."""

    block_lists: Sequence[str]
    """Where its repeated blocks lie, in the order in which they compute: `double_blocks` for `double_blocks.0` ..., or
    the paths of the blocks themselves."""

    @property
    def swap_units(self) -> int:
        """How many blocks there are in the counting of `--blocks_to_swap`."""

    def amount(self, images: int, width: int, height: int, text_tokens: int) -> Amount:
        """Of images of so many pixels."""

    def step(self, amount: Amount, numerics: Numerics, training: Training) -> Step:
        """Of a forward and a backward pass."""

    def look(self, amount: Amount, numerics: Numerics) -> int:
        """Peak bytes of a forward pass without gradients."""
