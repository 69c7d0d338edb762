"""Which samples come when: batches of one bucket, shuffled, dealt to processes and grouped to optimizer steps.

Pure arithmetic on indices. Source of the order: the reference's rule (first shuffle with seed 0, then epoch by epoch
with seed + epoch, each on the lists the last one left), with a generator of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import overload


@dataclass(frozen=True)
class Lane:
    """The entries of one bucket of one dataset, repeats included, and how many make a batch of one process."""

    entries: tuple[int, ...]
    batch_size: int
    taking_turns: tuple[int, ...] = ()
    """Further entries, of which each epoch has `turns`: the next ones each time."""
    turns: int = 0

    def __len__(self) -> int:
        return len(self.entries) + self.turns

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-len(self) // self.batch_size)

    def places(self) -> list[int]:
        """What is shuffled: entries, and negative numbers for those that take turns."""
        return [*self.entries, *(-1 - turn for turn in range(self.turns))]

    def filled(self, places: Sequence[int], epoch: int) -> tuple[int, ...]:
        """The entries of an epoch."""
        if not self.turns:
            return tuple(places)
        first, waiting = max(epoch - 1, 0) * self.turns, self.taking_turns
        return tuple(waiting[(first - 1 - place) % len(waiting)] if place < 0 else place for place in places)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a lane: one batch of one process."""

    lane: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does in one micro-step."""

    lane: int
    entries: tuple[int, ...]
    position: int
    """Position of its first sample in the epoch, the same whatever the number of processes."""
    weight: float
    """Of each of its samples in the loss; 0 for a copy that only keeps an idle process busy."""
    completes_step: bool
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Group:
    """One micro-step of all processes."""

    shares: tuple[Share, ...]
    """One for each process."""


class Epoch(Sequence[Group]):
    """The micro-steps of an epoch; each is put together when it is asked for."""

    def __init__(
        self,
        epoch: int,
        lists: Sequence[Sequence[int]],
        groups: Sequence[tuple[Part, ...]],
        world: int,
        accumulation: int,
    ) -> None:
        self.epoch, self.world, self.accumulation = epoch, world, accumulation
        self._lists, self._groups = lists, groups
        sizes = (sum(part.stop - part.start for part in group) for group in groups)
        self._positions = tuple(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Group(tuple(self.share(index, rank) for rank in range(self.world)))

    def share(self, index: int, rank: int) -> Share:
        """What one process does in micro-step `index`."""
        parts = self._groups[index]
        first = index // self.accumulation * self.accumulation
        last = min(first + self.accumulation, len(self))
        samples = self._positions[last] - self._positions[first]
        idle = rank >= len(parts)
        part = parts[0 if idle else rank]
        before = sum(other.stop - other.start for other in parts[: 0 if idle else rank])
        return Share(
            lane=part.lane,
            entries=tuple(self._lists[part.lane][part.start : part.stop]),
            position=self._positions[index] + before,
            weight=0.0 if idle else self.world / samples,
            completes_step=index + 1 == last,
            epoch=self.epoch,
            index=index,
        )


class Order:
    """The order of all epochs of a run."""

    def __init__(self, lanes: Sequence[Lane], seed: int) -> None:
        self.lanes, self.seed = tuple(lanes), seed
        self._states: dict[int, _State] = {}

    @property
    def batches(self) -> int:
        """Batches of an epoch, of all processes together."""
        return sum(lane.batches for lane in self.lanes)

    def groups(self, world: int) -> int:
        """Micro-steps of an epoch."""
        return sum(-(-len(lane) // (lane.batch_size * world)) for lane in self.lanes)

    def steps(self, world: int, accumulation: int) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.groups(world) // accumulation)

    def epoch(self, number: int, world: int = 1, accumulation: int = 1) -> Epoch:
        """The micro-steps of an epoch; 0 is the order before the first one."""
        state = self._states.get(world)
        if state is None or state.epoch > number:
            state = self._states[world] = _State(self.lanes, world)
        while state.epoch < number:
            state.advance(self.seed)
        lists = [lane.filled(places, number) for lane, places in zip(self.lanes, state.lists, strict=True)]
        return Epoch(number, lists, tuple(state.groups), world, accumulation)


class _State:
    """Lists that are shuffled in place, epoch after epoch."""

    def __init__(self, lanes: Sequence[Lane], world: int) -> None:
        self.lists = [lane.places() for lane in lanes]
        self.groups = _grouped(lanes, world)
        self.epoch = -1
        self.advance(0)

    def advance(self, seed: int) -> None:
        """Goes on to the next epoch."""
        self.epoch += 1
        generator = random.Random(seed + self.epoch)
        generator.shuffle(self.groups)
        for entries in self.lists:
            generator.shuffle(entries)


def _grouped(lanes: Sequence[Lane], world: int) -> list[tuple[Part, ...]]:
    """Micro-steps of up to `world` batches of one lane: what one process with batches that much larger would do."""
    groups: list[tuple[Part, ...]] = []
    for number, lane in enumerate(lanes):
        count, size = len(lane), lane.batch_size
        for first in range(0, count, size * world):
            starts = range(first, min(first + size * world, count), size)
            groups.append(tuple(Part(number, start, min(start + size, count)) for start in starts))
    return groups


def shared_out(slots: int, counts: Sequence[int]) -> list[int]:
    """`slots` turns dealt to groups so that the longest time until all of a group had its turn is as short as possible.

    A group gets one at least and its count at most.
    """
    dealt = [1] * len(counts)
    waiting = [(float(-count), index) for index, count in enumerate(counts) if count > 1]
    heapify(waiting)
    for _ in range(slots - len(counts)):
        if not waiting:
            break
        _, index = heappop(waiting)
        dealt[index] += 1
        if dealt[index] < counts[index]:
            heappush(waiting, (-counts[index] / dealt[index], index))
    return dealt
