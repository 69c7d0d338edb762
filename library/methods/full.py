"""Trains parts of the model themselves: the denoiser, and text encoders where the options say so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.log import UserError, get_logger
from library.methods.base import Method, ParamGroup, broadcast, require_something
from library.methods.block_rates import blocks_of
from library.methods.full_rates import FullRates
from library.methods.last_blocks import of_last_blocks
from library.methods.rates import Rate
from library.option_groups import PrecisionOptions
from library.types import DENOISER

if TYPE_CHECKING:
    from torch import Tensor

    from library.methods.base import WriteParts
    from library.options import Options
    from library.types import Models

logger = get_logger(__name__)


class Full(Method):
    """See `library.methods.base.Method`."""

    def __init__(self, rates: FullRates, dtype: torch.dtype) -> None:
        """Trains at these rates, the weights kept in `dtype`. Errors: UserError when all rates are 0."""
        if not rates.trains_denoiser and not rates.trained_encoders:
            reasons = "; ".join(dict.fromkeys(rates.frozen().values()))
            raise UserError("nothing would be trained", reasons, "give a learning rate", code="E-NOTHING")
        self.rates, self.dtype = rates, dtype
        self._parts: dict[str, nn.Module] = {}
        self._groups: list[ParamGroup] = []
        self._encoders_stopped = False
        self._write: WriteParts | None = None

    @classmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str] = ()) -> Full:
        """See `Method.from_options`."""
        precision = options[PrecisionOptions]
        dtype = torch.float16 if precision.full_fp16 else torch.bfloat16 if precision.full_bf16 else torch.float32
        rates = FullRates.from_options(options, encoder_names)
        for option in rates.ascents():
            logger.warning("%s is negative: what is trained with it unlearns the images (gradient ascent)", option)
        return cls(rates, dtype)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """What is trained, by name."""
        assert self._parts, "not attached yet"
        return self._parts

    def trained_encoders(self) -> set[str]:
        """Names of the text encoders that are trained."""
        return set(self.rates.trained_encoders)

    def frozen(self) -> dict[str, str]:
        """Parts that aren't trained, and the blocks that options freeze."""
        blocks = self.rates.blocks if self.rates.trains_denoiser else ()
        zero = {f"{DENOISER} block {number}": "--block_lr is 0" for number, rate in enumerate(blocks) if not rate}
        last = self.rates.last_blocks_frozen if self.rates.trains_denoiser else 0
        kept = {f"{DENOISER}, last {last} blocks": "--num_last_block_to_freeze"} if last else {}
        return self.rates.frozen() | zero | kept

    def trained_elements(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
        """All of the trained parts, but for blocks that options freeze."""
        names = [DENOISER] if self.rates.trains_denoiser else []
        found = {name: dict(shapes[name]) for name in [*names, *self.rates.trained_encoders]}
        if DENOISER in found and self.rates.blocks:
            block = blocks_of(found[DENOISER])
            found[DENOISER] = {name: shape for name, shape in found[DENOISER].items() if self.rates.blocks[block[name]]}
        if DENOISER in found:
            kept = of_last_blocks(found[DENOISER], self.rates.last_blocks_frozen)
            found[DENOISER] = {name: shape for name, shape in found[DENOISER].items() if name not in kept}
        return sum(math.prod(shape) for part in found.values() for shape in part.values())

    # attaching

    def writes_by(self, write: WriteParts) -> None:
        """See `Method.writes_by`."""
        self._write = write

    def attach(self, models: Models) -> None:
        """Makes what is trained trainable, in the type of the trained weights, and freezes all else."""
        assert models.denoiser is not None, "the denoiser isn't loaded"
        for part in (models.denoiser, *models.encoders.values()):
            part.requires_grad_(False)
        named = {DENOISER: models.denoiser} if self.rates.trains_denoiser else {}
        named |= {name: models.encoders[name] for name in self.rates.trained_encoders}
        self._parts = {name: nn.Module.to(part, dtype=self.dtype) for name, part in named.items()}
        self._groups = require_something(list(self._make_groups(models.unused)), "the model has no parameters")
        for group in self._groups:
            for parameter in group.params:
                parameter.requires_grad_(True)
                if group.lr < 0:
                    parameter.register_hook(torch.neg)  # type: ignore[no-untyped-call]  # uphill

    def _make_groups(self, unused: Mapping[str, Sequence[str]]) -> Iterator[ParamGroup]:
        rates = self.rates
        if DENOISER in self._parts and rates.blocks:
            yield from self._block_groups(self._parts[DENOISER])
        elif DENOISER in self._parts:
            named = dict(self._parts[DENOISER].named_parameters())
            kept = of_last_blocks(named, rates.last_blocks_frozen)
            params = [parameter for name, parameter in named.items() if name not in kept]
            yield _group(DENOISER, DENOISER, rates.denoiser, params)
        for number, (name, rate) in enumerate(rates.encoders.items(), start=1):
            if name in self._parts:
                starts = tuple(unused.get(name, ()))
                params = [weight for key, weight in self._parts[name].named_parameters() if not key.startswith(starts)]
                limit = rates.encoder_steps
                until = Rate(rate.value, rate.source if limit is None else f"{rate.source}, until step {limit}")
                suffix = str(number) if len(rates.encoders) > 1 else ""
                yield _group(f"text_encoder{suffix}", name, until, params)

    def _block_groups(self, denoiser: nn.Module) -> Iterator[ParamGroup]:
        named = dict(denoiser.named_parameters())
        block = blocks_of({name: tuple(parameter.shape) for name, parameter in named.items()})
        for number, value in enumerate(self.rates.blocks):
            if value:
                params = [parameter for name, parameter in named.items() if block[name] == number]
                yield _group(f"block{number}", DENOISER, Rate(value, "--block_lr"), params)

    def param_groups(self) -> list[ParamGroup]:
        """One group for each trained part, or for each block of `--block_lr`."""
        return self._groups

    def prepare(self, accelerator: Any, models: Models) -> None:
        """Makes what is trained equal in all processes and switches it to training; it is where it was loaded."""
        if accelerator.num_processes > 1:
            tensors = [parameter for part in self.parts.values() for parameter in part.parameters()]
            broadcast(tensors, accelerator.device)
        self.train_mode(True)

    # training

    def train_mode(self, training: bool) -> None:
        """Switches what is trained between training and evaluation; encoders that have stopped stay in the latter."""
        for name, part in self.parts.items():
            part.train(training and not (self._encoders_stopped and name != DENOISER))

    def begin_after(self, step: int) -> None:
        """Freezes the text encoders if their steps are over."""
        limit = self.rates.encoder_steps
        if limit is None or step < limit or self._encoders_stopped or not self.rates.trained_encoders:
            return
        self._encoders_stopped = True
        for name in self.rates.trained_encoders:
            part = self.parts[name].eval().requires_grad_(False)
            for parameter in part.parameters():
                parameter.grad = None
        logger.info("the text encoders are frozen after step %d (--stop_text_encoder_training %d)", step, limit)

    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Freezes the text encoders when their steps are over."""
        self.begin_after(step)
        return {}

    def reduce_gradients(self, accelerator: Any, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """As `Method.reduce_gradients`; what has stopped keeps having no gradient, by which it would move."""
        wanted = self.parameters() if parameters is None else parameters
        super().reduce_gradients(accelerator, [parameter for parameter in wanted if parameter.requires_grad])

    # files

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of what is trained: of the denoiser alone under its own names, else with the part's in front."""
        if set(self.parts) == {DENOISER}:
            return self.parts[DENOISER].state_dict()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of `state_dict`."""
        if set(self.parts) == {DENOISER}:
            self.parts[DENOISER].load_state_dict(dict(tensors))
            return
        odd = [name for name in tensors if name.split(".")[0] not in self.parts]
        if odd:
            raise KeyError(f"it has weights of a part that isn't trained now ({odd[0]})")
        for part, module in self.parts.items():
            names = {name.removeprefix(f"{part}."): name for name in tensors if name.startswith(f"{part}.")}
            module.load_state_dict({short: tensors[name] for short, name in names.items()})

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Has the family write a whole model around what is trained."""
        assert self._write is not None, "nobody has said how"
        self._write(path, self.parts, dtype, metadata)


def _group(name: str, component: str, rate: Rate, params: Any) -> ParamGroup:
    return ParamGroup(name=name, params=list(params), lr=rate.value, lr_source=rate.source, component=component)
