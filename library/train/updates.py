"""Has an optimizer move parameters: all or some of them, in float32, and none by gradients that aren't finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.train.rng import rng_untouched
from library.train.rounding import Rounding, rounds

BUNCH_ELEMENTS = 1 << 24
"""Most elements of the parameters that are stepped at a time where copies are needed (a larger one goes alone)."""


class Updates:
    """Has an optimizer move its parameters, without waiting for the device where that can be.

    A step whose gradients aren't finite moves nothing: no weight, and no moment of the optimizer. There are three ways
    to that. Optimizers that know how to skip a step on the device are told so (those of torch with `fused`). For others
    a copy of weights and moments is made, a bunch of parameters at a time, and put back where the gradients were bad;
    what they count on the host, such as the number of steps for a correction of bias, has gone on then, as has the
    schedule. The norm is looked at instead where that costs nothing: where weights are stepped on the CPU, and with
    optimizers that look at numbers themselves. It is, too, where parameters depend on one another.

    bfloat16 weights are stepped in float32, a bunch at a time, and rounded stochastically: in bfloat16 itself, a change
    of less than 1/512 of a weight is lost, and the second moment of AdamW never moves. Moments are float32, too.
    """

    def __init__(self, optimizer: Any, *, alone: bool, rounding: Rounding | None = None) -> None:
        """`alone`: `library.train.optimizers.Built.alone`. Without `rounding`, bfloat16 weights are left to the class.

        `optimizer` may be plain or in accelerate's wrapper, which is passed by.
        """
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.alone = alone
        self.rounding = rounding if alone else None
        groups = enumerate(self.optimizer.param_groups)
        self._group_of = {parameter: index for index, group in groups for parameter in group["params"]}
        self._astray = set(self._group_of)  # parameters whose moments, if loaded, may be elsewhere

    def apply(self, step: int, norm: Tensor, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Moves parameters by their gradients in the step of this number, unless the norm (0-d) isn't finite.

        `parameters` None means all; some of them only where they don't depend on one another. Gradients may be gone
        afterwards.
        """
        broken: Tensor | None = ~norm.isfinite()
        concerned = self._group_of if parameters is None else parameters
        if self._looks(norm, concerned):
            if broken:
                return
            broken = None
        if self._astray:
            self._fetch_moments(concerned)
        skips = broken is None or self._skips
        if parameters is None and (not self.alone or (skips and not self._rounds())):
            with self._skipping(broken):
                self.optimizer.step()
            return
        assert self.alone, "parameters that depend on one another are stepped together"
        for index, bunch in self._bunches(parameters):
            self._move(index, bunch, step, broken)

    def _fetch_moments(self, parameters: Iterable[nn.Parameter]) -> None:
        """Brings moments to their parameters, once: those of a streamed block were loaded while it was elsewhere."""
        for parameter in self._astray.intersection(parameters):
            state = self.optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() and not getattr(value, "is_paged", False):
                    state[name] = value.to(parameter.device)
            self._astray.discard(parameter)

    def _looks(self, norm: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
        # paged optimizers wait for the device in each step anyway, and hold moments that only they can touch
        asks = norm.device.type == "cpu" or not self.alone or getattr(self.optimizer, "is_paged", False)
        return asks or any(parameter.device.type == "cpu" for parameter in parameters)

    @property
    def _skips(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def _rounds(self) -> bool:
        return self.rounding is not None and any(rounds(parameter) for parameter in self._group_of)

    def _bunches(self, parameters: Sequence[nn.Parameter] | None) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Parameters with a gradient, bunches of one group each, with its index."""
        wanted = self._group_of if parameters is None else parameters
        bunch: list[nn.Parameter] = []
        index, size = 0, 0
        for parameter in wanted:
            if parameter.grad is None:
                continue
            own = self._group_of[parameter]
            if bunch and (own != index or size + parameter.numel() > BUNCH_ELEMENTS):
                yield index, bunch
                bunch, size = [], 0
            bunch.append(parameter)
            index, size = own, size + parameter.numel()
        if bunch:
            yield index, bunch

    def _move(self, index: int, bunch: list[nn.Parameter], step: int, broken: Tensor | None) -> None:
        with ExitStack() as stack:
            moved = stack.enter_context(self._in_float32(bunch, step))
            stack.enter_context(only(self.optimizer, index, moved))
            if self._skips or broken is None:
                stack.enter_context(self._skipping(broken))
            else:
                stack.enter_context(restoring(self.optimizer, moved, broken))
            self.optimizer.step()

    @contextmanager
    def _skipping(self, broken: Tensor | None) -> Iterator[None]:
        """Tells the optimizer in the way in which a gradient scaler does."""
        if broken is None:
            yield
            return
        self.optimizer.found_inf = broken.float()
        try:
            yield
        finally:
            del self.optimizer.found_inf

    @contextmanager
    def _in_float32(self, bunch: list[nn.Parameter], step: int) -> Iterator[list[nn.Parameter]]:
        """Float32 stand-ins for those that are rounded; their values are written back in the end."""
        if self.rounding is None or not any(rounds(parameter) for parameter in bunch):
            yield bunch
            return
        state = self.optimizer.state
        stand_ins = {parameter: _stand_in(parameter) for parameter in bunch if rounds(parameter)}
        for parameter, stand_in in stand_ins.items():
            if parameter in state:
                state[stand_in] = state.pop(parameter)
        try:
            yield [stand_ins.get(parameter, parameter) for parameter in bunch]
        finally:
            for parameter, stand_in in stand_ins.items():
                if stand_in in state:
                    state[parameter] = state.pop(stand_in)
        for parameter, stand_in in stand_ins.items():
            self.rounding.write(parameter, stand_in.detach(), step)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    assert parameter.grad is not None
    stand_in = nn.Parameter(parameter.detach().float())
    stand_in.grad = parameter.grad.float()
    parameter.grad = None
    return stand_in


@contextmanager
def only(optimizer: Any, index: int, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The optimizer has only these parameters of one of its groups, meanwhile; what it notes in the group stays."""
    groups = optimizer.param_groups
    everything = groups[index]["params"]
    groups[index]["params"] = parameters
    optimizer.param_groups = [groups[index]]
    try:
        yield
    finally:
        groups[index]["params"] = everything
        optimizer.param_groups = groups


@contextmanager
@torch.no_grad()
def restoring(optimizer: Any, parameters: Sequence[nn.Parameter], broken: Tensor) -> Iterator[None]:
    """Afterwards parameters and their moments are as before if `broken` (0-d), without asking whether it is.

    Moments that don't exist yet become those of a gradient of zero.
    """
    kept: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.masked_fill_(broken, 0)
        moments = _moments(optimizer, parameter)
        copies = {name: moment.clone() for name, moment in moments.items()}
        kept.append((parameter, parameter.detach().clone(), copies))
    yield
    for parameter, before, copies in kept:
        torch.where(broken, before, parameter.data, out=parameter.data)
        for name, moment in _moments(optimizer, parameter).items():
            if name in copies:
                torch.where(broken, copies[name], moment, out=moment)


def _moments(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter in plain tensors, there where the parameter is."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if type(value) in (Tensor, nn.Parameter) and value.device == parameter.device
    }


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """The norm (0-d, float32) of the gradients, which are scaled down to `max_norm` in place unless it is 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    norm = total([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def total(norms: Sequence[Tensor]) -> Tensor:
    """The norm (0-d) of things that have these norms (0-d)."""
    if not norms:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


def depends_on_no_other(optimizer_class: Any, arguments: Mapping[str, Any], lr: float | None) -> bool:
    """Whether an optimizer moves two parameters the same together and one after the other; tries it out on the CPU.

    What it notes in its group has to be the same, too: a count of steps, for instance, isn't.
    """
    try:
        with rng_untouched():
            together, alone = (_tried(optimizer_class, arguments, lr, split) for split in (False, True))
        same_notes = repr(together[1]) == repr(alone[1])
    except Exception:  # noqa: BLE001 - whatever a class of strangers does, it isn't one that can be split
        return False
    return same_notes and all(torch.equal(one, other) for one, other in zip(together[0], alone[0], strict=True))


def _tried(
    optimizer_class: Any, arguments: Mapping[str, Any], lr: float | None, split: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """Two parameters after some steps, and what is in the group besides."""
    parameters = [nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -4.0]]) * factor) for factor in (1.0, -0.1)]
    optimizer = optimizer_class([{"params": parameters}], lr=lr, **arguments)
    getattr(optimizer, "train", lambda: None)()
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        if not split:
            optimizer.step()
            continue
        for parameter in parameters:
            with only(optimizer, 0, [parameter]):
                optimizer.step()
    notes = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return [parameter.detach() for parameter in parameters], notes
