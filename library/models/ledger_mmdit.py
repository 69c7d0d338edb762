"""SD3's transformer on a ledger: what a training step, or a look, takes beside the weights. See `ledger.py`.

Follows `mmdit.py` line by line, so that what is held at a time is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.models.activations import Amount, Numerics, Training
from library.models.ledger import Value
from library.models.ledger_layers import addcmul, addition, attention, cat, contiguous, linear, split
from library.models.ledger_transformer import TransformerActivations, TransformerLedger
from library.models.sd3_text import CLIP_TOKENS

if TYPE_CHECKING:
    from library.models.mmdit import MMDiTConfig


class MMDiTActivations(TransformerActivations):
    """See `library.models.activations.ActivationModel`."""

    block_lists: Sequence[str] = ("joint_blocks",)

    def __init__(self, config: MMDiTConfig) -> None:
        """Of the transformer with these sizes."""
        super().__init__()
        self.config = config

    @property
    def swap_units(self) -> int:
        """See `ActivationModel`."""
        return self.config.depth

    def amount(self, images: int, width: int, height: int, text_tokens: int) -> Amount:
        """See `ActivationModel`; the tokens of the longest encoder, T5, follow those of CLIP."""
        return super().amount(images, width, height, text_tokens + CLIP_TOKENS)

    def on_ledger(self, amount: Amount, numerics: Numerics, training: Training | None) -> MMDiTLedger:
        """See `TransformerActivations`."""
        return MMDiTLedger(self.config, amount, numerics, training)


class MMDiTLedger(TransformerLedger):
    """The transformer with these sizes."""

    def __init__(self, config: MMDiTConfig, amount: Amount, numerics: Numerics, training: Training | None) -> None:
        """`training` None: nothing is trained."""
        super().__init__(config, amount, numerics, training)
        self.config = config

    def _forward(self) -> Value:
        config, amount, ledger = self.config, self.amount, self.ledger
        tokens = amount.images * amount.image_tokens, amount.images * amount.text_tokens
        self._inputs = [ledger.fresh(tokens[0] * config.in_channels * config.patch**2)]
        self._inputs += [ledger.fresh(tokens[1] * config.context_width)]
        pixels, text = self._inputs
        if not self.training.inside:
            text = replace(text, source=ledger.wanted())
        x = linear(ledger, pixels, self._edge(config.in_channels * config.patch**2, self.width))
        places = ledger.fresh(amount.image_tokens * self.width)
        x = addition(ledger, [x, places])
        del places
        vec = self._vector([config.frequencies, config.pooled_width])
        context = linear(ledger, text, self._edge(config.context_width, self.width))
        for index in range(config.depth):
            context, x = self._block(index, self._joint, [context, x, vec])
        rows = self._modulation(vec, 2, inside=False)
        return linear(ledger, self._modulated(x, rows), self._edge(self.width, config.out_channels))

    def _joint(self, context: Value, x: Value, vec: Value) -> tuple[Value, Value]:
        ledger, width, index = self.ledger, self.width, self.ledger.block
        is_last, is_dual = index == self.config.depth - 1, index in self.config.dual_blocks
        context_rows, x_rows = self._modulation(vec, 2 if is_last else 6), self._modulation(vec, 9 if is_dual else 6)
        context_q, context_k, context_v = self._heads(context, context_rows)
        x_q, x_k, x_v = self._heads(x, x_rows)
        q, k, v = cat(ledger, [context_q, x_q]), cat(ledger, [context_k, x_k]), cat(ledger, [context_v, x_v])
        seen = attention(ledger, q, k, v, self.head_width)
        context_seen, x_seen = split(ledger, seen, (context.elements, x.elements))
        whole = self.amount.images == 1

        def added(y: Value, row: Value, seen: Value) -> Value:
            return addcmul(ledger, y, row, linear(ledger, seen, self._inner(width, width)))

        attended = added(x, x_rows[2], contiguous(ledger, x_seen, whole))
        if is_dual:
            alone = attention(ledger, *self._heads(x, x_rows[6:]), self.head_width)
            attended = added(attended, x_rows[8], alone)
        x = addcmul(ledger, attended, x_rows[5], self._think(attended, x_rows))
        if not is_last:
            context = added(context, context_rows[2], contiguous(ledger, context_seen, whole))
            context = addcmul(ledger, context, context_rows[5], self._think(context, context_rows))
        return context, x

    def _heads(self, x: Value, rows: list[Value]) -> tuple[Value, Value, Value]:
        width = self.width
        qkv = linear(self.ledger, self._modulated(x, rows), self._inner(width, 3 * width))
        q, k, v = split(self.ledger, qkv, [x.elements] * 3)
        return (self._norm(q), self._norm(k), v) if self.config.qk_norm else (q, k, v)
