"""FLUX.1 on a ledger: what a training step, or a look without gradients, takes beside the weights. See `ledger.py`.

Follows `flux.py` line by line, so that what is held at a time is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.models.activations import Amount, Numerics, Training
from library.models.ledger import Value
from library.models.ledger_layers import (
    addcmul,
    attention,
    cat,
    contiguous,
    gelu,
    linear,
    part_of,
    rotate,
    split,
)
from library.models.ledger_transformer import TransformerActivations, TransformerLedger

if TYPE_CHECKING:
    from library.models.flux import FluxConfig


class FluxActivations(TransformerActivations):
    """See `library.models.activations.ActivationModel`."""

    block_lists: Sequence[str] = ("double_blocks", "single_blocks")

    def __init__(self, config: FluxConfig) -> None:
        """Of the transformer with these sizes."""
        super().__init__()
        self.config = config

    @property
    def swap_units(self) -> int:
        """See `ActivationModel`: two single blocks, which are about half as large, count for one."""
        return self.config.double_blocks + -(-self.config.single_blocks // 2)

    def on_ledger(self, amount: Amount, numerics: Numerics, training: Training | None) -> FluxLedger:
        """See `TransformerActivations`."""
        return FluxLedger(self.config, amount, numerics, training)


class FluxLedger(TransformerLedger):
    """The transformer with these sizes."""

    def __init__(self, config: FluxConfig, amount: Amount, numerics: Numerics, training: Training | None) -> None:
        """`training` None: nothing is trained."""
        super().__init__(config, amount, numerics, training)
        self.config = config

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
