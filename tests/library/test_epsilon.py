"""The objective of Stable Diffusion: schedule, noise, weights, losses and the way back, against given numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from library import epsilon
from library.epsilon import Epsilon, EpsilonSettings
from library.log import UserError
from library.noise_schedule import NoiseSchedule
from library.randomness import Draws

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def close(one: torch.Tensor, other: object, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(one, torch.tensor(other), rtol=rtol, atol=atol)


# the schedule


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_the_given_one(zero: bool):
    wanted, prefix = golden("sd_noise_schedule"), "ztsnr_" if zero else ""
    schedule = NoiseSchedule(zero_terminal_snr=zero)
    close(schedule.betas, wanted[f"{prefix}betas"], atol=1e-6)
    close(schedule.alphas, wanted[f"{prefix}alphas_cumprod"], rtol=1e-4, atol=1e-7)
    close(schedule.snr[:-1], wanted[f"{prefix}snr"][:-1], rtol=1e-3, atol=1e-6)
    assert (float(schedule.snr[-1]) == 0) == zero


def test_the_schedule_is_that_of_diffusers():
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(NoiseSchedule().alphas, theirs.alphas_cumprod, rtol=1e-6, atol=0)
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    torch.testing.assert_close(
        NoiseSchedule(zero_terminal_snr=True).alphas, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7
    )


# the task


def test_a_task_follows_the_formulas():
    latents, draws = torch.randn(3, 4, 8, 8), Draws([1, 2, 3])
    for v in (False, True):
        objective = Epsilon(EpsilonSettings(v_parameterization=v))
        task = objective.noise(latents, draws)
        noise = draws.normal((4, 8, 8))
        alpha = objective.levels.alphas[task.timesteps.long()].view(-1, 1, 1, 1)
        assert torch.equal(task.timesteps, task.timesteps.floor())
        torch.testing.assert_close(task.input, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        torch.testing.assert_close(task.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents if v else noise)


def test_timesteps_are_uniform_in_their_range():
    objective = Epsilon(EpsilonSettings(min_timestep=100, max_timestep=110))
    drawn = objective.sigmas(Draws(range(4000)), 16) * 1000
    counts = torch.bincount(drawn.round().long() - 100, minlength=10)
    assert len(counts) == 10
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(400)
    assert objective.even_sigmas(4) == [0.102, 0.104, 0.106, 0.108]
    assert objective.density() == "uniform timesteps, min_timestep 100, max_timestep 110"


def test_numbers_of_a_sample_do_not_depend_on_its_batch():
    settings = EpsilonSettings(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.05,
        multires_noise_iterations=4,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    latents, objective = torch.randn(3, 4, 8, 12), Epsilon(settings)
    together = objective.noise(latents, Draws([1, 2, 3]))
    alone = objective.noise(latents[1:2], Draws([2]))
    for name in ("input", "target", "timesteps", "weight"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))


# noise


@pytest.mark.parametrize(("offset", "adaptive"), [(0.1, None), (0.05, 0.03), (0.05, -0.5)])
def test_an_offset_is_the_given_one(offset: float, adaptive: float | None):
    wanted = golden("noise")
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8)
    torch.manual_seed(1)
    noise = torch.randn(2, 4, 8, 8)
    torch.manual_seed(2)
    shift = torch.randn(2, 4, 1, 1)
    got = epsilon.with_offset(noise, latents, shift, offset, adaptive) - noise
    key = f"noise_offset={offset},adaptive={adaptive}, seed 2, out minus noise at [:,:,0,0]"
    close(got[:, :, 0, 0], wanted[key], atol=2e-6)


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (4, 0.3), (8, 0.8)])
def test_levels_of_noise_are_the_given_ones(iterations: int, discount: float):
    """The given numbers are divided by the deviation of the whole batch; ours by that of each sample."""
    wanted = golden("noise")[f"multires iterations={iterations},discount={discount}, seed 3"]
    torch.manual_seed(1)
    noise = torch.randn(2, 4, 8, 8)
    torch.manual_seed(3)
    random.seed(3)
    factors = [random.random() * 2 + 2 for _ in range(iterations)]
    sizes = epsilon.level_sizes(8, 8, factors)
    levels = [torch.randn(2, 4, *size) for size in sizes]
    summed = [epsilon.pyramid(noise[row], [level[row] for level in levels], discount) for row in range(2)]
    plain = [_undivided(noise[row], [level[row] for level in levels], discount) for row in range(2)]
    for mine, sum_ in zip(summed, plain, strict=True):
        torch.testing.assert_close(mine, sum_ / sum_.std())
    whole = torch.stack(plain)
    close((whole / whole.std())[0, 0, 0], wanted["first_row[0,0,0,:]"], rtol=1e-4, atol=1e-5)
    close((whole / whole.std())[1, 3, 7], wanted["last_row[1,3,7,:]"], rtol=1e-4, atol=1e-5)


def _undivided(noise: torch.Tensor, levels: list[torch.Tensor], discount: float) -> torch.Tensor:
    """The direction of the sum is known from the function under test; its length is found from one element."""
    unit = epsilon.pyramid(noise, levels, discount)
    flat = torch.nn.functional.interpolate
    total = noise + sum(
        discount**n * flat(level[None], noise.shape[-2:], mode="bilinear")[0] for n, level in enumerate(levels)
    )
    torch.testing.assert_close(unit * total.std(), total)
    return total


def test_the_options_change_the_noise_that_is_learned():
    latents, draws = torch.randn(2, 4, 16, 16), Draws([5, 6])
    plain = Epsilon(EpsilonSettings()).noise(latents, draws)
    for given in ({"noise_offset": 0.1}, {"multires_noise_iterations": 3}):
        changed = Epsilon(EpsilonSettings(**given)).noise(latents, draws)
        assert not torch.equal(changed.target, plain.target)
        assert not torch.equal(changed.input, plain.input)
    perturbed = Epsilon(EpsilonSettings(ip_noise_gamma=0.1)).noise(latents, draws)
    assert torch.equal(perturbed.target, plain.target)
    assert not torch.equal(perturbed.input, plain.input)
    assert torch.equal(
        Epsilon(EpsilonSettings(noise_offset=0.1)).noise_at(latents, torch.tensor([0.5, 0.5]), draws).target,
        plain.target,
    )


# weights and losses


def weight(timesteps: object, **given: object) -> torch.Tensor:
    settings = EpsilonSettings(**given)
    schedule = NoiseSchedule(zero_terminal_snr=settings.zero_terminal_snr)
    return epsilon.loss_weight(settings, schedule.snr[torch.as_tensor(timesteps)])


def test_min_snr_is_the_given_one():
    wanted = golden("min_snr")
    steps = wanted["timesteps"]
    for gamma in (1.0, 3.0, 5.0, 10.0, 20.0):
        for v, name in ((False, "eps"), (True, "v")):
            close(
                weight(steps, min_snr_gamma=gamma, v_parameterization=v),
                wanted[f"min_snr,gamma={gamma},{name}"],
                rtol=1e-4,
            )
    like_noise = weight(steps, scale_v_pred_loss_like_noise_pred=True, v_parameterization=True)
    close(like_noise, wanted["scale_v_pred_loss_like_noise_pred"], rtol=1e-5)


def test_all_weights_multiply_and_stay_finite_without_any_signal():
    """At the last timestep of a zero-terminal schedule the ratio is 0 (needs A10)."""
    last = torch.tensor([999])
    for given, wanted in (
        ({"min_snr_gamma": 5.0}, 1.0),
        ({"min_snr_gamma": 5.0, "v_parameterization": True}, 0.0),
        ({"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True}, 0.0),
        ({"debiased_estimation_loss": True}, 100.0),
        ({"v_pred_like_loss": 0.5}, 1 + 0.5 * (1 + 1e4)),
        ({}, 1.0),
    ):
        close(weight(last, zero_terminal_snr=True, **given), [wanted], rtol=1e-3, atol=1e-9)
    both = weight([500], min_snr_gamma=1.0, debiased_estimation_loss=True)
    close(both, (weight([500], min_snr_gamma=1.0) * weight([500], debiased_estimation_loss=True)).tolist())


def test_v_like_loss_adds_its_share():
    snr = NoiseSchedule().snr[300]
    close(weight([300], v_pred_like_loss=0.25), [float(1 + 0.25 * (snr + 1) / snr)], rtol=1e-5)


def test_thresholds_are_the_given_ones():
    wanted = golden("huber")
    steps = torch.tensor(wanted["timesteps"], dtype=torch.float32)
    for schedule in ("exponential", "snr", "constant"):
        for c in (0.05, 0.1, 0.3):
            objective = Epsilon(EpsilonSettings(loss_type="huber", huber_schedule=schedule, huber_c=c))
            close(objective.huber_threshold(steps), wanted[f"c,{schedule},huber_c={c}"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_a_perfect_answer_has_no_loss_and_a_worse_one_more(kind: str):
    objective = Epsilon(EpsilonSettings(loss_type=kind))
    task = objective.noise(torch.randn(2, 4, 8, 8), Draws([1, 2]))
    losses = [objective.loss(task.target + shift, task) for shift in (0.0, 0.5, 1.0)]
    assert torch.allclose(losses[0], torch.zeros(2), atol=1e-6)
    assert (losses[0] < losses[1]).all()
    assert (losses[1] < losses[2]).all()
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    assert torch.allclose(objective.loss(task.target + 1, task, mask), losses[2] / 2)


# the way back


@pytest.mark.parametrize(("v", "zero"), [(False, False), (True, False), (True, True)])
def test_steps_back_are_those_of_diffusers(v: bool, zero: bool):
    objective = Epsilon(EpsilonSettings(v_parameterization=v, zero_terminal_snr=zero))
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction" if v else "epsilon",
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(10)
    levels = objective.schedule(10, 64, shift=False)
    assert torch.equal((levels[:-1] * 1000).round().long(), theirs.timesteps)
    x, answers = torch.randn(1, 4, 8, 8), torch.randn(10, 1, 4, 8, 8)
    mine, other = x, x
    for place, answer in enumerate(answers):
        mine = objective.denoise(mine, answer, float(levels[place]), float(levels[place + 1]))
        other = theirs.step(answer, theirs.timesteps[place], other).prev_sample
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("v", [False, True])
def test_a_perfect_denoiser_gives_the_image_back(v: bool):
    objective = Epsilon(EpsilonSettings(v_parameterization=v, zero_terminal_snr=v))
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    levels = objective.schedule(7, 64, shift=False)
    first = NoiseSchedule(zero_terminal_snr=v).alphas[999]
    x = first.sqrt() * clean + (1 - first).sqrt() * noise
    for t, t_next in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        alpha = objective.levels.alphas[round(t * 1000)]
        answer = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if v else noise
        x = objective.denoise(x, answer, t, t_next)
    torch.testing.assert_close(x, clean, rtol=1e-3, atol=1e-3)


# what can't be


@pytest.mark.parametrize(
    "given",
    [
        {"min_timestep": 500, "max_timestep": 500},
        {"max_timestep": 1001},
        {"adaptive_noise_scale": 0.1},
        {"scale_v_pred_loss_like_noise_pred": True},
        {"v_pred_like_loss": 0.5, "v_parameterization": True},
    ],
)
def test_contradictions_are_one_line(given: dict):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        Epsilon(EpsilonSettings(**given))
