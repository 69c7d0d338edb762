"""The samplers: as in Diffusers, back to the image, from pure noise where that was trained, and reproducible."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from library import samplers
from library.epsilon import Epsilon, EpsilonSettings
from library.log import UserError
from library.noise_schedule import NoiseSchedule
from library.objectives import Flow, FlowSettings
from library.option_groups import SampleOptions
from library.option_types import options_of
from library.samplers import LEAST_ALPHA, SAMPLERS, betas_of, create, multistep_weights

SHAPE = (1, 4, 6, 4)
IMAGE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.8
EPS, V, ZERO, BLIND = (
    EpsilonSettings(v_parameterization=v, zero_terminal_snr=zero)
    for v, zero in ((False, False), (True, False), (True, True), (False, True))
)
PLAIN = [name for name in SAMPLERS if not name.startswith("k_")]
DETERMINISTIC = [name for name in PLAIN if not name.endswith("_a")]
LEAVES_NOISE = ("ddim", "pndm", "dpmsolver")
"""End at the first timestep instead of at none, as Stable Diffusion was published: 3 % of noise are left."""
THEIRS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}


def denoiser(x: torch.Tensor, t: float) -> torch.Tensor:
    """An answer that depends on everything."""
    return torch.tanh(x) * (0.4 + t / 2000) + 0.1 * x.roll(1, -1)


def sampled(settings: EpsilonSettings, name: str | None, steps: int, seed: int = 7, predict=denoiser) -> torch.Tensor:
    """What a sampler makes of noise."""
    sampler = create(Epsilon(settings), name, steps=steps, tokens=0, shift=False)
    generator = torch.Generator().manual_seed(seed)
    x = sampler.begin(torch.randn(SHAPE, generator=generator))
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(predict(sampler.scale(x, i), t), i, x, generator)
    return x


def theirs(name: str, steps: int, seed: int = 7, **more) -> torch.Tensor:
    """The same by Diffusers alone, as its pipelines do it."""
    scheduler_class, arguments = THEIRS[name]
    scheduler = getattr(diffusers, scheduler_class)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **arguments, **more
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    drawing = {"generator": generator} if name.endswith("_a") else {}
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        answer = denoiser(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(answer, t, x, **drawing).prev_sample
    return x


class Knowing:
    """A denoiser that knows the image."""

    def __init__(self, settings: EpsilonSettings) -> None:
        alphas = np.cumprod(1 - betas_of(NoiseSchedule(zero_terminal_snr=settings.zero_terminal_snr)).astype(float))
        self._says_velocity = settings.v_parameterization
        self._log_sigmas = 0.5 * np.log((1 - alphas) / alphas)

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        sigma = math.exp(np.interp(t, np.arange(1000), self._log_sigmas))
        signal, disorder = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        noise = (x - signal * IMAGE) / disorder
        return signal * noise - disorder * IMAGE if self._says_velocity else noise


def test_there_is_every_sampler_of_the_option() -> None:
    option = next(one for one in options_of(SampleOptions) if one.name == "sample_sampler")
    assert set(option.choices) == set(SAMPLERS)
    assert option.default == samplers.DEFAULT_SAMPLER
    for name in SAMPLERS:
        assert SAMPLERS[name] == SAMPLERS[name.removeprefix("k_")]
    assert torch.equal(sampled(EPS, None, 3), sampled(EPS, "ddim", 3))


@pytest.mark.parametrize(("velocity", "steps"), [(False, 7), (True, 4)])
@pytest.mark.parametrize("name", THEIRS)
def test_images_are_those_of_diffusers(name: str, velocity: bool, steps: int) -> None:
    expected = theirs(name, steps, prediction_type="v_prediction" if velocity else "epsilon")
    torch.testing.assert_close(sampled(V if velocity else EPS, name, steps), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++"])
def test_from_pure_noise_as_diffusers(name: str) -> None:
    more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    torch.testing.assert_close(sampled(ZERO, name, 8), theirs(name, 8, **more), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("settings", [EPS, V, ZERO, BLIND], ids=["eps", "v", "v-zero", "eps-zero"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_denoiser_that_knows_the_image_finds_it(name: str, settings: EpsilonSettings) -> None:
    found = sampled(settings, name, 16, predict=Knowing(settings))
    torch.testing.assert_close(found, IMAGE, rtol=0, atol=0.15 if name in LEAVES_NOISE else 2e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_one_step_begins_at_the_last_timestep(name: str) -> None:
    settings = ZERO if SAMPLERS[name].instead is None else EPS
    sampler = create(Epsilon(settings), name, steps=1, tokens=0, shift=False)
    assert sampler.timesteps == [999.0]
    found = sampled(settings, name, 1, predict=Knowing(settings))
    torch.testing.assert_close(found, IMAGE, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler"])
def test_a_thousand_steps_are_all_timesteps(name: str) -> None:
    sampler = create(Epsilon(EPS), name, steps=1000, tokens=0, shift=False)
    assert sorted(set(sampler.timesteps)) == list(range(1000))


def test_the_way_begins_where_the_training_ended() -> None:
    first = {
        label: create(Epsilon(settings), "euler", steps=25, tokens=0, shift=False).timesteps[0]
        for label, settings in {"zero": ZERO, "blind": BLIND}.items()
    }
    assert first["zero"] == 999
    assert first["blind"] < 970, "of pure noise nobody can tell the image from the noise"
    single = create(Epsilon(BLIND), "dpmsingle", steps=25, tokens=0, shift=False).timesteps[0]
    assert 900 < single < 970


def test_the_noise_levels_are_those_of_the_training() -> None:
    """But for a trace of the image in pure noise."""
    for zero in (False, True):
        levels = NoiseSchedule(zero_terminal_snr=zero)
        alphas = torch.cumprod(1 - torch.tensor(betas_of(levels)), 0)
        torch.testing.assert_close(alphas[:-1], levels.alphas[:-1], rtol=1e-5, atol=0)
        assert alphas[-1].item() == pytest.approx(LEAST_ALPHA if zero else levels.alphas[-1].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "instead"), [("heun", "euler"), ("dpm_2", "euler"), ("dpm_2_a", "euler_a"), ("pndm", "ddim")]
)
def test_what_cannot_begin_at_pure_noise_is_replaced_and_said_once(
    name: str, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    samplers._say_other.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sampled(ZERO, name, 4), sampled(ZERO, instead, 4))
        sampled(ZERO, name, 4)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"sampler {name} " in said[0]
    assert instead in said[0]


def test_an_unknown_sampler() -> None:
    with pytest.raises(UserError) as caught:
        create(Epsilon(EPS), "unipc", steps=4, tokens=0, shift=False)
    assert caught.value.code == "E-SAMPLER"
    assert "dpmsolver++" in caught.value.hint


def test_noise_on_the_way_comes_from_the_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    once, again = sampled(EPS, "euler_a", 4), sampled(EPS, "euler_a", 4)
    assert torch.equal(once, again)
    assert not torch.equal(once, sampled(EPS, "euler_a", 4, seed=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_exact_for_polynomials() -> None:
    nodes, end = [9.0, 10.5, 13.0, 17.0], 7.5
    for degree in range(4):
        slopes = [node**degree for node in nodes]
        exact = (end ** (degree + 1) - nodes[0] ** (degree + 1)) / (degree + 1)
        weights = multistep_weights(nodes, end)
        assert sum(weight * slope for weight, slope in zip(weights, slopes, strict=True)) == pytest.approx(exact)
    assert multistep_weights([4.0], 1.5) == [-2.5]


@pytest.mark.parametrize("settings", [EPS, V], ids=["eps", "v"])
def test_linear_multistep_finds_what_euler_finds_in_many_more_steps(settings: EpsilonSettings) -> None:
    exact = sampled(settings, "euler", 999)
    errors = {name: (sampled(settings, name, 60) - exact).abs().mean().item() for name in ("lms", "euler")}
    assert errors["lms"] < errors["euler"] / 4


def test_a_flow_takes_its_own_steps_whatever_the_name() -> None:
    """Bit for bit what was done before there were samplers."""
    flow = Flow(FlowSettings())
    levels = flow.schedule(6, 24, True).tolist()
    sampler = create(flow, "euler_a", steps=6, tokens=24, shift=True)
    assert sampler.timesteps == [level * 1000 for level in levels[:-1]]
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(SHAPE, generator=generator)
    expected, x = noise, sampler.begin(noise)
    for i, (level, below) in enumerate(pairwise(levels)):
        expected = flow.denoise(expected, denoiser(expected, level * 1000), level, below)
        x = sampler.step(denoiser(sampler.scale(x, i), sampler.timesteps[i]), i, x, generator)
    assert torch.equal(x, expected)
