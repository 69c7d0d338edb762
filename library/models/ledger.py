"""What a training step keeps in memory, reckoned on sizes instead of numbers. Pure arithmetic.

A `Value` stands for a tensor: a number of elements, the size of each and a place in a graph, without data. The layers
in `ledger_layers.py` do what those of torch do to memory: they make results, remember what the backward pass needs, and
drop what nobody needs any more; a `Storage` counts for as long as Python holds it. So a model written with them, in a
few lines, tells the greatest number of bytes of a whole step, in milliseconds and without torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.models.activations import Gradients as Held
    from library.models.activations import Numerics


class Storage:
    """Memory that counts while somebody holds this."""

    __slots__ = ("_ledger", "size")

    def __init__(self, ledger: Ledger, size: int) -> None:
        self._ledger, self.size = ledger, size
        ledger.take(size)

    def __del__(self) -> None:
        self._ledger.live -= self.size


Source = tuple["Node", int]
"""A result of an operation: where the gradient of a tensor goes."""
Gradients = list["Storage | None"]
Backward = Callable[[Gradients, Sequence[Storage]], Gradients]
"""The gradients of an operation's inputs, from those of its results and what it saved. It takes the given ones away
when it needs them no more."""


class Node:
    """An operation in the graph, or a leaf: a tensor whose gradient is wanted."""

    __slots__ = ("backward", "leaf", "number", "outputs", "parents", "saved")

    def __init__(self, number: int, outputs: int = 1) -> None:
        self.number, self.outputs = number, outputs
        self.leaf: Callable[[Storage], None] | None = None
        """What becomes of a leaf's gradient; None: it is none."""
        self.parents: Sequence[Source | None] = ()
        self.saved: Sequence[Storage] = ()
        self.backward: Backward | None = None


@dataclass(frozen=True)
class Value:
    """A tensor without its data."""

    elements: int
    size: int
    """Bytes of each element."""
    storage: Storage
    source: Source | None = None
    """None: nothing that it depends on is trained."""


