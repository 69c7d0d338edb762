"""Options that make a run fit a graphics card, the cheapest first; and what to say where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

from library.findings import warning
from library.log import ResourceError
from library.models.activations import ActivationModel
from library.train.activations import Shapes
from library.train.forecast import GIB, STATE_BYTES, Forecast, Phase, forecast, gib, listed
from library.train.setups import Setup
from library.types import Finding, Size

EVERY = (4, 3, 2)
"""Of which every n-th block computing again is tried."""
SLIGHT = GIB // 32
"""What saves less isn't worth an option."""
SIDES = (1024, 768, 512, 256)
"""Of squares that are proposed where nothing else helps."""
MOST_SAVERS = 3

Foresee = Callable[[Setup], Forecast]
Fits = Callable[[Setup], bool]


@dataclass(frozen=True)
class Advice:
    """What to do so that a run fits."""

    setup: Setup
    flags: Sequence[str]
    forecast: Forecast
    fits: bool
    """Whether that is enough."""


def advise(setup: Setup, foresee: Foresee, memory: int, units: int) -> Advice:
    """The options that make a run fit a device with so much memory, cheapest in speed first.

    None that it can do without; where all are not enough, all of them, and a smaller size of images.

    Args:
        units: greatest value of --blocks_to_swap.
    """

    def fits(candidate: Setup) -> bool:
        return foresee(candidate).needed <= memory

    best = setup
    for change in _changes(setup):
        if fits(best):
            break
        changed = change(best, fits, units)
        if changed is not None and _saves(foresee(best), foresee(changed), memory, _ONLY.get(change)):
            best = changed
    if fits(best):
        best = _without_needless(setup, best, fits)
    return Advice(best, flags(setup, best), foresee(best), fits(best))


def _without_needless(setup: Setup, best: Setup, fits: Fits) -> Setup:
    """What later options made needless is left out again, the slowest first."""
    for names in _BACK:
        if "optimizer" in names and best.swap and setup.full:
            continue  # its state would lie in main memory, and be stepped there
        before = replace(best, **{name: getattr(setup, name) for name in names})
        if before != best and fits(before):
            best = before
    seldom = (replace(best, checkpoint_every=every) for every in EVERY)
    recomputes = best.checkpoint_every == 1 != setup.checkpoint_every and not best.offload
    return next(filter(fits, seldom), best) if recomputes else best


_BACK = (
    *(("offload",), ("swap",), ("optimizer", "gradients"), ("trained_size",), ("checkpoint_every", "offload")),
    *(("encoder_storage", "storage"), ("storage",), ("encoder_storage",), ("cached_latents",), ("cached_text",)),
)
"""What belongs together of a setup."""


def _saves(before: Forecast, after: Forecast, memory: int, phase: Phase | None) -> bool:
    """Whether a phase that takes too much takes noticeably less: this one, or any."""
    phases = before.phases if phase is None else before.phases.keys() & {phase}
    return any(
        before.total(phase) - after.total(phase) > SLIGHT for phase in phases if before.needed_in(phase) > memory
    )


def flags(before: Setup, after: Setup) -> list[str]:
    """The options that make the one setup of the other."""
    every = [f"--checkpoint_every_n_blocks {after.checkpoint_every}"] if after.checkpoint_every > 1 else []
    optimizer = [f"--optimizer_type {after.optimizer}"]
    fused = {"all": [], "block": ["--blockwise_fused_optimizers"], "none": ["--fused_backward_pass"]}
    options = {
        "cached_text": ["--cache_text_encoder_outputs"],
        "cached_latents": ["--cache_latents"],
        "encoder_storage": ["--fp8_base"],
        "checkpoint_every": ["--gradient_checkpointing", *every],
        "storage": ["--fp8_scaled"],
        "trained_size": ["--full_bf16"],
        "optimizer": optimizer,
        "gradients": fused[after.gradients],
        "swap": [f"--blocks_to_swap {after.swap}"],
        "offload": ["--cpu_offload_checkpointing"],
        "size": [f"--resolution {after.size.width},{after.size.height}"],
    }
    return [flag for name, found in options.items() if getattr(before, name) != getattr(after, name) for flag in found]


