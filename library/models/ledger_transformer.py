"""What transformers have in common on a ledger: a step or a look, blocks that compute again, and their layers.

See `ledger.py`; a model follows its own source line by line, see `ledger_flux.py` and `ledger_mmdit.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from library.models.activations import Amount, Numerics, Step, Training
from library.models.ledger import Gradients, Ledger, Value
from library.models.ledger_layers import (
    Linear,
    addcmul,
    addition,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    split,
)

PIXELS = 16
"""Of an image, per side of a token."""
NARROWING = 2
"""As in `memory.py`."""


class Sizes(Protocol):
    """Of a transformer."""

    @property
    def width(self) -> int:
        """Of a token."""

    @property
    def mlp_width(self) -> int:
        """Of what an MLP makes of a token."""

    @property
    def head_width(self) -> int:
        """Of a head."""


class TransformerActivations(ABC):
    """See `library.models.activations.ActivationModel`."""

    block_lists: Sequence[str]

    def __init__(self) -> None:
        """Nothing is reckoned yet."""
        self._steps: dict[tuple[Amount, Numerics, Training], Step] = {}

    @abstractmethod
    def on_ledger(self, amount: Amount, numerics: Numerics, training: Training | None) -> TransformerLedger:
        """The transformer on a new ledger."""

    def amount(self, images: int, width: int, height: int, text_tokens: int) -> Amount:
        """See `ActivationModel`."""
        return Amount(images=images, image_tokens=(width // PIXELS) * (height // PIXELS), text_tokens=text_tokens)

    def step(self, amount: Amount, numerics: Numerics, training: Training) -> Step:
        """See `ActivationModel`."""
        key = amount, numerics, training
        if key not in self._steps:
            self._steps[key] = self.on_ledger(amount, numerics, training).step()
        return self._steps[key]

    def look(self, amount: Amount, numerics: Numerics) -> int:
        """See `ActivationModel`."""
        return self.on_ledger(amount, numerics, None).look()


class TransformerLedger(ABC):
    """A transformer, and what is trained of it."""

    def __init__(self, sizes: Sizes, amount: Amount, numerics: Numerics, training: Training | None) -> None:
        """`training` None: nothing is trained."""
        self.amount, self.training = amount, training or Training()
        self.width, self.mlp, self.head_width = sizes.width, sizes.mlp_width, sizes.head_width
        self._inputs: list[Value] = []
        self.ledger = Ledger(numerics, self.training.gradients, self.training.update)

    @abstractmethod
    def _forward(self) -> Value:
        """What the model answers."""

    def step(self) -> Step:
        """Forward and backward."""
        ledger = self.ledger
        velocity = self._forward()
        ledger.casts.clear()
        loss = ledger.fresh(velocity.elements, 4)
        gradient = ledger.new(velocity.elements * velocity.size)
        sources = [velocity.source]
        gradients: Gradients = [gradient]
        del velocity, loss, gradient
        ledger.backward(sources, gradients)
        if self.training.gradients == "block":
            ledger.step_block(self.training.size)
        return Step(ledger.peak, ledger.gradients_at_peak, ledger.gradients, ledger.offloaded)

    def look(self) -> int:
        """Peak of a forward pass without gradients."""
        with self.ledger.without_gradients():
            self._forward()
        return self.ledger.peak

    def _vector(self, widths: Sequence[int]) -> Value:
        """What timestep, text and guidance, of these widths, are made to: their sum."""
        ledger, images = self.ledger, self.amount.images
        parts = [
            linear(ledger, linear(ledger, ledger.fresh(images * width), self._edge(width, self.width)), second)
            for width, second in ((width, self._edge(self.width, self.width)) for width in widths)
        ]
        return addition(ledger, parts)

    def _block(self, index: int, run: Callable[..., Sequence[Value]], inputs: list[Value]) -> Sequence[Value]:
        self.ledger.block = index
        every = self.training.checkpoint_every
        if every and index % every == 0:
            return self.ledger.checkpoint(lambda given: run(*given), inputs, offload=self.training.offload)
        return run(*inputs)

    def _think(self, x: Value, rows: list[Value]) -> Value:
        hidden = linear(self.ledger, self._modulated(x, rows[3:]), self._inner(self.width, self.mlp))
        return linear(self.ledger, gelu(self.ledger, hidden), self._inner(self.mlp, self.width))

    def _modulation(self, vec: Value, count: int, inside: bool = True) -> list[Value]:
        layer = (self._inner if inside else self._edge)(self.width, count * self.width)
        return split(self.ledger, linear(self.ledger, vec, layer), [vec.elements] * count)

    def _modulated(self, x: Value, rows: Sequence[Value]) -> Value:
        return addcmul(self.ledger, rows[0], rows[1], layer_norm(self.ledger, x, self.width))

    def _norm(self, x: Value) -> Value:
        return rms_norm(self.ledger, x, self.head_width, self.training.whole)

    def _inner(self, inputs: int, outputs: int) -> Linear:
        """A layer of a block."""
        training = self.training
        return Linear(
            inputs=inputs,
            outputs=outputs,
            rank=training.rank,
            trained=training.whole,
            size=training.size,
            dense=training.dense,
            kept=inputs >= NARROWING * outputs,
        )

    def _edge(self, inputs: int, outputs: int) -> Linear:
        """A layer outside the blocks, which has no adapter."""
        return replace(self._inner(inputs, outputs), rank=0, kept=False)