class Ledger:
    """Counts bytes, and is the graph of the step."""

    def __init__(self, numerics: Numerics, gradients: Held = "all", update: int = 0) -> None:
        """`gradients`, `update`: see `library.models.activations.Training`."""
        self.numerics, self._held, self._update = numerics, gradients, update
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        self.gradients = 0
        """Bytes of the gradients of trained tensors so far."""
        self.gradients_at_peak = 0
        self.casts: list[Storage] = []
        """Copies of weights that autocast keeps until the end of the forward pass."""
        self.offloaded = 0
        """Bytes that lie in main memory meanwhile."""
        self.block = -1
        """Which block the model is in."""
        self.recomputes = False
        """Whether it is in a block that computes again, where autocast keeps no copies."""
        self._kept: list[Storage] | None = None
        self._repeated: Iterator[Storage] | None = None
        self._gradients: list[Storage] = []
        self._gradients_of = -1
        self._count, self._recording = 0, True

    def take(self, size: int) -> None:
        """Notes that so much more is held."""
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients

    def new(self, size: float) -> Storage:
        """Memory of so many bytes."""
        return Storage(self, round(size))

    def fresh(self, elements: int, size: int | None = None) -> Value:
        """A tensor that comes from outside the model."""
        size = size or self.numerics.compute
        return Value(elements, size, self.new(elements * size))

    # the graph

    def trained(self, size: int) -> Source:
        """A trained tensor with elements of so many bytes."""

        block = self.block

        def keep(gradient: Storage) -> None:
            if self._held == "none":
                self.new(gradient.size / size * self._update)
                return
            if self._held == "block" and block != self._gradients_of:
                self.step_block(size)
                self._gradients_of = block
            self._gradients.append(gradient)
            self.gradients += gradient.size

        return self._leaf(keep)

    def step_block(self, size: int) -> None:
        """Has the optimizer move the weights whose gradients, with elements of so many bytes, are held."""
        self.new(max((gradient.size for gradient in self._gradients), default=0) / size * self._update)
        self._gradients.clear()
        self.gradients = 0

    def wanted(self) -> Source:
        """A tensor from elsewhere whose gradient goes on to there."""
        return self._leaf(_drop)

    def record(
        self, inputs: Sequence[Source | None], saved: Sequence[Storage], backward: Backward, outputs: int = 1
    ) -> Node | None:
        """The node of an operation; None, and nothing is saved, when no input needs a gradient."""
        if not self._recording or not any(inputs):
            return None
        node = self._node(outputs)
        node.parents, node.saved, node.backward = tuple(inputs), tuple(saved), backward
        return node

    def result(
        self, like: tuple[int, int], inputs: Sequence[Source | None], saved: Sequence[Storage], backward: Backward
    ) -> Value:
        """A new tensor of (elements, size), the only result of an operation."""
        elements, size = like
        node = self.record(inputs, saved, backward)
        return Value(elements, size, self.new(elements * size), None if node is None else (node, 0))

    def backward(self, results: Sequence[Source | None], gradients: Gradients) -> None:
        """Runs backward from results, the latest operation first; the gradients are taken out of their list."""
        waiting: dict[int, tuple[Node, Gradients]] = {}
        order: list[int] = []

        def give(sources: Sequence[Source | None], passed: Gradients) -> None:
            for source in sources:
                gradient = passed.pop(0)
                if source is None or gradient is None:
                    continue
                node, output = source
                if node.leaf is not None:
                    node.leaf(gradient)
                    continue
                if node.number not in waiting:
                    waiting[node.number] = node, [None] * node.outputs
                    heapq.heappush(order, -node.number)
                slots = waiting[node.number][1]
                slots[output] = gradient if slots[output] is None else self.new(gradient.size)

        give(results, gradients)
        while order:
            node, slots = waiting.pop(-heapq.heappop(order))
            assert node.backward is not None
            passed = node.backward(slots, node.saved)
            slots.clear()
            node.saved = ()
            give(node.parents, passed)
            node.parents = ()

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """As torch.no_grad."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def _node(self, outputs: int = 1) -> Node:
        self._count += 1
        return Node(self._count, outputs)

    def _leaf(self, take: Callable[[Storage], None]) -> Source:
        leaf = self._node()
        leaf.leaf = take
        return leaf, 0

    # recomputing, see library.models.memory

    def checkpoint(
        self, run: Callable[[Sequence[Value]], Sequence[Value]], inputs: Sequence[Value], *, offload: bool = False
    ) -> list[Value]:
        """What `run` makes of the inputs, keeping only them and the products worth keeping."""
        if not self._recording:
            return list(run(inputs))
        kept: list[Storage] = []
        with self._passing(None if offload else kept, None), self.without_gradients():
            results = [(value.elements, value.size, value.storage) for value in run(inputs)]
        shapes = [(value.elements, value.size) for value in inputs]
        saved = [value.storage for value in inputs]
        wanted = [value.source is not None for value in inputs]
        offloaded = [offload and needed for needed in wanted]
        self.offloaded += sum(math.prod(shape) for shape, away in zip(shapes, offloaded, strict=True) if away)
        block = self.block
        here = [storage for storage, away in zip(saved, offloaded, strict=True) if not away]

        def backward(gradients: Gradients, saved: Sequence[Storage]) -> Gradients:
            found: Gradients = [None] * len(shapes)

            def taker(index: int) -> Callable[[Storage], None]:
                def take(gradient: Storage) -> None:
                    found[index] = gradient if found[index] is None else self.new(gradient.size)

                return take

            stored = iter(saved)
            ahead = self.new(sum(math.prod(shape) for shape, away in zip(shapes, offloaded, strict=True) if away))
            again = [
                Value(
                    *shape,
                    self.new(math.prod(shape)) if away else next(stored),
                    self._leaf(taker(index)) if needed else None,
                )
                for index, (shape, away, needed) in enumerate(zip(shapes, offloaded, wanted, strict=True))
            ]
            self.block = block
            with self._passing(None, iter(kept)):
                sources = [value.source for value in run(again)]
            del again
            self.backward(sources, gradients)
            del ahead  # the inputs of the block before, which were fetched meanwhile
            return found

        # what is trained inside makes the results need gradients, whether the inputs do or not
        node = self.record([value.source or self.wanted() for value in inputs], here, backward, len(results))
        return [
            Value(elements, size, storage, None if node is None else (node, index))
            for index, (elements, size, storage) in enumerate(results)
        ]

    @contextmanager
    def _passing(self, kept: list[Storage] | None, repeated: Iterator[Storage] | None) -> Iterator[None]:
        before = self._kept, self._repeated, self.recomputes
        self._kept, self._repeated, self.recomputes = kept, repeated, True
        try:
            yield
        finally:
            self._kept, self._repeated, self.recomputes = before

    def product(self, size: int) -> Storage:
        """The result of a product that is worth keeping; in the second pass that of the first."""
        if self._repeated is not None:
            stored = next(self._repeated, None)
            if stored is not None:
                return stored
        made = self.new(size)
        if self._kept is not None:
            self._kept.append(made)
        return made


def _drop(gradient: Storage) -> None:
    pass
