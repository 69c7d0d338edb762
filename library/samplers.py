"""Ways from noise to an image: for each sampler by name, which steps to take and what to make of the answers.

A flow has one way, Euler steps of its own. For Stable Diffusion the names of `--sample_sampler` are schedulers of
Diffusers, with the noise levels of the training.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from torch import Generator, Tensor

from library.epsilon import Epsilon
from library.log import UserError, get_logger
from library.noise_schedule import NoiseSchedule
from library.objectives import TIMESTEPS, Objective

logger = get_logger(__name__)

LEAST_ALPHA = 2.0**-24
"""Share of the image that pure noise is said to hold, so that nothing is divided by 0."""
LEAST_LOG_SNR = -3.5
"""Where a model that says the noise begins if the last level is pure noise, of which it can't tell the image: there
about a thousandth of the variance is the image."""
ORDER = 4
"""Most steps that `lms` looks back."""
DEFAULT_SAMPLER = "ddim"


class Sampler(Protocol):
    """One way from noise to an image, for one image. Its steps must be taken in order."""

    @property
    def timesteps(self) -> Sequence[float]:
        """In [0, 1000], what the denoiser is told in each step; samplers that look twice have two steps for one."""

    def begin(self, noise: Tensor) -> Tensor:
        """What the first step starts from, of normal numbers."""

    def scale(self, x: Tensor, i: int) -> Tensor:
        """What the denoiser sees in step i."""

    def step(self, prediction: Tensor, i: int, x: Tensor, generator: Generator) -> Tensor:
        """What step i makes of x and the denoiser's answer, float32; noise it adds comes from the generator."""


def create(objective: Objective, name: str | None, *, steps: int, tokens: int, shift: bool) -> Sampler:
    """A sampler for one image.

    Args:
        objective: what the denoiser has learned.
        name: for Stable Diffusion, one of `SAMPLERS`; None: `ddim`. A flow doesn't look at it.
        steps: how many, at least 1.
        tokens: size of the image, for a flow.
        shift: whether the steps of a flow depend on it.

    Errors: UserError for a name that isn't known.
    """
    if not isinstance(objective, Epsilon):
        return Descent(objective, objective.schedule(steps, tokens, shift).tolist())
    recipe = recipe_of(name or DEFAULT_SAMPLER)
    levels, says_velocity = objective.levels, objective.settings.v_parameterization
    if levels.zero_terminal_snr and says_velocity and recipe.instead is not None:
        _say_other(name or DEFAULT_SAMPLER, recipe.instead)
        recipe = SAMPLERS[recipe.instead]
    return recipe.kind(scheduler_of(recipe, levels, says_velocity=says_velocity, steps=steps), steps)


