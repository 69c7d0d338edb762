"""The layers of `ledger.py`: each does to memory what the one of torch with its name does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.models.ledger import Gradients, Ledger, Source, Storage, Value

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer, what is trained of it, and how its weight is held."""

    inputs: int
    outputs: int
    rank: int = 0
    """Of the adapter on it; 0: none."""
    trained: bool = False
    """Whether the weight itself is."""
    size: int = FLOAT
    """Bytes of an element of what is trained."""
    dense: bool = False
    """Whether the weight is made dense for each product, because it is stored otherwise."""
    kept: bool = False
    """Whether checkpointing keeps the product, see `library.models.memory`."""

    @property
    def elements(self) -> int:
        """Of the weight."""
        return self.inputs * self.outputs


def linear(ledger: Ledger, x: Value, layer: Linear) -> Value:
    """`x W^T + b`, with the adapter's term if there is one."""
    if layer.rank:
        return _low_rank(ledger, x, layer)
    return _trained(ledger, x, layer) if layer.trained else _frozen(ledger, x, layer)


def _low_rank(ledger: Ledger, x: Value, layer: Linear) -> Value:
    """As `networks.low_rank.LowRankLinear`."""
    size = ledger.numerics.compute
    x = cast(ledger, x, size)
    rows, rank = x.elements // layer.inputs, layer.rank
    factors = [rank * layer.inputs, rank * layer.outputs]
    small = [ledger.new(count * size) for count in factors] if layer.size != size else []
    middle = ledger.new(rows * rank * size)
    dense = _dense(ledger, layer)
    kept = ledger.product(rows * layer.outputs * size) if layer.kept else None
    if kept is not None:
        dense = None
    needs_x = x.source is not None

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        scratch = ledger.new(rows * rank * size)
        x_gradient = None
        if needs_x:
            dense = _dense(ledger, layer)
            x_gradient = ledger.new(rows * layer.inputs * size)
            del dense
        found: Gradients = [x_gradient]
        for count in factors:
            gradient = ledger.new(count * size)
            found.append(gradient if layer.size == size else ledger.new(count * layer.size))
            del gradient
        del scratch
        return found

    saved = [x.storage, middle, *small]
    made = ledger.result(
        (rows * layer.outputs, size),
        [x.source, ledger.trained(layer.size), ledger.trained(layer.size)],
        saved,
        backward,
    )
    del kept, dense
    return made


def _trained(ledger: Ledger, x: Value, layer: Linear) -> Value:
    """A trained weight; where it is held in another type, autocast keeps the copy in that of the product."""
    size = ledger.numerics.compute
    x = cast(ledger, x, size)
    rows = x.elements // layer.inputs
    saved = [x.storage]
    if layer.size != size:
        copy = ledger.new(layer.elements * size)
        saved.append(copy)
        if not ledger.recomputes:
            ledger.casts.append(copy)
    needs_x = x.source is not None

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        x_gradient = ledger.new(rows * layer.inputs * size) if needs_x else None
        gradient = ledger.new(layer.elements * size)
        gradients.clear()
        return [x_gradient, ledger.new(layer.elements * layer.size) if layer.size != size else gradient]

    storage = ledger.product(rows * layer.outputs * size) if layer.kept else None
    node = ledger.record([x.source, ledger.trained(layer.size)], saved, backward)
    elements = rows * layer.outputs
    return Value(elements, size, storage or ledger.new(elements * size), None if node is None else (node, 0))


def _frozen(ledger: Ledger, x: Value, layer: Linear) -> Value:
    size = ledger.numerics.compute
    x = cast(ledger, x, size)
    rows = x.elements // layer.inputs

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        dense = _dense(ledger, layer)
        x_gradient = ledger.new(rows * layer.inputs * size)
        del dense
        return [x_gradient]

    dense = _dense(ledger, layer)
    made = ledger.result((rows * layer.outputs, size), [x.source], (), backward)
    del dense
    return made


