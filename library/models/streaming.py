"""Less memory, from outside: blocks whose weights live in main memory and are on the device when they are needed.

All that is needed to know is when a block is reached. Going forward, those before it are done; going backward, those
behind it. A few slots on the device, the ring, hold the blocks that come next. Whatever a slot holds that doesn't come
soon makes room, and the copy runs beside what is computed meanwhile.

Weights that don't change go to the device only. Where a block is trained:

* by an optimizer that steps during the backward pass, with hooks on the parameters: the step happens on the device, and
  since it takes the gradients away, the changed weights are copied home when the block makes room;
* by an ordinary optimizer: gradients go home with the block, sum up there over micro-batches, and the optimizer finds
  parameters and gradients in main memory, steps there, and keeps its state there.

In both cases everything is at home when `backward()`, or a forward pass without gradients, returns. Where nothing of
the blocks is trained, as with LoRA, the last blocks stay in the ring. At any time each parameter shows its true value,
wherever it is. To have all of them in main memory, or to write to one that isn't trained, call `Streaming.settle`
first; `state_dict` and `load_state_dict` of the model do.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.devices import CopyStream, host_memory
from library.models.memory import blocks, without_cast_cache
from library.models.packing import Packed, count_uses, own_tensors

SLOTS = 2
"""One block computes, the next one arrives."""
_NAN = 0xFF
"""A byte that makes a number that isn't one, in every floating-point type."""