class Descent:
    """The objective's own deterministic steps down the noise levels."""

    def __init__(self, objective: Objective, levels: Sequence[float]) -> None:
        self._objective = objective
        self._steps = list(pairwise(levels))
        self.timesteps: Sequence[float] = [level * TIMESTEPS for level, _ in self._steps]

    def begin(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def scale(self, x: Tensor, i: int) -> Tensor:
        """The latents themselves."""
        return x

    def step(self, prediction: Tensor, i: int, x: Tensor, generator: Generator) -> Tensor:
        """See `Objective.denoise`."""
        return self._objective.denoise(x, prediction, *self._steps[i])


class Scheduled:
    """A scheduler of Diffusers. Its tables stay on the CPU, so that no step waits for the device."""

    def __init__(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        self._scheduler = scheduler
        self._draws = "generator" in inspect.signature(scheduler.step).parameters
        self.timesteps: Sequence[float] = [float(timestep) for timestep in scheduler.timesteps]

    def begin(self, noise: Tensor) -> Tensor:
        """The noise, as strong as the first step wants it."""
        return noise * float(self._scheduler.init_noise_sigma)

    def scale(self, x: Tensor, i: int) -> Tensor:
        """The latents with a variance of about 1."""
        scaled: Tensor = self._scheduler.scale_model_input(x, self._scheduler.timesteps[i])
        return scaled

    def step(self, prediction: Tensor, i: int, x: Tensor, generator: Generator) -> Tensor:
        """The scheduler's step."""
        drawing = {"generator": generator} if self._draws else {}
        moved: Tensor = self._scheduler.step(prediction, self._scheduler.timesteps[i], x, **drawing).prev_sample
        return moved


class LinearMultistep(Scheduled):
    """The method of Adams and Bashforth for uneven steps, on noise levels sigma = noise / image.

    Written here because that of Diffusers needs SciPy. Source: Hairer, Norsett and Wanner, "Solving Ordinary
    Differential Equations I", section III.5; Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
    Models" (2022), equation 1 for the slope.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        super().__init__(scheduler, steps)
        self._sigmas: list[float] = scheduler.sigmas.double().tolist()
        self._says_velocity = scheduler.config.prediction_type == "v_prediction"
        self._slopes: list[Tensor] = []
        """The last ones, newest first."""

    def scale(self, x: Tensor, i: int) -> Tensor:
        """The latents with a variance of about 1."""
        return x / math.sqrt(self._sigmas[i] ** 2 + 1)

    def step(self, prediction: Tensor, i: int, x: Tensor, generator: Generator) -> Tensor:
        """x plus the integral of the polynomial through the last slopes."""
        self._slopes = [self._slope(prediction, x, self._sigmas[i]), *self._slopes[: ORDER - 1]]
        nodes = self._sigmas[i::-1][: len(self._slopes)]
        weights = multistep_weights(nodes, self._sigmas[i + 1])
        return x + sum(weight * slope for weight, slope in zip(weights, self._slopes, strict=True))

    def _slope(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        if not self._says_velocity:
            return prediction
        return (sigma * x + math.sqrt(sigma**2 + 1) * prediction) / (sigma**2 + 1)


def multistep_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Factors of the slopes at some nodes, newest first, for a step from the first node to `end`."""
    weights = []
    for place, node in enumerate(nodes):
        others = [other for index, other in enumerate(nodes) if index != place]
        polynomial = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = polynomial.integ()
        weights.append(float((integral(end) - integral(nodes[0])) / polynomial(node)))
    return weights


# the table


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a sampler is made."""

    scheduler: str
    """Name of a class of Diffusers."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    spaced: bool = True
    """Whether it can be told how timesteps are chosen."""
    instead: str | None = None
    """What takes its place where the first step begins at pure noise, if it can't: it would look twice there."""
    kind: Callable[[Any, int], Sampler] = Scheduled


_AS_PUBLISHED = {"steps_offset": 1}
"""As in the scheduler files that Stable Diffusion was published with."""

SAMPLERS: dict[str, Recipe] = {
    # latents are no pixels: clipping them to [-1, 1] would take away contrast
    "ddim": Recipe(
        scheduler="DDIMScheduler", arguments={"clip_sample": False, "set_alpha_to_one": False, **_AS_PUBLISHED}
    ),
    "pndm": Recipe(
        scheduler="PNDMScheduler",
        arguments={"skip_prk_steps": True, "set_alpha_to_one": False, **_AS_PUBLISHED},
        instead="ddim",
    ),
    "lms": Recipe(scheduler="EulerDiscreteScheduler", arguments=_AS_PUBLISHED, kind=LinearMultistep),
    "euler": Recipe(scheduler="EulerDiscreteScheduler", arguments=_AS_PUBLISHED),
    "euler_a": Recipe(scheduler="EulerAncestralDiscreteScheduler", arguments=_AS_PUBLISHED),
    "heun": Recipe(scheduler="HeunDiscreteScheduler", arguments=_AS_PUBLISHED, instead="euler"),
    "dpm_2": Recipe(scheduler="KDPM2DiscreteScheduler", arguments=_AS_PUBLISHED, instead="euler"),
    "dpm_2_a": Recipe(scheduler="KDPM2AncestralDiscreteScheduler", arguments=_AS_PUBLISHED, instead="euler_a"),
    "dpmsolver": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        arguments={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **_AS_PUBLISHED},
    ),
    "dpmsolver++": Recipe(
        scheduler="DPMSolverMultistepScheduler", arguments={"algorithm_type": "dpmsolver++", **_AS_PUBLISHED}
    ),
    "dpmsingle": Recipe(scheduler="DPMSolverSinglestepScheduler", arguments={"lower_order_final": True}, spaced=False),
}
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def recipe_of(name: str, where: str = "--sample_sampler, --ss") -> Recipe:
    """The recipe of a name, which stands somewhere. Errors: UserError for one that isn't known."""
    if name not in SAMPLERS:
        hint = f"choose {', '.join(SAMPLERS)}"
        raise UserError(f"there is no sampler {name!r}", where, hint, code="E-SAMPLER")
    return SAMPLERS[name]


def scheduler_of(recipe: Recipe, levels: NoiseSchedule, *, says_velocity: bool, steps: int) -> Any:
    """A scheduler with the training's noise levels.

    Where the last level is pure noise, a model that says the velocity begins exactly there, and one that says the noise
    a little below. A single step begins at the last timestep, too, and 1000 are all timesteps.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2024), section 3.3.
    """
    import diffusers

    blind = levels.zero_terminal_snr and not says_velocity
    spacing: dict[str, object] = {}
    if not recipe.spaced:
        spacing = {"lambda_min_clipped": LEAST_LOG_SNR} if blind else {}
    elif steps in (1, TIMESTEPS):
        spacing = {"timestep_spacing": "trailing"}
    elif levels.zero_terminal_snr:
        spacing = {"timestep_spacing": "leading" if blind else "trailing"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "dpmsolver" is an old method, and wanted
        return getattr(diffusers, recipe.scheduler)(
            num_train_timesteps=TIMESTEPS,
            trained_betas=betas_of(levels),
            prediction_type="v_prediction" if says_velocity else "epsilon",
            **{**recipe.arguments, **spacing},
        )


def betas_of(levels: NoiseSchedule) -> Any:
    """(1000,) float32, an array: the training's betas, with a trace of the image left in pure noise."""
    betas = levels.betas.clone()
    if levels.zero_terminal_snr:
        betas[-1] = 1 - LEAST_ALPHA / levels.alphas[-2]
    return betas.numpy()


@cache
def _say_other(name: str, instead: str) -> None:
    """Once in a run."""
    logger.warning("sampler %s can't begin at pure noise (--zero_terminal_snr): %s takes its place", name, instead)