def _dense(ledger: Ledger, layer: Linear) -> Storage | None:
    return ledger.new(layer.elements * ledger.numerics.compute) if layer.dense else None


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution, and what is trained of it."""

    inputs: int
    """Channels."""
    outputs: int
    kernel: int
    trained: bool = False
    size: int = FLOAT
    """Bytes of an element of what is trained."""

    @property
    def elements(self) -> int:
        """Of the weight."""
        return self.inputs * self.outputs * self.kernel**2


def conv(ledger: Ledger, x: Value, layer: Conv, pixels: int) -> Value:
    """To so many pixels; a frozen one keeps its input, too."""
    size = ledger.numerics.compute
    x = cast(ledger, x, size)
    elements, saved, needs_x = x.elements, [x.storage], x.source is not None
    if layer.trained and layer.size != size:
        saved.append(ledger.new(layer.elements * size))
        ledger.casts += [] if ledger.recomputes else saved[-1:]

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        x_gradient = ledger.new(elements * size) if needs_x else None
        if not layer.trained:
            return [x_gradient]
        gradient = ledger.new(layer.elements * size)
        gradients.clear()
        return [x_gradient, ledger.new(layer.elements * layer.size) if layer.size != size else gradient]

    sources = [x.source, *([ledger.trained(layer.size)] if layer.trained else [])]
    return ledger.result((pixels * layer.outputs, size), sources, saved, backward)


def upsample(ledger: Ledger, x: Value) -> Value:
    """To twice the height and width."""
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    return ledger.result((4 * x.elements, x.size), [x.source], (), backward)


def product(ledger: Ledger, x: Value, y: Value) -> Value:
    """Of elements."""
    sizes = x.elements * x.size, y.elements * y.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size) for size in sizes]

    return ledger.result((x.elements, x.size), [x.source, y.source], [x.storage, y.storage], backward)


def cast(ledger: Ledger, x: Value, size: int) -> Value:
    """`x.to(dtype)`."""
    if x.size == size:
        return x

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(x_bytes)]

    x_bytes = x.elements * x.size
    return ledger.result((x.elements, size), [x.source], (), backward)


def layer_norm(ledger: Ledger, x: Value, width: int) -> Value:
    """Without weights."""
    x = cast(ledger, x, ledger.numerics.norms)
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    statistics = ledger.new(2 * FLOAT * x.elements // width)
    return ledger.result((x.elements, x.size), [x.source], [x.storage, statistics], backward)


def addcmul(ledger: Ledger, base: Value, row: Value, x: Value) -> Value:
    """`base + row * x`, where the row is much shorter than x, and the base is so, too, or as long as x."""
    size = x.elements * x.size
    sources = [base.source, row.source, x.source]
    needs = [source is not None for source in sources]
    base_is_short = base.elements < x.elements
    short = base.elements * base.size, row.elements * row.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        (gradient,) = gradients
        row_gradient = x_gradient = None
        if needs[1]:
            scaled = ledger.new(size)
            row_gradient = ledger.new(size)
            del scaled
        if needs[2]:
            x_gradient = ledger.new(size)
        if row_gradient is not None:
            row_gradient = ledger.new(short[1])
        return [ledger.new(short[0]) if base_is_short else gradient, row_gradient, x_gradient]

    saved = [x.storage] if needs[1] else []
    return ledger.result((x.elements, x.size), sources, saved, backward)


def addition(ledger: Ledger, parts: Sequence[Value]) -> Value:
    """The sum of values of one size."""

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [gradients[0]] * count

    count = len(parts)
    return ledger.result((parts[0].elements, parts[0].size), source_of(parts), (), backward)


def gelu(ledger: Ledger, x: Value) -> Value:
    """Of each element."""
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    return ledger.result((x.elements, x.size), [x.source], [x.storage], backward)


def rms_norm(ledger: Ledger, x: Value, width: int, trained: bool) -> Value:
    """With one weight per element of the width."""
    numerics = ledger.numerics
    if not numerics.fused_norm:
        return _composed_rms_norm(ledger, x, trained)
    x = cast(ledger, x, numerics.norms)
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    saved = [x.storage, ledger.new(FLOAT * x.elements // width)]
    return ledger.result((x.elements, x.size), [x.source], saved, backward)


def _composed_rms_norm(ledger: Ledger, x: Value, trained: bool) -> Value:
    """Made of squares, means, roots and products in float32, as torch does where it has no kernel."""
    wanted = x.size
    x = cast(ledger, x, FLOAT)
    size = x.elements * FLOAT

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        normed = ledger.new(size)
        if trained:
            ledger.new(size)
        gradients.clear()
        direct, root = ledger.new(size), ledger.new(size)
        del normed, root
        spread, power = ledger.new(size), ledger.new(size)
        twice = ledger.new(size)
        del power
        by_root = ledger.new(size)
        del spread, twice
        total = ledger.new(size)
        del direct, by_root
        return [total]

    squares = ledger.new(size)
    del squares
    normed = ledger.new(size)
    saved = [x.storage, *([normed] if trained else [])]
    made = ledger.result((x.elements, FLOAT), [x.source], saved, backward)
    del normed
    return cast(ledger, made, wanted)


def rotate(ledger: Ledger, x: Value) -> Value:
    """As `library.models.flux.rotate`: in float32."""
    count, size = x.elements, x.size
    swapped = ledger.new(count * size)

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        gradient = ledger.new(count * FLOAT) if size != FLOAT else gradients.pop()
        gradients.clear()
        swapped = ledger.new(count * FLOAT)
        if size != FLOAT:
            swapped = ledger.new(count * size)
        direct = ledger.new(count * FLOAT)
        del gradient
        if size != FLOAT:
            direct = ledger.new(count * size)
        turned = ledger.new(count * size)
        del swapped
        total = ledger.new(count * size)
        del direct, turned
        return [total]

    products = ledger.new(count * FLOAT)
    total = ledger.new(count * FLOAT) if size != FLOAT else None
    del products
    made = ledger.result((count, size), [x.source], (), backward)
    del swapped, total
    return made


def attention(ledger: Ledger, q: Value, k: Value, v: Value, width: int) -> Value:
    """Without the matrix of all pairs; `width` is that of a head."""
    size = ledger.numerics.compute
    parts = [cast(ledger, part, size) for part in (q, k, v)]
    count, counts = q.elements, [part.elements for part in parts]

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        scratch = ledger.new(count * ledger.numerics.attention_scratch)
        found: Gradients = [ledger.new(each * size) for each in counts]
        del scratch
        return found

    logsum = ledger.new(FLOAT * count // width)
    storage = ledger.new(count * size)
    saved = [part.storage for part in parts]
    node = ledger.record([part.source for part in parts], [*saved, logsum, storage], backward)
    return Value(count, size, storage, None if node is None else (node, 0))


def cat(ledger: Ledger, parts: Sequence[Value]) -> Value:
    """One after the other; the gradients are views of one."""

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [gradients[0]] * count

    count = len(parts)
    return ledger.result((sum(part.elements for part in parts), parts[0].size), source_of(parts), (), backward)


def split(ledger: Ledger, x: Value, lengths: Sequence[int]) -> list[Value]:
    """Views of parts of x; their gradients are joined."""
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    node = ledger.record([x.source], (), backward, len(lengths))
    return [
        Value(length, x.size, x.storage, None if node is None else (node, index))
        for index, length in enumerate(lengths)
    ]


def contiguous(ledger: Ledger, x: Value, is_so: bool) -> Value:
    """A copy unless it is contiguous."""
    if is_so:
        return x

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [gradients[0]]

    return ledger.result((x.elements, x.size), [x.source], (), backward)


def part_of(ledger: Ledger, x: Value, elements: int) -> Value:
    """A slice; its gradient is put into one of the whole."""
    size = x.elements * x.size

    def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
        return [ledger.new(size)]

    node = ledger.record([x.source], (), backward)
    return Value(elements, x.size, x.storage, None if node is None else (node, 0))


def source_of(values: Sequence[Value]) -> list[Source | None]:
    """Where gradients go."""
    return [value.source for value in values]
