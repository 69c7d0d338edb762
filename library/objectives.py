"""What is learned: how latents get noise, what the denoiser should say of them, how wrong it was, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from library.log import UserError
from library.randomness import Draws, Stream
from library.types import Noised

TIMESTEPS = 1000
MIN_WEIGHTED_SIGMA = 1e-4
"""Noise levels below this get the loss weight of this one, so that `sigma_sqrt` stays finite."""

LEAST_MASK = 1e-3
"""Mean of a mask below which normalising the loss by it goes no further."""


class Objective(Protocol):
    """A way of learning to turn noise into latents. Sigma is the noise level in [0, 1], timestep = 1000 sigma."""

    def noise(self, latents: Tensor, draws: Draws) -> Noised:
        """The denoiser's task for latents (B, C, h, w)."""

    def noise_at(self, latents: Tensor, sigma: Tensor, draws: Draws) -> Noised:
        """The same at noise levels sigma (B,), without what training adds to make it harder."""

    def sigmas(self, draws: Draws, tokens: int) -> Tensor:
        """(B,) float32: the noise levels that training draws for images of that many tokens."""

    def even_sigmas(self, count: int) -> list[float]:
        """Rising noise levels that are spread evenly over those that are trained at, ends excluded."""

    def density(self) -> str:
        """The settings that decide which noise levels are drawn, for people."""

    def estimate(self, prediction: Tensor, noised: Noised) -> Tensor:
        """What is compared with `noised.target`, from the denoiser's answer (B, C, h, w)."""

    def loss(self, prediction: Tensor, noised: Noised, mask: Tensor | None = None) -> Tensor:
        """(B,) float32: the mean loss of each sample; `mask` is (B, 1, h, w)."""

    def denoise(self, x: Tensor, prediction: Tensor, t: float, t_next: float) -> Tensor:
        """The latents at noise level t_next, from those at t and the denoiser's answer."""

    def schedule(self, steps: int, tokens: int, shift: bool) -> Tensor:
        """(steps + 1,) float32: falling noise levels from 1 to 0, for images of that many tokens."""


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """Settings of rectified flow; names and defaults are those of the options."""

    timestep_sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 3.0
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    model_prediction_type: str = "sigma_scaled"
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    whole_timesteps: bool = False
    """Whether timesteps are whole numbers, 1 to 1000."""
    sampling_shift: float | None = None
    """Shift of the sampler's noise levels for images of any size; None: it follows their size."""
    min_timestep: int | None = None
    max_timestep: int | None = None
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    masked_loss_normalize: bool = False