def swapped_blocks(blocks: int, swap: int, units: int | None = None, slots: int = SLOTS) -> int:
    """How many blocks to stream so that the device holds about `swap` fewer, as `--blocks_to_swap` means.

    The ring needs room for `slots` blocks, which is why that many more are streamed.

    Args:
        blocks: how many the model has.
        swap: how many of the `units` the device shall do without.
        units: how many there are in the option's counting, which takes two single blocks of FLUX for one; None: blocks.
    """
    if swap <= 0:
        return 0
    units = units or blocks
    return min(blocks, -(-blocks * swap // units) + slots)


def spread(blocks: int, count: int) -> list[int]:
    """Which of the blocks to stream: `count` numbers from 0, first and last among them, as evenly spaced as possible.

    Copying takes about as long as computing. So there is most time for each copy when as much is computed between two
    of them as can be.
    """
    count = min(count, blocks)
    if count <= 1:
        return [blocks - 1][:count]
    return [round(place * (blocks - 1) / (count - 1)) for place in range(count)]


def streamed_names(model: nn.Module, count: int) -> frozenset[str]:
    """Names of the parameters and buffers of `stream`ed blocks: these needn't be on the device at any time.

    The model may be without data.
    """
    names = {id(module): name for name, module in model.named_modules()}
    own = _chosen(model, count)
    return frozenset(f"{names[id(block)]}.{name}" for block, tensors in own for name in tensors)


def stream(
    model: nn.Module, count: int, device: torch.device, *, slots: int = SLOTS, poison: bool = False
) -> Streaming:
    """Keeps the weights of `count` of the model's blocks in main memory, and brings them when they are needed.

    Called last: with adapters attached, blocks recomputed and compiled, types and values as they will be, and all else
    on the device. The chosen blocks may be anywhere. One block after the other is moved to its new home.

    Args:
        slots: how many blocks the ring holds.
        poison: fills a slot with NaN when its block has left, so that reading it shows.
    """
    return Streaming(model, count, device, slots=slots, poison=poison)


def _chosen(model: nn.Module, count: int) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    found, uses = list(blocks(model)), count_uses(model)
    return [(found[index], own_tensors(found[index], uses)) for index in spread(len(found), count)]


@dataclass
class _Slot:
    """Room for a block on the device."""

    memory: Tensor
    block: int | None = None
    mark: Any = None
    """When the block has arrived."""
    entered: bool = False
    """Whether the tensors of the block point here."""
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    leaving: list[Tensor] = field(default_factory=list)
    """Gradients on their way home."""


class _Alias(NamedTuple):
    """Stands for a tensor in a slot that the backward pass will need: then the block may be in another one."""

    block: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class Streaming:
    """The streamed blocks of a model and their ring."""

    def __init__(
        self, model: nn.Module, count: int, device: torch.device, *, slots: int = SLOTS, poison: bool = False
    ) -> None:
        """As `stream`."""
        self._device = device
        self._copies = CopyStream(device)
        found, chosen = list(blocks(model)), _chosen(model, count)
        self._packed = {
            index: Packed(list(tensors.values()), partial(host_memory, device=device))
            for index, (_, tensors) in zip(spread(len(found), count), chosen, strict=True)
        }
        self._order = list(self._packed)
        room = max((packed.layout.bytes for packed in self._packed.values()), default=0)
        self._slots = [
            _Slot(torch.empty(room, dtype=torch.uint8, device=device)) for _ in range(min(slots, len(self._order)))
        ]
        self._places = {slot.memory.untyped_storage().data_ptr(): slot for slot in self._slots}
        self._poison = torch.full((room,), _NAN, dtype=torch.uint8, device=device) if poison else None
        self._settles_later = False
        self._undo: list[Callable[[], None]] = []
        if self._order:
            self._hook(model, found)

    def _hook(self, model: nn.Module, found: Sequence[nn.Module]) -> None:
        for index, block in enumerate(found):
            self._undo.append(partial(_restore, block, block.__dict__.get("forward")))
            block.forward = partial(self._forward, index, block.forward)
        hooked: Any = model
        self._undo += [
            hooked.register_forward_hook(self._after_forward).remove,
            hooked.register_state_dict_pre_hook(lambda *_: self.settle()).remove,
            hooked.register_load_state_dict_pre_hook(lambda *_: self.settle()).remove,
        ]

    # for others

    @property
    def host_bytes(self) -> int:
        """Main memory that the weights take."""
        return sum(packed.layout.bytes for packed in self._packed.values())

    @property
    def device_bytes(self) -> int:
        """Memory of the device that the ring takes."""
        return sum(slot.memory.numel() for slot in self._slots)

    def settle(self) -> None:
        """Brings everything home, and waits for it. The ring is empty then."""
        self._copies.after_compute()
        for slot in self._slots:
            self._clear(slot)
        self._copies.finish()
        for slot in self._slots:
            slot.leaving.clear()

    def close(self) -> None:
        """Leaves the model as it was, the streamed weights in main memory."""
        self.settle()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    # where a pass is

    def _forward(self, index: int, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        recorded = torch.is_grad_enabled()
        self._settles_later = False
        self._reach(index, backward=False, turns=recorded)
        if index not in self._packed:
            outputs = forward(*inputs, **named)
        elif not recorded:
            with without_cast_cache():
                outputs = forward(*inputs, **named)
        else:
            with without_cast_cache(), saved_tensors_hooks(partial(self._pack, index), self._unpack):
                outputs = forward(*inputs, **named)
        return _watched(outputs, partial(self._reach_backward, index)) if recorded else outputs

    def _reach_backward(self, index: int) -> None:
        if not self._settles_later and self._is_trained():
            self._settles_later = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._reach(index, backward=True, turns=True)
        if index in self._packed:
            self._packed[index].begin_backward()

    def _after_backward(self) -> None:
        self._settles_later = False
        self.settle()

    def _after_forward(self, *_: object) -> None:
        if not torch.is_grad_enabled() and self._is_trained():
            self.settle()

    def _is_trained(self) -> bool:
        return any(packed.is_trained for packed in self._packed.values())

    def _reach(self, index: int, *, backward: bool, turns: bool) -> None:
        """Lets the blocks travel that come next, and waits for this one if it is streamed.

        Args:
            turns: whether the pass turns back where the blocks end, instead of beginning again.
        """
        wanted = self._upcoming(index, backward=backward, turns=turns)
        here = {slot.block for slot in self._slots}
        missing = [block for block in wanted if block not in here]
        if missing:
            self._copies.after_compute()
            free = [slot for slot in self._slots if slot.block not in wanted]
            for slot, block in zip(free, missing, strict=False):
                self._clear(slot)
                self._send(slot, block)
        if index in self._packed:
            self._enter(self._slot_of(index))

    def _upcoming(self, index: int, *, backward: bool, turns: bool) -> list[int]:
        """As many streamed blocks as there are slots, in the order in which they will be reached."""
        order = self._order
        if backward:
            following = [*reversed(order[: bisect_right(order, index)]), *order]
        else:
            following = [*order[bisect_left(order, index) :], *(reversed(order) if turns else order)]
        return list(dict.fromkeys(following))[: len(self._slots)]

    def _slot_of(self, block: int) -> _Slot:
        return next(slot for slot in self._slots if slot.block == block)

    # where the weights are

    def _send(self, slot: _Slot, block: int) -> None:
        """Asks for a block to be copied into a slot."""
        home = self._packed[block].home
        self._copies.copy(slot.memory[: len(home)], home)
        slot.block, slot.mark, slot.entered = block, self._copies.mark(), False

    def _enter(self, slot: _Slot) -> None:
        """Lets the tensors of a block point to the slot that it is in, when it has arrived."""
        if slot.entered or slot.block is None:
            return
        self._copies.before_compute(slot.mark)
        slot.leaving.clear()  # they were copied before, and memory that is free now is used later
        packed = self._packed[slot.block]
        if slot.block not in slot.views:
            slot.views[slot.block] = packed.layout.views(slot.memory)
        packed.leave(slot.views[slot.block])
        slot.entered = True

    def _clear(self, slot: _Slot) -> None:
        """Lets the tensors of a slot's block point home, and sends home what has changed. Waits for nothing."""
        if slot.block is not None and slot.entered:
            packed = self._packed[slot.block]
            changed, gradients = packed.come_home()
            for home, gradient in gradients:
                self._copies.copy(home, gradient)
                slot.leaving.append(gradient)
            if changed:
                self._copies.copy(packed.home, slot.memory[: len(packed.home)])
        if self._poison is not None:
            self._copies.copy(slot.memory, self._poison)
        slot.block, slot.entered = None, False

    # what the backward pass will need

    def _resident(self, block: int) -> _Slot:
        for slot in self._slots:
            if slot.block == block and slot.entered:
                return slot
        self._reach_backward(block)
        return self._slot_of(block)

    def _pack(self, block: int, tensor: Tensor) -> Tensor | _Alias:
        if self._places.get(tensor.untyped_storage().data_ptr()) is None:
            return tensor
        return _Alias(block, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def _unpack(self, saved: Tensor | _Alias) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        memory = self._resident(saved.block).memory
        empty = torch.empty(0, dtype=saved.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), saved.offset, saved.size, saved.stride)


def _restore(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


# what the outputs of a block tell


class _Watch(torch.autograd.Function):
    """Tensors as they are; calls `reached` when the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)  # no views, which compiled blocks tell apart

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return None, *gradients


_watch = cast("Callable[..., tuple[Tensor, ...]]", _Watch.apply)


def _watched(outputs: Any, reached: Callable[[], None]) -> Any:
    """The outputs of a block: a tensor, or a tuple or list with tensors."""
    parts = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    places = [place for place, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]
    for place, watched in zip(places, _watch(reached, *(parts[place] for place in places)), strict=True):
        parts[place] = watched
    return parts[0] if isinstance(outputs, Tensor) else type(outputs)(parts)
