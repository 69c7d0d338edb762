"""Trains the whole denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import files
from library.log import UserError
from library.methods.base import Method, ParamGroup, broadcast, require_something
from library.option_groups import OptimizerOptions, PrecisionOptions
from library.types import DENOISER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.options import Options
    from library.types import Models


class Full(Method):
    """See `library.methods.base.Method`."""

    def __init__(self, lr: float, lr_source: str, dtype: torch.dtype, encoder_names: Sequence[str] = ()) -> None:
        """Trains at a rate, the weights kept in `dtype`. Errors: UserError when the rate is 0."""
        if not lr:
            raise UserError("nothing would be trained", f"{lr_source} is 0", "give a learning rate", code="E-NOTHING")
        self.lr, self.lr_source, self.dtype = lr, lr_source, dtype
        self._encoder_names = tuple(encoder_names)
        self._denoiser: nn.Module | None = None

    @classmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str] = ()) -> Full:
        """See `Method.from_options`."""
        import torch

        precision = options[PrecisionOptions]
        dtype = torch.float16 if precision.full_fp16 else torch.bfloat16 if precision.full_bf16 else torch.float32
        source = "--learning_rate" if options.given("learning_rate") else "default of --learning_rate"
        return cls(float(options[OptimizerOptions].learning_rate or 0), source, dtype, encoder_names)

    @property
    def denoiser(self) -> nn.Module:
        """What is trained."""
        assert self._denoiser is not None, "not attached yet"
        return self._denoiser

    def frozen(self) -> dict[str, str]:
        """The text encoders."""
        return dict.fromkeys(self._encoder_names, "this script trains the denoiser only")

    def trained_elements(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
        """All of the denoiser."""
        return sum(map(math.prod, shapes[DENOISER].values()))

    def attach(self, models: Models) -> None:
        """Makes the denoiser trainable, in the type of the trained weights."""
        assert models.denoiser is not None, "the denoiser isn't loaded"
        self._denoiser = models.denoiser.to(dtype=self.dtype).requires_grad_(True)
        for encoder in models.encoders.values():
            encoder.requires_grad_(False)

    def param_groups(self) -> list[ParamGroup]:
        """One group with everything."""
        params = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        group = ParamGroup(name=DENOISER, params=params, lr=self.lr, lr_source=self.lr_source, component=DENOISER)
        return require_something([group], "the denoiser has no parameters")

    def prepare(self, accelerator: Any, models: Models) -> None:
        """Makes the denoiser equal in all processes and switches it to training; it is where it was loaded."""
        if accelerator.num_processes > 1:
            broadcast(list(self.denoiser.parameters()), accelerator.device)
        self.train_mode(True)

    def train_mode(self, training: bool) -> None:
        """Switches the denoiser between training and evaluation."""
        self.denoiser.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """The denoiser's tensors, under their own names."""
        return self.denoiser.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of `state_dict`."""
        self.denoiser.load_state_dict(dict(tensors))

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Writes the denoiser, each tensor converted when its turn comes."""
        files.save_safetensors(_Converted(self.state_dict(), dtype), path, metadata)


class _Converted(Mapping[str, "Tensor"]):
    """Tensors in another type, made one at a time when they are asked for; only the last one is kept."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            tensor = self._tensors[name]
            keep = self._dtype is None or not tensor.is_floating_point()
            self._last = name, tensor if keep else tensor.to(self._dtype)
        return self._last[1]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
