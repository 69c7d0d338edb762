"""Applies gradients during the backward pass, so that they needn't all be held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.log import UserError
from library.train.optimizers import effective_lrs
from library.train.rounding import Rounding
from library.train.schedules import Scheduler
from library.train.steppers import GradientHooks
from library.train.updates import Updates, clip, total

PLACE = "place"
"""Key in a parameter group that has been cut: which of the whole groups it is a part of."""


class FusedStepper:
    """Moves each parameter as soon as its gradient is complete, and drops the gradient: one is held at a time.

    There may be one backward pass per step only. Each gradient is clipped by itself, not all of them by their common
    norm, and one that isn't finite keeps only its own parameter from moving. All processes must get gradients for the
    same parameters in the same order.
    """

    def __init__(
        self,
        *,
        accelerator: Any,
        optimizer: Any,
        scheduler: Scheduler,
        params: Iterable[nn.Parameter],
        max_grad_norm: float,
        hooks: GradientHooks,
        alone: bool,
        rounding: Rounding | None = None,
    ) -> None:
        """As `Stepper`. Errors: UserError for a gradient scaler, and when the parameters can't be stepped alone."""
        refuse_scaler(accelerator, "--fused_backward_pass")
        if not alone:
            raise UserError(
                "this optimizer needs the gradients of all parameters at once",
                "--fused_backward_pass",
                "choose another optimizer, such as Adafactor or AdamW8bit",
                code="E-FUSED",
            )
        self.accelerator, self.optimizer, self.scheduler, self.hooks = accelerator, optimizer, scheduler, hooks
        self.params = list(params)
        self.max_grad_norm = max_grad_norm
        self.number = 0
        """Of the last step."""
        self._updates = Updates(optimizer, alone=True, rounding=rounding)
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._handles = _listen(self.params, self._arrived)

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """See `library.train.steppers.AnyStepper`."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter not in self._norms, "one backward pass per step, and each parameter complete at once"
        self.hooks.reduce_gradients(self.accelerator, [parameter])
        norm = clip([parameter], self.max_grad_norm)
        self._updates.apply(self.number + 1, norm, [parameter])
        parameter.grad = None
        self._norms[parameter] = norm

    def step(self, number: int | None = None) -> dict[str, Tensor | float]:
        """Ends the step: see `library.train.steppers.AnyStepper`. `grad_norm` is the root of the sum of squares."""
        self.number = _next(self.number, number)
        self.scheduler.step()
        norm = total(list(self._norms.values()))
        self._norms.clear()
        return {"grad_norm": norm, **self.hooks.after_step(self.number)}

    def learning_rates(self) -> list[float]:
        """What multiplies the update of each parameter group."""
        return effective_lrs(self.optimizer)

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing: optimizers with weights for training only depend on all parameters at once."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()


@dataclass
class _Block:
    optimizer: Any
    updates: Updates
    params: list[nn.Parameter]
    arrived: set[nn.Parameter] = field(default_factory=set)
    norm: Tensor | None = None
    """Of this step; None: not stepped yet."""


class BlockwiseStepper:
    """One optimizer for each block of a model, stepped during the backward pass when the block's gradients are there.

    They are dropped then: those of one block are held at a time. There may be one backward pass per step only. Each
    block is clipped by its own norm, and gradients that aren't finite keep only their own block from moving. What a
    block is, is decided by who cuts the parameters: `by_blocks`, `by_number`.
    """

    def __init__(
        self,
        *,
        accelerator: Any,
        optimizers: Sequence[Any],
        schedulers: Sequence[Scheduler],
        max_grad_norm: float,
        hooks: GradientHooks,
        alone: bool,
        rounding: Rounding | None = None,
        option: str = "--blockwise_fused_optimizers",
    ) -> None:
        """`optimizers` are plain ones, one for each part that was cut; each has its scheduler.

        `option` is what asked for this, for messages.
        Errors: UserError for a gradient scaler and for schedule-free optimizers.
        """
        refuse_scaler(accelerator, option)
        if any("train_mode" in group for optimizer in optimizers for group in optimizer.param_groups):
            raise UserError(
                "schedule-free optimizers can't be split",
                option,
                "choose another optimizer",
                code="E-FUSED",
            )
        self.accelerator, self.hooks, self.max_grad_norm = accelerator, hooks, max_grad_norm
        self.optimizers, self.schedulers = list(optimizers), list(schedulers)
        self.number = 0
        """Of the last step."""
        self._blocks = [
            _Block(
                optimizer,
                Updates(optimizer, alone=alone, rounding=rounding),
                [parameter for group in optimizer.param_groups for parameter in group["params"]],
            )
            for optimizer in optimizers
        ]
        self._block_of = {parameter: block for block in self._blocks for parameter in block.params}
        self._handles = _listen(self._block_of, self._arrived)

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The first part of each group that was cut into blocks: all its parts have the same rate."""
        return [group for group, _ in self._shown()]

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        block = self._block_of[parameter]
        assert parameter not in block.arrived, "one backward pass per step, and each parameter complete at once"
        block.arrived.add(parameter)
        if len(block.arrived) == len(block.params):
            self._move(block)

    def _move(self, block: _Block) -> None:
        self.hooks.reduce_gradients(self.accelerator, block.params)
        block.norm = clip(block.params, self.max_grad_norm)
        block.updates.apply(self.number + 1, block.norm)
        for parameter in block.params:
            parameter.grad = None

    @torch.no_grad()
    def step(self, number: int | None = None) -> dict[str, Tensor | float]:
        """Ends the step: see `library.train.steppers.AnyStepper`. `grad_norm` is the root of the sum of squares."""
        for block in self._blocks:
            if block.norm is None:  # some of its parameters weren't used
                self._move(block)
        self.number = _next(self.number, number)
        for scheduler in self.schedulers:
            scheduler.step()
        norm = total([block.norm for block in self._blocks if block.norm is not None])
        for block in self._blocks:
            block.norm = None
            block.arrived.clear()
        return {"grad_norm": norm, **self.hooks.after_step(self.number)}

    def learning_rates(self) -> list[float]:
        """What multiplies the update of each parameter group; of the first block, where they differ."""
        return [rate for _, rate in self._shown(rates=True)]

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing, since schedule-free optimizers are refused."""
        return nullcontext()

    def close(self) -> None:
        """Leaves the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _shown(self, *, rates: bool = False) -> list[tuple[Mapping[str, Any], float]]:
        """A part of each whole group, and its effective rate where wanted (which may ask the device)."""
        found: dict[int, tuple[Mapping[str, Any], float]] = {}
        for optimizer in self.optimizers:
            places = [group.get(PLACE, 0) for group in optimizer.param_groups]
            if all(place in found for place in places):
                continue
            effective = effective_lrs(optimizer) if rates else [0.0] * len(places)
            for place, group, rate in zip(places, optimizer.param_groups, effective, strict=True):
                found.setdefault(place, (group, rate))
        return [found[place] for place in sorted(found)]


