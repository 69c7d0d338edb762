"""What is trained, and what file it becomes; the rest of the project knows methods only through this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from library.log import UserError
from library.types import Chance, Finding

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.options import Options
    from library.types import Batch, Cond, Models, Noised

Answer = Callable[["Noised", "Cond"], "Tensor"]
"""What the objective compares with a target, as the model with all that is attached to it answers now (B, C, h, w)."""

WriteParts = Callable[[Path, Mapping[str, "nn.Module"], "torch.dtype | None", "Mapping[str, str] | None"], None]
"""Writes a whole model: where, the parts that replace those it was loaded from, their type, the metadata."""

BUCKET_ELEMENTS = 1 << 25
"""Most elements of the flat tensor in which gradients travel between processes."""
BUCKETS_ON_THE_WAY = 4
"""Most such tensors that exist at a time."""


@dataclass(kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate."""

    name: str
    """For logs: `unet`, `textencoder 1`, `unet plus`, …"""
    params: list[nn.Parameter]
    lr: float
    """Below 0 the method has turned the gradients around, and its amount counts."""
    lr_source: str
    """Which option the rate came from."""
    component: str
    """Part of the model, for people."""

    def for_optimizer(self) -> dict[str, Any]:
        """As torch optimizers want it."""
        return {"params": self.params, "lr": abs(self.lr)}


@dataclass(frozen=True)
class TrainedRow:
    """One line of the table of what is trained."""

    component: str
    group: str
    """Name of the parameter group, as in logs."""
    tensors: int
    parameters: int
    lr: str
    lr_source: str
    dtype: str


class Method(ABC):
    """What moves while training. Knows no family and no objective."""

    keeps_base: ClassVar[bool] = False
    """Whether the model as it was before the training is still there to be asked."""

    @classmethod
    @abstractmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str] = ()) -> Method:
        """The method as the options want it.

        `encoder_names` are the family's text encoders in its order.
        Errors: UserError when nothing would be trained, or options exclude one another.
        """

    def trained_encoders(self) -> set[str]:
        """Names of the text encoders that are trained, so that their outputs can't be cached."""
        return set()

    def frozen(self) -> dict[str, str]:
        """Components that are not trained, and why, in words."""
        return {}

    def changes_to_encoders(self) -> str:
        """Stands for all that `loaded` does to text encoders, for the keys of their caches; empty: nothing."""
        return ""

    def findings(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Finding]:
        """What is wrong with the model, whose parts have tensors of these shapes, for what is to be trained."""
        return []

    @abstractmethod
    def trained_elements(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
        """How many numbers will be trained, about; `shapes` are those of the tensors of each part of the model."""

    def loaded(self, models: Models) -> None:  # noqa: B027 - nothing to do by default
        """Called with the parts of the model just loaded, before anything is computed with them."""

    def writes_by(self, write: WriteParts) -> None:  # noqa: B027 - most write files of their own
        """Says how a whole model is written, before the first `save`."""

    @abstractmethod
    def attach(self, models: Models) -> None:
        """Makes the model trainable as wanted."""

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """What the optimizer gets; only after `attach`. Errors: UserError when there is nothing to train."""

    @abstractmethod
    def prepare(self, accelerator: Any, models: Models) -> None:
        """Brings what is trained to the device, equal in all processes, and switches it to training."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors as they are, for a resume and for files."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of `state_dict`."""

    @abstractmethod
    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Writes the file that the training is for; whole or not at all. `dtype` None keeps the tensors' types."""

    @abstractmethod
    def train_mode(self, training: bool) -> None:
        """Switches what is trained between training and evaluation (previews)."""

    # hooks

    def chance(self) -> Chance:
        """Where random numbers are drawn when the denoiser computes, with all that is attached to it."""
        return Chance.NOWHERE

    def before_batch(self, batch: Batch) -> None:  # noqa: B027
        """Called before each batch is computed."""

    def control(self, batch: Batch) -> Any:
        """What a control network says about the batch; None: nothing."""
        return None

    def target(self, noised: Noised, batch: Batch, cond: Cond, answer: Answer) -> Noised:
        """The same task with another target, where the method wants one."""
        return noised

    def reduce_gradients(self, accelerator: Any, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Gives all processes the mean of their gradients; called once per optimizer step for each parameter.

        `parameters` None means all; all processes must come with the same ones, in the same order.
        """
        if accelerator.num_processes > 1:
            wanted = self.parameters() if parameters is None else parameters
            average_gradients(wanted, accelerator.num_processes, accelerator.device)

    def begin_after(self, step: int) -> None:  # noqa: B027
        """Called once, before the first step, with the number of the last one: 0, or that of a loaded state."""

    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Called after each optimizer step; returns values worth logging, on the device where they are."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the optimizer changes."""
        return [parameter for group in self.param_groups() for parameter in group.params]


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], processes: int, device: torch.device | None = None) -> None:
    """Replaces the gradients by their mean over the processes. All processes must call it with the same parameters.

    Gradients travel in large flat pieces, a few on the way at a time. `device` is where processes exchange data: what
    lies elsewhere, such as gradients of streamed blocks, makes a detour. A parameter without a gradient here (an
    adapter that was dropped for this batch) counts as zero, since other processes may have one for it.
    """
    on_the_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for bucket in _buckets(parameters):
        if len(on_the_way) == BUCKETS_ON_THE_WAY:
            _unpack(*on_the_way.popleft())
        gradients = [_gradient(parameter) for parameter in bucket]
        flat = gradients[0] if len(gradients) == 1 else torch.cat([gradient.reshape(-1) for gradient in gradients])
        if flat.device.type == "cpu":
            flat = flat.float()  # gloo adds no half-precision numbers
        if device is not None:
            flat = flat.to(device)
        flat = flat.contiguous().div_(processes)
        on_the_way.append((gradients, flat, dist.all_reduce(flat, async_op=True)))
    while on_the_way:
        _unpack(*on_the_way.popleft())


