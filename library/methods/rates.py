"""Learning rates of the parts of a model, and which option each came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.log import UserError
from library.option_groups import NetworkOptions, OptimizerOptions

if TYPE_CHECKING:
    from library.options import Options


@dataclass(frozen=True)
class Rate:
    """A learning rate, and the option that it came from."""

    value: float
    source: str


@dataclass(frozen=True)
class Rates:
    """The learning rates of all components."""

    default: Rate
    denoiser: Rate
    encoders: Mapping[str, Rate]
    """By name, in the family's order."""

    @classmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str]) -> Rates:
        """Missing rates come from `--learning_rate`; one `--text_encoder_lr` counts for all encoders.

        Errors: UserError when there are more rates than encoders.
        """
        network, optimizer = options[NetworkOptions], options[OptimizerOptions]
        fallback = "--learning_rate" if options.given("learning_rate") else "default of --learning_rate"
        default = Rate(float(optimizer.learning_rate or 0), fallback)
        denoiser = default if network.unet_lr is None else Rate(network.unet_lr, "--unet_lr")
        given = _numbers(network.text_encoder_lr)
        if encoder_names and len(given) > len(encoder_names):
            what = f"{len(given)} rates for {len(encoder_names)} text encoders ({', '.join(encoder_names)})"
            raise UserError(what, options.where("text_encoder_lr"), "give one, or one for each", code="E-LR")
        encoders = {
            name: Rate(given[min(index, len(given) - 1)], "--text_encoder_lr") if given else default
            for index, name in enumerate(encoder_names)
        }
        return cls(default, denoiser, encoders)


def _numbers(value: float | Sequence[float] | None) -> list[float]:
    if value is None:
        return []
    return [float(value)] if isinstance(value, int | float) else [float(number) for number in value]
