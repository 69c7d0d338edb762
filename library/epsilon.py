"""The objective of Stable Diffusion 1.x, 2.x and SDXL: the denoiser says the noise, or the velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.log import UserError
from library.noise_schedule import TIMESTEPS, NoiseSchedule
from library.objectives import LOSSES, masked_means
from library.randomness import Draws, Stream
from library.types import Noised

LEAST_SNR = 1e-4
"""Where a weight divides by the signal-to-noise ratio, it is taken for at least this much."""
LEAST_SIGNAL = 1e-3
"""Of pure noise a model that says the noise can't tell the image; dividing by 0 would make it none at all."""
MOST_SNR = 1000.0
"""Limit of the ratio in `scale_v_pred_loss_like_noise_pred`."""


@dataclass(frozen=True, kw_only=True)
class EpsilonSettings:
    """Settings of the objective; names and defaults are those of the options."""

    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    masked_loss_normalize: bool = False
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False


class Epsilon:
    """x_t = sqrt(alpha) x + sqrt(1 - alpha) noise; the denoiser says the noise or the velocity.

    The velocity is sqrt(alpha) noise - sqrt(1 - alpha) x.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), section 3.2; Salimans and Ho, "Progressive
    Distillation for Fast Sampling of Diffusion Models" (2022), section 4 for v.
    """

    def __init__(self, settings: EpsilonSettings) -> None:
        _check(settings)
        self.settings = settings
        self.levels = NoiseSchedule(zero_terminal_snr=settings.zero_terminal_snr)

    # the task

    def noise(self, latents: Tensor, draws: Draws) -> Noised:
        """Noisy latents at random timesteps. `input` has the type of the latents, `target` is float32."""
        timesteps = self._drawn_timesteps(draws).to(latents.device)
        noise = changed_noise(self.settings, draws.normal(latents.shape[1:]).to(latents.device), latents.float(), draws)
        return self._noised(latents, timesteps, noise, noise + self._perturbation(latents, draws))

    def noise_at(self, latents: Tensor, sigma: Tensor, draws: Draws) -> Noised:
        """The same at timesteps 1000 sigma, sigma (B,), with plain noise."""
        noise = draws.normal(latents.shape[1:]).to(latents.device)
        return self._noised(latents, (sigma * TIMESTEPS).round().to(latents.device), noise, noise)

    def sigmas(self, draws: Draws, tokens: int) -> Tensor:
        """(B,) float32: the timesteps that training draws, over 1000; the size of the image has no influence."""
        return self._drawn_timesteps(draws) / TIMESTEPS

    def even_sigmas(self, count: int) -> list[float]:
        """What divides the range of timesteps into `count` + 1 parts, equal up to rounding."""
        low, high = _timestep_range(self.settings)
        return [round(low + (high - low) * number / (count + 1)) / TIMESTEPS for number in range(1, count + 1)]

    def density(self) -> str:
        """For example `uniform timesteps, min_timestep 100`."""
        names = [name for name in ("min_timestep", "max_timestep") if getattr(self.settings, name) is not None]
        return ", ".join(["uniform timesteps", *(f"{name} {getattr(self.settings, name)}" for name in names)])

    def _drawn_timesteps(self, draws: Draws) -> Tensor:
        low, high = _timestep_range(self.settings)
        return (low + draws.uniform_scalars() * (high - low)).floor().clamp(max=high - 1)

    def _noised(self, latents: Tensor, timesteps: Tensor, noise: Tensor, noise_in_input: Tensor) -> Noised:
        clean = latents.float()
        alpha = self.levels.alphas_at(timesteps)[:, None, None, None]
        signal, disorder = alpha.sqrt(), (1 - alpha).sqrt()
        return Noised(
            latents=latents,
            input=(signal * clean + disorder * noise_in_input).to(latents.dtype),
            target=signal * noise - disorder * clean if self.settings.v_parameterization else noise,
            timesteps=timesteps,
            weight=loss_weight(self.settings, self.levels.snr_at(timesteps)),
        )

    def _perturbation(self, latents: Tensor, draws: Draws) -> Tensor | float:
        gamma = self.settings.ip_noise_gamma
        if not gamma:
            return 0.0
        noise = draws.normal(latents.shape[1:], Stream.PERTURBATION).to(latents.device) * gamma
        if self.settings.ip_noise_gamma_random_strength:
            noise = noise * _per_sample(draws, Stream.STRENGTH, latents)
        return noise

    # the loss

    def estimate(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The denoiser's answer, float32."""
        return prediction.float()

    def loss(self, prediction: Tensor, noised: Noised, mask: Tensor | None = None) -> Tensor:
        """(B,) float32: loss per element, times mask, averaged over all elements, times the sample's weight."""
        difference = prediction.float() - noised.target.float()
        threshold = self.huber_threshold(noised.timesteps)[:, None, None, None]
        losses = LOSSES[self.settings.loss_type](difference, threshold)
        return masked_means(losses, mask, self.settings.masked_loss_normalize) * noised.weight

    def huber_threshold(self, timesteps: Tensor) -> Tensor:
        """(B,): where the loss turns from quadratic to linear.

        Source: Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber
        Loss" (2024).
        """
        settings, least = self.settings, self.settings.huber_c
        match settings.huber_schedule:
            case "exponential":
                return settings.huber_scale * least ** (timesteps / TIMESTEPS)
            case "snr":
                alpha = self.levels.alphas_at(timesteps)
                ratio = ((1 - alpha) / alpha.clamp_min(1e-12)).sqrt()
                return (1 - least) / (1 + ratio) ** 2 + least
            case _:
                return torch.full_like(timesteps, settings.huber_scale * least)

    # the way back

    def denoise(self, x: Tensor, prediction: Tensor, t: float, t_next: float) -> Tensor:
        """One deterministic step from timestep 1000 t to 1000 t_next; below 0 there is no noise.

        Source: Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12 without its random part.
        """
        signal, disorder = self._parts(t)
        next_signal, next_disorder = self._parts(t_next)
        if self.settings.v_parameterization:
            clean, noise = signal * x - disorder * prediction, disorder * x + signal * prediction
        else:
            clean, noise = (x - disorder * prediction) / max(signal, LEAST_SIGNAL), prediction
        return next_signal * clean + next_disorder * noise

    def schedule(self, steps: int, tokens: int, shift: bool) -> Tensor:
        """(steps + 1,) float32: falling levels t / 1000, evenly spaced from the last timestep, and -1 for the image."""
        spacing = TIMESTEPS / steps
        timesteps = [max(round(TIMESTEPS - 1 - number * spacing), 0) for number in range(steps)]
        return torch.tensor([*(timestep / TIMESTEPS for timestep in timesteps), -1.0])

    def _parts(self, t: float) -> tuple[float, float]:
        """Factors of image and noise at timestep 1000 t."""
        alpha = 1.0 if t < 0 else float(self.levels.alphas[min(round(t * TIMESTEPS), TIMESTEPS - 1)])
        return math.sqrt(alpha), math.sqrt(1 - alpha)


# noise


def changed_noise(settings: EpsilonSettings, noise: Tensor, latents: Tensor, draws: Draws) -> Tensor:
    """Noise (B, C, h, w) with what the options add: first an offset of each channel, then coarser levels."""
    if settings.noise_offset:
        strength: Tensor | float = settings.noise_offset
        if settings.noise_offset_random_strength:
            strength = strength * _per_sample(draws, Stream.OFFSET_STRENGTH, latents)
        shift = draws.normal((*latents.shape[1:2], 1, 1), Stream.OFFSET).to(latents.device)
        noise = with_offset(noise, latents, shift, strength, settings.adaptive_noise_scale)
    if settings.multires_noise_iterations:
        noise = _with_levels(noise, draws, settings.multires_noise_iterations, settings.multires_noise_discount)
    return noise


def with_offset(
    noise: Tensor, latents: Tensor, shift: Tensor, strength: Tensor | float, adaptive: float | None
) -> Tensor:
    """Noise plus `shift` (B, C, 1, 1) times its strength, which grows with the mean of the channel if `adaptive`.

    Source: N. Guttenberg, "Diffusion with Offset Noise" (2023).
    """
    if adaptive:
        strength = (strength + adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp_min(0)
    return noise + strength * shift


def level_sizes(height: int, width: int, factors: list[float]) -> list[tuple[int, int]]:
    """Heights and widths of the levels of noise, each smaller by the next factor to the power of its number.

    The levels end with one that is a single row or column.
    """
    sizes = []
    for number, factor in enumerate(factors):
        sizes.append((max(1, int(height / factor**number)), max(1, int(width / factor**number))))
        if 1 in sizes[-1]:
            break
    return sizes


def pyramid(noise: Tensor, levels: list[Tensor], discount: float) -> Tensor:
    """One sample's noise (C, h, w) plus enlarged levels (C, h_i, w_i), each weaker by `discount`, at deviation 1.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (2023).
    """
    for number, level in enumerate(levels):
        noise = noise + discount**number * F.interpolate(level[None], noise.shape[-2:], mode="bilinear")[0]
    return noise / noise.std()


def _with_levels(noise: Tensor, draws: Draws, iterations: int, discount: float) -> Tensor:
    factors = torch.stack([2 + 2 * draws.uniform_scalars(Stream.LEVEL_SIZES + number) for number in range(iterations)])
    rows = []
    for place, (row, seed) in enumerate(zip(noise, draws.seeds, strict=True)):
        own = Draws([seed], draws.device)
        sizes = level_sizes(noise.shape[-2], noise.shape[-1], factors[:, place].tolist())
        levels = [
            own.normal((noise.shape[1], *size), Stream.LEVELS + number)[0].to(noise.device)
            for number, size in enumerate(sizes)
        ]
        rows.append(pyramid(row, levels, discount))
    return torch.stack(rows)


def _per_sample(draws: Draws, stream: Stream, like: Tensor) -> Tensor:
    """(B, 1, 1, 1): a uniform number for each sample."""
    return draws.uniform_scalars(stream).to(like.device)[:, None, None, None]


# weights


def loss_weight(settings: EpsilonSettings, snr: Tensor) -> Tensor:
    """(B,): the product of the loss weights of the options, at signal-to-noise ratios snr (B,).

    Each stays finite where the ratio is 0, at the end of a schedule with `zero_terminal_snr`.
    """
    weight = torch.ones_like(snr)
    for is_wanted, weigh in WEIGHTS:
        if is_wanted(settings):
            weight = weight * weigh(settings, snr)
    return weight


def _min_snr(settings: EpsilonSettings, snr: Tensor) -> Tensor:
    """Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023), section 3.4."""
    limited = snr.clamp(max=float(settings.min_snr_gamma or 0))
    if settings.v_parameterization:
        return limited / (snr + 1)
    return torch.where(snr > 0, limited / snr, torch.ones_like(snr))


def _like_noise(settings: EpsilonSettings, snr: Tensor) -> Tensor:
    limited = snr.clamp(max=MOST_SNR)
    return limited / (limited + 1)


def _like_velocity(settings: EpsilonSettings, snr: Tensor) -> Tensor:
    limited = snr.clamp(LEAST_SNR, MOST_SNR)
    return 1 + float(settings.v_pred_like_loss or 0) * (limited + 1) / limited


def _debiased(settings: EpsilonSettings, snr: Tensor) -> Tensor:
    """Source: Yu et al., "Unmasking Bias in Diffusion Model Training" (2024); for v the weight is the square's."""
    limited = snr.clamp(LEAST_SNR, MOST_SNR)
    return 1 / (limited + 1) if settings.v_parameterization else limited.rsqrt()


WEIGHTS: tuple[tuple[Callable[[EpsilonSettings], object], Callable[[EpsilonSettings, Tensor], Tensor]], ...] = (
    (lambda settings: settings.min_snr_gamma, _min_snr),
    (lambda settings: settings.scale_v_pred_loss_like_noise_pred, _like_noise),
    (lambda settings: settings.v_pred_like_loss, _like_velocity),
    (lambda settings: settings.debiased_estimation_loss, _debiased),
)
"""Whether a weight is asked for, and what it is."""


# what can't be


def _timestep_range(settings: EpsilonSettings) -> tuple[int, int]:
    low = 0 if settings.min_timestep is None else settings.min_timestep
    return low, TIMESTEPS if settings.max_timestep is None else settings.max_timestep


def _check(settings: EpsilonSettings) -> None:
    """Errors: UserError for settings that contradict one another."""
    low, high = _timestep_range(settings)
    if not 0 <= low < high <= TIMESTEPS:
        what = f"timesteps from {low} to {high} are no range within 0 to {TIMESTEPS}"
        where, hint = "--min_timestep, --max_timestep", "the minimum must be below the maximum"
        raise UserError(what, where, hint, code="E-TIMESTEP-RANGE")
    if settings.adaptive_noise_scale is not None and settings.noise_offset is None:
        where = "--adaptive_noise_scale"
        raise UserError("there is no noise offset to add to", where, "give --noise_offset, too", code="E-NOISE")
    for name, needs_v in (("scale_v_pred_loss_like_noise_pred", True), ("v_pred_like_loss", False)):
        if getattr(settings, name) and settings.v_parameterization != needs_v:
            what = f"it is for models that predict {'velocity' if needs_v else 'noise'}"
            hint = "give --v_parameterization, too" if needs_v else "leave it out"
            raise UserError(what, f"--{name}", hint, code="E-NOISE")
