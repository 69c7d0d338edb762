"""Which parts of a model full training moves, at which rates, as the options of each script say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.log import UserError
from library.methods.rates import Rate
from library.option_groups import (
    DreamBoothOptions,
    OptimizerOptions,
    Sd3FullOptions,
    SdxlFullOptions,
    TrainEncoderOptions,
)
from library.types import DENOISER

if TYPE_CHECKING:
    from library.options import Options

BLOCK_RATES = 23
"""Numbers of `--block_lr`."""
ENCODER_RATES = ("learning_rate_te", *(f"learning_rate_te{number}" for number in (1, 2, 3)))
"""Options with rates of text encoders; each script has those of its encoders, in their order."""


@dataclass(frozen=True, kw_only=True)
class FullRates:
    """The rates of the parts of a model; 0 freezes a part, and a negative rate makes the loss grow."""

    denoiser: Rate
    encoders: Mapping[str, Rate] = field(default_factory=dict)
    """By name, in the family's order: those that are to be trained, if their rate isn't 0."""
    frozen_encoders: Mapping[str, str] = field(default_factory=dict)
    """Those that aren't, and why."""
    blocks: tuple[float, ...] = ()
    """Of the blocks of SDXL's U-Net, see `library.methods.block_rates`; empty: all have the denoiser's."""
    last_blocks_frozen: int = 0
    """So many of the denoiser's last blocks aren't trained."""
    encoder_steps: int | None = None
    """After this many steps the text encoders are frozen; None: never."""

    @classmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str]) -> FullRates:
        """What the options of a script say. Errors: UserError for a `--block_lr` that isn't a list of 23 numbers."""
        fallback = "--learning_rate" if options.given("learning_rate") else "default of --learning_rate"
        default = Rate(float(options[OptimizerOptions].learning_rate or 0), fallback)
        reasons = {name: reason for name in encoder_names if (reason := _why_frozen(options, name))}
        own = dict(zip(encoder_names, _own_rates(options), strict=False))
        return cls(
            denoiser=default,
            encoders={name: own.get(name) or default for name in encoder_names if name not in reasons},
            frozen_encoders=reasons,
            blocks=_block_rates(options),
            last_blocks_frozen=_last_blocks_frozen(options),
            encoder_steps=_encoder_steps(options),
        )

    @property
    def trains_denoiser(self) -> bool:
        """Whether any of the denoiser is trained."""
        return any(self.blocks) if self.blocks else self.denoiser.value != 0

    @property
    def trained_encoders(self) -> list[str]:
        """Names of the encoders that are trained, if only for some steps."""
        return [name for name, rate in self.encoders.items() if rate.value]

    def frozen(self) -> dict[str, str]:
        """Parts that aren't trained, and why."""
        found = {}
        if not self.trains_denoiser:
            found[DENOISER] = "all of --block_lr is 0" if self.blocks else f"{self.denoiser.source} is 0"
        zero = {name: f"{rate.source} is 0" for name, rate in self.encoders.items() if not rate.value}
        return found | dict(self.frozen_encoders) | zero

    def ascents(self) -> list[str]:
        """Options whose rates are negative."""
        used = [self.denoiser] if self.trains_denoiser and not self.blocks else []
        sources = [rate.source for rate in (*used, *self.encoders.values()) if rate.value < 0]
        return list(dict.fromkeys([*sources, *(["--block_lr"] if any(rate < 0 for rate in self.blocks) else [])]))


def _why_frozen(options: Options, encoder: str) -> str:
    """Why a text encoder isn't trained, whatever its rate; empty: it is."""
    if options.has(DreamBoothOptions):
        stop = options[DreamBoothOptions].stop_text_encoder_training
        return "" if stop is None or stop > 0 else f"--stop_text_encoder_training is {stop}"
    if options.has(TrainEncoderOptions):
        # an encoder with a flag of its own is trained on request only
        flags = filter(options.script.option, ("train_text_encoder", f"train_{encoder}"))
        return next((f"without --{flag}" for flag in flags if not options.value(flag)), "")
    return "this script trains the denoiser only"


def _own_rates(options: Options) -> Iterator[Rate | None]:
    """Rates of the encoders in their order; None where none is given."""
    for name in ENCODER_RATES:
        if options.script.option(name) is None:
            continue
        value = options.value(name)
        yield None if value is None else Rate(value, f"--{name}")


def _last_blocks_frozen(options: Options) -> int:
    given = options[Sd3FullOptions].num_last_block_to_freeze if options.has(Sd3FullOptions) else None
    return given or 0


def _encoder_steps(options: Options) -> int | None:
    return options[DreamBoothOptions].stop_text_encoder_training if options.has(DreamBoothOptions) else None


def _block_rates(options: Options) -> tuple[float, ...]:
    given = options[SdxlFullOptions].block_lr if options.has(SdxlFullOptions) else None
    if not given:
        return ()
    where, hint = options.where("block_lr"), f"give {BLOCK_RATES} numbers, separated by commas; 0 freezes a block"
    try:
        rates = tuple(float(number) for number in given.split(","))
    except ValueError:
        raise UserError(f"{given!r} isn't a list of numbers", where, hint, code="E-LR") from None
    if len(rates) != BLOCK_RATES:
        raise UserError(f"{len(rates)} rates for {BLOCK_RATES} blocks", where, hint, code="E-LR")
    return rates