def by_blocks(groups: Sequence[Mapping[str, Any]], blocks: Iterable[nn.Module]) -> list[list[dict[str, Any]]]:
    """Parameter groups cut by the blocks of a model: those of each block, and in the end those of the rest.

    Blocks without parameters among them are left out. `groups` have `params` and whatever else; each part gets the key
    `PLACE` besides.
    """
    blocks = list(blocks)
    block_of = {parameter: index for index, block in enumerate(blocks) for parameter in block.parameters()}
    parts: dict[int, list[dict[str, Any]]] = {}
    for place, group in enumerate(groups):
        shares: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            shares.setdefault(block_of.get(parameter, len(blocks)), []).append(parameter)
        for index, params in shares.items():
            parts.setdefault(index, []).append({**group, "params": params, PLACE: place})
    return [parts[index] for index in sorted(parts)]


def by_number(groups: Sequence[Mapping[str, Any]], number: int) -> list[list[dict[str, Any]]]:
    """Parameter groups cut into `number` parts of as many parameters in their order; the last one has what is left.

    A part has one learning rate: where another one begins, so does a part, so that there may be some more of them.
    Keys are as `by_blocks` has them.
    """
    most = -(-sum(len(group["params"]) for group in groups) // number)
    parts: list[list[dict[str, Any]]] = []
    room = 0
    for place, group in enumerate(groups):
        params = list(group["params"])
        if parts and group.get("lr") != parts[-1][-1].get("lr"):
            room = 0
        while params:
            if not room:
                parts.append([])
                room = most
            share, params = params[:room], params[room:]
            parts[-1].append({**group, "params": share, PLACE: place})
            room -= len(share)
    return parts


def refuse_scaler(accelerator: Any, option: str) -> None:
    """Errors: UserError when gradients are scaled, as with fp16: the scale is known after the backward pass only."""
    if accelerator.scaler is not None:
        what = "it can't be used with fp16, whose gradients are scaled"
        raise UserError(what, option, "give --mixed_precision bf16", code="E-FUSED")


def _listen(parameters: Iterable[Any], call: Callable[[Tensor], None]) -> list[Any]:
    """Has the function called with each parameter whose gradient is complete; gives the handles that end it."""
    return [parameter.register_post_accumulate_grad_hook(call) for parameter in parameters]


def _next(last: int, number: int | None) -> int:
    """The number of the step that ends. It was needed before, in the backward pass, so it can't be another one."""
    assert number in (None, last + 1), f"step {number} follows step {last}: set `number` after loading a state"
    return last + 1
