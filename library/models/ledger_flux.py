"""FLUX.1 on a ledger: what a training step, or a look without gradients, takes beside the weights. See `ledger.py`.

Follows `flux.py` line by line, so that what is held at a time is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.models.activations import Amount, Numerics, Step, Training
from library.models.ledger import Gradients, Ledger, Value
from library.models.ledger_layers import (
    Linear,
    addcmul,
    addition,
    attention,
    cat,
    contiguous,
    gelu,
    layer_norm,
    linear,
    part_of,
    rms_norm,
    rotate,
    split,
)

if TYPE_CHECKING:
    from library.models.flux import FluxConfig

PIXELS = 16
"""Of an image, per side of a token."""
NARROWING = 2
"""As in `memory.py`."""


class FluxActivations:
    """See `library.models.activations.ActivationModel`."""

    block_lists: Sequence[str] = ("double_blocks", "single_blocks")

    def __init__(self, config: FluxConfig) -> None:
        """Of the transformer with these sizes."""
        self.config = config
        self._steps: dict[tuple[Amount, Numerics, Training], Step] = {}

    @property
    def swap_units(self) -> int:
        """See `ActivationModel`: two single blocks, which are about half as large, count for one."""
        return self.config.double_blocks + -(-self.config.single_blocks // 2)

    def amount(self, images: int, width: int, height: int, text_tokens: int) -> Amount:
        """See `ActivationModel`."""
        return Amount(images=images, image_tokens=(width // PIXELS) * (height // PIXELS), text_tokens=text_tokens)

    def step(self, amount: Amount, numerics: Numerics, training: Training) -> Step:
        """See `ActivationModel`."""
        key = amount, numerics, training
        if key not in self._steps:
            self._steps[key] = FluxLedger(self.config, amount, numerics, training).step()
        return self._steps[key]

    def look(self, amount: Amount, numerics: Numerics) -> int:
        """See `ActivationModel`."""
        return FluxLedger(self.config, amount, numerics, None).look()


class FluxLedger:
    """The transformer with these sizes."""

    def __init__(self, config: FluxConfig, amount: Amount, numerics: Numerics, training: Training | None) -> None:
        """`training` None: nothing is trained."""
        self.config, self.amount, self.training = config, amount, training or Training()
        self.width, self.mlp = config.width, config.mlp_width
        self._inputs: list[Value] = []
        self.ledger = Ledger(numerics, self.training.gradients, self.training.update)

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

    def _forward(self) -> Value:
        config, amount, ledger = self.config, self.amount, self.ledger
        tokens = amount.images * amount.image_tokens, amount.images * amount.text_tokens
        self._inputs = [ledger.fresh(tokens[0] * config.in_channels), ledger.fresh(tokens[1] * config.context_width)]
        inputs = list(self._inputs)
        if not self.training.inside:
            inputs[1] = replace(inputs[1], source=ledger.wanted())
        img = linear(ledger, inputs[0], self._edge(config.in_channels, self.width))
        txt = linear(ledger, inputs[1], self._edge(config.context_width, self.width))
        embedded = [config.frequencies, config.pooled_width, *([config.frequencies] if config.guidance else [])]
        vec = self._vector(embedded)
        tables = ledger.fresh(2 * sum(tokens) * config.head_width, 4)
        for index in range(config.double_blocks):
            img, txt = self._block(index, self._double, [img, txt, vec])
        x = cat(ledger, [txt, img])
        for index in range(config.single_blocks):
            (x,) = self._block(config.double_blocks + index, self._single, [x, vec])
        velocity = self._last(part_of(ledger, x, img.elements), vec)
        del tables
        return velocity

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

    def _double(self, img: Value, txt: Value, vec: Value) -> tuple[Value, Value]:
        ledger, width = self.ledger, self.width
        img_rows, txt_rows = self._modulation(vec, 6), self._modulation(vec, 6)
        img_q, img_k, img_v = self._heads(img, img_rows)
        txt_q, txt_k, txt_v = self._heads(txt, txt_rows)
        q, k, v = cat(ledger, [txt_q, img_q]), cat(ledger, [txt_k, img_k]), cat(ledger, [txt_v, img_v])
        attended = attention(ledger, rotate(ledger, q), rotate(ledger, k), v, self.config.head_width)
        txt_attended, img_attended = split(ledger, attended, (txt.elements, img.elements))
        whole = self.amount.images == 1

        def finish(x: Value, rows: list[Value], seen: Value) -> Value:
            seen = contiguous(ledger, seen, whole)
            x = addcmul(ledger, x, rows[2], linear(ledger, seen, self._inner(width, width)))
            return addcmul(ledger, x, rows[5], self._think(x, rows))

        img = finish(img, img_rows, img_attended)
        txt = finish(txt, txt_rows, txt_attended)
        return img, txt

    def _think(self, x: Value, rows: list[Value]) -> Value:
        hidden = linear(self.ledger, self._modulated(x, rows[3:]), self._inner(self.width, self.mlp))
        return linear(self.ledger, gelu(self.ledger, hidden), self._inner(self.mlp, self.width))

    def _heads(self, x: Value, rows: list[Value]) -> tuple[Value, Value, Value]:
        width = self.width
        qkv = linear(self.ledger, self._modulated(x, rows), self._inner(width, 3 * width))
        q, k, v = split(self.ledger, qkv, [x.elements] * 3)
        return self._norm(q), self._norm(k), v

    def _single(self, x: Value, vec: Value) -> tuple[Value]:
        ledger, width, mlp = self.ledger, self.width, self.mlp
        rows = self._modulation(vec, 3)
        both = linear(ledger, self._modulated(x, rows), self._inner(width, 3 * width + mlp))
        qkv, hidden = split(ledger, both, (3 * x.elements, x.elements // width * mlp))
        del both
        q, k, v = split(ledger, qkv, [x.elements] * 3)
        q, k = self._norm(q), self._norm(k)
        attended = attention(ledger, rotate(ledger, q), rotate(ledger, k), v, self.config.head_width)
        joined = cat(ledger, [attended, gelu(ledger, hidden)])
        return (addcmul(ledger, x, rows[2], linear(ledger, joined, self._inner(width + mlp, width))),)

    def _last(self, x: Value, vec: Value) -> Value:
        rows = self._modulation(vec, 2, inside=False)
        return linear(self.ledger, self._modulated(x, rows), self._edge(self.width, self.config.out_channels))

    def _modulation(self, vec: Value, count: int, inside: bool = True) -> list[Value]:
        layer = (self._inner if inside else self._edge)(self.width, count * self.width)
        return split(self.ledger, linear(self.ledger, vec, layer), [vec.elements] * count)

    def _modulated(self, x: Value, rows: Sequence[Value]) -> Value:
        return addcmul(self.ledger, rows[0], rows[1], layer_norm(self.ledger, x, self.width))

    def _norm(self, x: Value) -> Value:
        return rms_norm(self.ledger, x, self.config.head_width, self.training.whole)

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