# the options, in the order of what they cost; each gives a setup with the option, or None where it does nothing

Change = Callable[[Setup, Fits, int], "Setup | None"]


def _cache_text(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return None if setup.cached_text else replace(setup, cached_text=True)


def _cache_latents(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return None if setup.cached_latents else replace(setup, cached_latents=True)


def _small_encoders(setup: Setup, fits: Fits, units: int) -> Setup | None:
    if setup.encoder_storage or setup.storage not in (None, "fp8", "fp8_scaled") or setup.compute > 2:
        return None
    if setup.full:
        return replace(setup, encoder_storage="fp8")
    return replace(setup, encoder_storage="fp8_scaled", storage="fp8_scaled")


def _recompute(setup: Setup, fits: Fits, units: int) -> Setup | None:
    if setup.checkpoint_every == 1:
        return None
    candidates = (replace(setup, checkpoint_every=every) for every in EVERY)
    return next(filter(fits, candidates), replace(setup, checkpoint_every=1))


def _fp8(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return None if setup.storage or setup.compute > 2 else replace(setup, storage="fp8_scaled")


def _half_weights(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return replace(setup, trained_size=2) if setup.trained_size > setup.compute == 2 else None


def _eight_bits(setup: Setup, fits: Fits, units: int) -> Setup | None:
    better = STATE_BYTES.get(setup.optimizer.lower(), 8) > STATE_BYTES["adamw8bit"]
    return replace(setup, optimizer="AdamW8bit") if better and setup.gradients != "none" else None


def _blockwise(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return None if setup.steps_in_backward or setup.accumulates else replace(setup, gradients="block")


def _fused(setup: Setup, fits: Fits, units: int) -> Setup | None:
    if setup.gradients == "none" or setup.accumulates:
        return None
    return replace(setup, gradients="none", optimizer="Adafactor")


def _swap(setup: Setup, fits: Fits, units: int) -> Setup | None:
    """The least number that fits; else the greatest."""
    low, high = setup.swap, units
    if low >= high:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(replace(setup, swap=middle)) else (middle, high)
    return replace(setup, swap=high)


def _offload(setup: Setup, fits: Fits, units: int) -> Setup | None:
    return None if setup.offload or setup.checkpoint_every != 1 else replace(setup, offload=True)


def _smaller(setup: Setup, fits: Fits, units: int) -> Setup | None:
    sizes = [Size(side, side) for side in SIDES if side * side < setup.size.area]
    candidates = [replace(setup, size=size) for size in sizes]
    return next(filter(fits, candidates), candidates[-1] if candidates else None)


_ONLY: Mapping[Change, Phase] = {_small_encoders: "text encoding"}
"""Changes that are for one phase."""


def _changes(setup: Setup) -> Sequence[Change]:
    caches = (_cache_text, _cache_latents, _small_encoders)
    slow = (_swap, _offload, _smaller)
    if setup.full:
        return *caches, _half_weights, _eight_bits, _blockwise, _recompute, _fused, *slow
    return *caches, _recompute, _fp8, _eight_bits, *slow


class Planner:
    """The forecast of a run, whether it fits the device, and what would make it fit."""

    def __init__(
        self,
        shapes: Mapping[str, Shapes],
        model: ActivationModel,
        setup: Setup,
        *,
        memory: int | None,
        main_memory: int | None = None,
        autoencoder: Shapes | None = None,
    ) -> None:
        """As `library.train.forecast.forecast`; memory of the device and of the machine, None where it isn't known."""
        self.setup, self.memory, self.main_memory, self._units = setup, memory, main_memory, model.swap_units
        self._known: dict[Setup, Forecast] = {}
        self._foresee: Foresee = partial(_foreseen, shapes, model, autoencoder)
        self.forecast = self.foresee(setup)

    def foresee(self, setup: Setup) -> Forecast:
        """The forecast of another setup."""
        if setup not in self._known:
            self._known[setup] = self._foresee(setup)
        return self._known[setup]

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory, as far as it is known."""
        return self.memory is None or self.forecast.needed <= self.memory

    @cached_property
    def advice(self) -> Advice:
        """What makes it fit."""
        return advise(self.setup, self.foresee, 2**62 if self.memory is None else self.memory, self._units)

    def lines(self) -> list[str]:
        """The forecast for people, and what to add where the device has too little."""
        if self.memory is None:
            return self.forecast.lines()
        said = f"{gib(self.forecast.needed)} of {gib(self.memory)} of GPU memory, for {self.forecast.worst}"
        return [*self.forecast.lines(), f"needs about {said}", *([] if self.fits else [self._cure()])]

    def findings(self) -> list[Finding]:
        """Warnings where the run won't fit, before a weight is loaded."""
        found = []
        if self.memory is not None and not self.fits:
            what = f"{self.forecast.worst} needs about {gib(self.forecast.needed)} of {gib(self.memory)}"
            found.append(warning(what, "GPU memory", self._cure()))
        parts = self.forecast.main_memory
        if self.main_memory is not None and sum(parts.values()) > self.main_memory:
            what = f"about {gib(sum(parts.values()))} of {gib(self.main_memory)} are needed: {listed(parts)}"
            found.append(warning(what, "main memory", "swap fewer blocks, or leave other things in GPU memory"))
        return found

    def _cure(self) -> str:
        advice = self.advice
        added, then = " ".join(advice.flags), gib(advice.forecast.needed)
        if advice.fits:
            return f"add {added} (then about {then})"
        start = f"even with {added} {advice.forecast.worst} needs" if added else f"{advice.forecast.worst} needs"
        return f"{start} about {then}: a larger GPU is needed"

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Says what takes the memory of a phase, and what would help, where it runs out in it."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self.out_of_memory(phase) from error

    def out_of_memory(self, phase: Phase) -> ResourceError:
        """What to say when the memory of the device ran out in a phase."""
        parts = self.forecast.phases.get(phase, {})
        expected = f"expected were {gib(self.forecast.needed_in(phase))}: {listed(parts)}" if parts else ""
        of = "" if self.memory is None else f" of {gib(self.memory)}"
        hint = "; ".join(f"{' '.join(found)} saves {gib(saved)}" for saved, found in self.savers(phase))
        what = f"GPU memory{of} ran out while {_DOING.get(phase, phase)}"
        return ResourceError(what, expected, hint or "take a smaller --resolution, or a larger GPU", code="E-MEMORY")

    def savers(self, phase: Phase) -> list[tuple[int, list[str]]]:
        """The options that save most in a phase, each alone, with the bytes that it saves."""
        found = []
        for change in _changes(self.setup):
            if _ONLY.get(change, phase) != phase:
                continue
            changed = change(self.setup, lambda _: False, self._units // 2)
            if changed is not None and phase in self.foresee(changed).phases:
                saved = self.forecast.total(phase) - self.foresee(changed).total(phase)
                if saved > SLIGHT:
                    found.append((saved, flags(self.setup, changed)))
        return sorted(found, key=lambda one: -one[0])[:MOST_SAVERS]


def _foreseen(
    shapes: Mapping[str, Shapes], model: ActivationModel, autoencoder: Shapes | None, setup: Setup
) -> Forecast:
    return forecast(shapes, model, setup, autoencoder)


_DOING: Mapping[Phase, str] = {
    "text encoding": "encoding captions",
    "image encoding": "encoding images",
    "loading the denoiser": "loading the denoiser",
    "training": "training",
    "sampling": "making samples",
}