def _unpack(gradients: list[Tensor], flat: Tensor, work: Any) -> None:
    """Brings the numbers of a piece back to the gradients when it has arrived."""
    work.wait()
    if flat is gradients[0]:
        return
    pieces = torch.split(flat.reshape(-1), [gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and place, up to the bucket size (a larger one goes alone)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in sorted(parameters, key=_kind):
        full = size + parameter.numel() > BUCKET_ELEMENTS
        if bucket and (full or _kind(parameter) != _kind(bucket[0])):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _kind(parameter: nn.Parameter) -> tuple[str, str]:
    return str(parameter.device), str(parameter.dtype)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], device: torch.device | None = None) -> None:
    """Gives all processes the first process's values; for `device` see `average_gradients`."""
    for tensor in tensors:
        value = tensor.data if device is None else tensor.data.to(device)
        dist.broadcast(value, src=0)
        if value.device != tensor.device:
            tensor.data.copy_(value)


def require_something(groups: Sequence[ParamGroup], where: str) -> list[ParamGroup]:
    """The groups that have parameters. Errors: UserError when there are none."""
    found = [group for group in groups if group.params]
    if not found:
        raise UserError(
            "nothing would be trained", where, "check the learning rates and --network_* options", code="E-NOTHING"
        )
    return found


def trained_table(groups: Sequence[ParamGroup], frozen: Mapping[str, str] | None = None) -> list[TrainedRow]:
    """What is trained at which rate, and what isn't: one row for each group, and one for each frozen component."""
    rows = [
        TrainedRow(
            component=group.component,
            group=group.name,
            tensors=len(group.params),
            parameters=sum(parameter.numel() for parameter in group.params),
            lr=f"{group.lr:g}",
            lr_source=group.lr_source,
            dtype=", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in group.params})),
        )
        for group in groups
    ]
    return rows + [TrainedRow(name, "-", 0, 0, "frozen", reason, "-") for name, reason in (frozen or {}).items()]


def table_lines(rows: Sequence[TrainedRow]) -> list[str]:
    """The table as text for people."""
    cells = [("component", "group", "tensors", "parameters", "learning rate", "from", "dtype")]
    cells += [
        (row.component, row.group, f"{row.tensors:,}", f"{row.parameters:,}", row.lr, row.lr_source, row.dtype)
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    numeric = (False, False, True, True, True, False, False)
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