class Flow:
    """Rectified flow: x_sigma = (1 - sigma) x + sigma noise, and the denoiser says the velocity, noise - x.

    `model_prediction_type` names what is compared. `raw`: the velocity. `sigma_scaled`: the estimate of the clean
    latents, x_sigma - sigma velocity, with the loss weight of `weighting_scheme`. `additive`: the answer plus x_sigma
    against the velocity; it teaches something that the sampler doesn't use and exists for compatibility only.

    `min_timestep` and `max_timestep` squeeze the drawn noise levels into their range, linearly, whatever they are
    drawn from. Source: Liu et al., "Flow Straight and Fast" (2022); Esser et al., "Scaling Rectified Flow Transformers
    for High-Resolution Image Synthesis" (2024), sections 2, 3.1 and 5.3 for the densities, weights and shifts.
    """

    def __init__(self, settings: FlowSettings) -> None:
        _check(settings)
        self.settings = settings

    def noise(self, latents: Tensor, draws: Draws) -> Noised:
        """Latents between image and noise. `input` has the type of the latents, `target` is float32."""
        height, width = latents.shape[-2:]
        sigma = self.sigmas(draws, (height // 2) * (width // 2)).to(latents.device)
        return self._noised(latents, sigma, draws, self._perturbation(latents, draws))

    def noise_at(self, latents: Tensor, sigma: Tensor, draws: Draws) -> Noised:
        """Latents at noise levels sigma (B,), without perturbation."""
        return self._noised(latents, sigma, draws, 0.0)

    def _noised(self, latents: Tensor, sigma: Tensor, draws: Draws, perturbation: Tensor | float) -> Noised:
        clean = latents.float()
        noise = draws.normal(latents.shape[1:]).to(latents.device)
        level = sigma[:, None, None, None]
        noisy = (1 - level) * clean + level * (noise + perturbation)
        clean_is_target = self.settings.model_prediction_type == "sigma_scaled"
        return Noised(
            latents=latents,
            input=noisy.to(latents.dtype),
            target=clean if clean_is_target else noise - clean,
            timesteps=sigma * TIMESTEPS,
            weight=loss_weight(self.settings.weighting_scheme, sigma) if clean_is_target else torch.ones_like(sigma),
        )

    def sigmas(self, draws: Draws, tokens: int) -> Tensor:
        """(B,) float32: noise levels for images of that many tokens."""
        low, high = _timestep_range(self.settings)
        sigma = SAMPLINGS[self.settings.timestep_sampling](self.settings, draws, tokens)
        if self.settings.whole_timesteps:
            return (sigma * (high - low) + low).floor().clamp(min=1) / TIMESTEPS
        return sigma if (low, high) == (0, TIMESTEPS) else low / TIMESTEPS + sigma * ((high - low) / TIMESTEPS)

    def even_sigmas(self, count: int) -> list[float]:
        """What divides the range of timesteps into `count` + 1 equal parts: 0.2, 0.4, 0.6, 0.8 for 4 of the whole."""
        low, high = _timestep_range(self.settings)
        return [(low + (high - low) * number / (count + 1)) / TIMESTEPS for number in range(1, count + 1)]

    def density(self) -> str:
        """For example `timestep_sampling shift, sigmoid_scale 1, discrete_flow_shift 3`."""
        settings = self.settings
        direct, scheme = settings.timestep_sampling == "density", settings.weighting_scheme
        names = [*([] if direct else ["timestep_sampling"]), *DENSITY_SETTINGS[settings.timestep_sampling]]
        if direct or (settings.timestep_sampling == "sigma" and scheme in DENSITIES):
            names += ["weighting_scheme", *DENSITY_SETTINGS.get(scheme, ())]
        names += [name for name in ("min_timestep", "max_timestep") if getattr(settings, name) is not None]
        called = {"discrete_flow_shift": "training_shift"} if direct else {}  # by the options of SD3
        values = ((called.get(name, name), getattr(settings, name)) for name in names)
        return ", ".join(f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in values)

    def estimate(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The velocity, or what `model_prediction_type` makes of it; float32."""
        prediction = prediction.float()
        match self.settings.model_prediction_type:
            case "sigma_scaled":
                return noised.input.float() - noised.timesteps[:, None, None, None] / TIMESTEPS * prediction
            case "additive":
                return prediction + noised.input.float()
            case _:
                return prediction

    def loss(self, prediction: Tensor, noised: Noised, mask: Tensor | None = None) -> Tensor:
        """(B,) float32: loss per element, times mask, averaged over all elements, times the sample's weight."""
        difference = self.estimate(prediction, noised) - noised.target.float()
        threshold = huber_threshold(self.settings, noised.timesteps)[:, None, None, None]
        losses = LOSSES[self.settings.loss_type](difference, threshold)
        return masked_means(losses, mask, self.settings.masked_loss_normalize) * noised.weight

    def denoise(self, x: Tensor, prediction: Tensor, t: float, t_next: float) -> Tensor:
        """One Euler step along the velocity."""
        return x + (t_next - t) * prediction

    def schedule(self, steps: int, tokens: int, shift: bool) -> Tensor:
        """Equal steps from 1 to 0; with `shift`, larger images stay longer at high noise.

        With `sampling_shift` the steps go from 1 to the least level there is, 1/1000 shifted, are shifted, and 0
        follows. Source: Stability-AI/sd3.5, sd3_infer.py, whose last level is shifted twice.
        """
        fixed = self.settings.sampling_shift
        if fixed is not None:
            least = fixed / (TIMESTEPS + fixed - 1)
            falling = _shifted(torch.linspace(1, least, steps, dtype=torch.float64), fixed)
            return torch.cat((falling, falling.new_zeros(1))).float()
        sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (_shifted(sigma, math.exp(resolution_mu(tokens))) if shift else sigma).float()

    def _perturbation(self, latents: Tensor, draws: Draws) -> Tensor | float:
        gamma = self.settings.ip_noise_gamma
        if not gamma:
            return 0.0
        noise = draws.normal(latents.shape[1:], Stream.PERTURBATION).to(latents.device) * gamma
        if self.settings.ip_noise_gamma_random_strength:
            noise = noise * draws.uniform_scalars(Stream.STRENGTH).to(latents.device)[:, None, None, None]
        return noise


def resolution_mu(tokens: int) -> float:
    """The logarithm of the shift for images of that many tokens: the line through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (tokens - 256) * 0.65 / 3840


def _shifted(sigma: Tensor, factor: float) -> Tensor:
    """Noise levels whose odds sigma : 1 - sigma are multiplied by `factor`."""
    return factor * sigma / (1 + (factor - 1) * sigma)


# from random numbers to noise levels


def _uniform(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    return draws.uniform_scalars()


def _sigmoid(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    return torch.sigmoid(settings.sigmoid_scale * draws.normal_scalars())


def _shift(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    return _shifted(_sigmoid(settings, draws, tokens), settings.discrete_flow_shift)


def _flux_shift(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    return _shifted(_sigmoid(settings, draws, tokens), math.exp(resolution_mu(tokens)))


def _sigma(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    """From a table of 1000 falling levels; density 1 is the end of the table, not one past it."""
    u = DENSITIES.get(settings.weighting_scheme, _uniform)(settings, draws, tokens)
    index = (u * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
    return _shifted((TIMESTEPS - index) / TIMESTEPS, settings.discrete_flow_shift)


def _density(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    """The level itself has the density of `weighting_scheme`; it is shifted then."""
    u = DENSITIES.get(settings.weighting_scheme, _uniform)(settings, draws, tokens)
    return _shifted(u, settings.discrete_flow_shift)


def _logit_normal(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    return torch.sigmoid(settings.logit_mean + settings.logit_std * draws.normal_scalars())


def _mode(settings: FlowSettings, draws: Draws, tokens: int) -> Tensor:
    u = draws.uniform_scalars()
    level = 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return level.clamp(0, 1)  # beyond, which scales outside -1 to 2 / (pi - 2) reach, there is no level


Sampling = Callable[[FlowSettings, Draws, int], Tensor]

SAMPLINGS: dict[str, Sampling] = {
    "sigma": _sigma,
    "density": _density,
    "uniform": _uniform,
    "sigmoid": _sigmoid,
    "shift": _shift,
    "flux_shift": _flux_shift,
}
DENSITIES: dict[str, Sampling] = {"logit_normal": _logit_normal, "mode": _mode}
"""`weighting_scheme`s that decide where `timestep_sampling sigma` looks into its table, and how `density` draws.

With the others all levels are as likely."""

DENSITY_SETTINGS: dict[str, tuple[str, ...]] = {
    "sigma": ("discrete_flow_shift",),
    "density": ("discrete_flow_shift",),
    "uniform": (),
    "sigmoid": ("sigmoid_scale",),
    "shift": ("sigmoid_scale", "discrete_flow_shift"),
    "flux_shift": ("sigmoid_scale",),
    "logit_normal": ("logit_mean", "logit_std"),
    "mode": ("mode_scale",),
}
"""Settings that the ways of drawing use."""


# from noise levels to weights, from differences to losses


def loss_weight(scheme: str, sigma: Tensor) -> Tensor:
    """(B,): the loss weight of `weighting_scheme` at noise levels sigma (B,)."""
    match scheme:
        case "sigma_sqrt":
            return sigma.clamp(min=MIN_WEIGHTED_SIGMA) ** -2
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        case _:
            return torch.ones_like(sigma)


def huber_threshold(settings: FlowSettings, timesteps: Tensor) -> Tensor:
    """(B,): where the loss turns from quadratic to linear."""
    if settings.huber_schedule == "exponential":
        return settings.huber_scale * settings.huber_c ** (timesteps / TIMESTEPS)
    return torch.full_like(timesteps, settings.huber_scale * settings.huber_c)


def _l2(difference: Tensor, threshold: Tensor) -> Tensor:
    return difference**2


def _l1(difference: Tensor, threshold: Tensor) -> Tensor:
    return difference.abs()


def _huber(difference: Tensor, threshold: Tensor) -> Tensor:
    return 2 * threshold * (torch.sqrt(difference**2 + threshold**2) - threshold)


def _smooth_l1(difference: Tensor, threshold: Tensor) -> Tensor:
    return 2 * (torch.sqrt(difference**2 + threshold**2) - threshold)


def masked_means(losses: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """(B,): means of losses (B, C, h, w) times mask (B, 1, h, w), over all elements or by the mask's own mean."""
    if mask is not None:
        losses = losses * mask
        if normalize:
            losses = losses / mask.mean(dim=(1, 2, 3), keepdim=True).clamp_min(LEAST_MASK)
    return losses.mean(dim=(1, 2, 3))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}


# what can't be


def _timestep_range(settings: FlowSettings) -> tuple[int, int]:
    low = 0 if settings.min_timestep is None else settings.min_timestep
    return low, TIMESTEPS if settings.max_timestep is None else settings.max_timestep


def _check(settings: FlowSettings) -> None:
    """Errors: UserError for a setting that rectified flow can't follow."""
    known: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("timestep_sampling", tuple(SAMPLINGS)),
        ("weighting_scheme", ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")),
        ("model_prediction_type", ("raw", "additive", "sigma_scaled")),
        ("loss_type", tuple(LOSSES)),
        ("huber_schedule", ("constant", "exponential", "snr")),
    )
    for name, values in known:
        value = getattr(settings, name)
        if value not in values:
            raise UserError(f"{value!r} is not known", f"--{name}", f"choose {', '.join(values)}", code="E-FLOW-NAME")
    if settings.loss_type in ("huber", "smooth_l1") and settings.huber_schedule == "snr":
        raise UserError(
            f"--loss_type {settings.loss_type} can't follow the signal-to-noise ratio with a flow model",
            "--huber_schedule snr",
            "choose --huber_schedule exponential or constant",
            code="E-HUBER-SNR",
        )
    low, high = _timestep_range(settings)
    if not 0 <= low < high <= TIMESTEPS:
        raise UserError(
            f"timesteps from {low} to {high} are no range within 0 to {TIMESTEPS}",
            "--min_timestep, --max_timestep",
            "the minimum must be below the maximum",
            code="E-TIMESTEP-RANGE",
        )
