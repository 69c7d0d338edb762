"""Rectified flow, against reference numbers and against what its formulas imply."""

import json
import math
from pathlib import Path

import pytest
import torch

from library.log import UserError
from library.objectives import Flow, FlowSettings, huber_threshold, loss_weight, resolution_mu
from library.randomness import Draws, Stream, mix

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


class FixedDraws(Draws):
    """Scalars are those given; tensors are drawn as usual."""

    def __init__(self, uniform=(), normal=()):
        super().__init__(range(max(len(uniform), len(normal))))
        self.uniform, self.normal_numbers = uniform, normal

    def uniform_scalars(self, stream=Stream.TIMESTEP):
        return torch.tensor(self.uniform)

    def normal_scalars(self, stream=Stream.TIMESTEP):
        return torch.tensor(self.normal_numbers)


def assert_close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def timesteps():
    return golden("flux_timesteps")


@pytest.fixture
def draws(timesteps):
    return FixedDraws(timesteps["uniform_draws"], timesteps["normal_draws"])


def named(text):
    """`a=1.0,b=x` as a dict."""
    return dict(item.split("=") for item in text.split(","))


def test_uniform_sampling(timesteps, draws):
    flow = Flow(FlowSettings(timestep_sampling="uniform"))
    assert_close(flow.sigmas(draws, 256), timesteps["uniform"]["sigma"])


def test_sigmoid_and_shift_sampling(timesteps, draws):
    for sampling in ("sigmoid", "shift"):
        for key, expected in timesteps[sampling].items():
            values = named(key)
            settings = FlowSettings(
                timestep_sampling=sampling,
                sigmoid_scale=float(values["scale"]),
                discrete_flow_shift=float(values.get("discrete_flow_shift", 3)),
            )
            assert_close(Flow(settings).sigmas(draws, 256), expected)


def test_flux_shift_sampling(timesteps, draws):
    for key, expected in timesteps["flux_shift"].items():
        values = named(key)
        width, height = map(int, values["image"].split("x"))
        flow = Flow(FlowSettings(timestep_sampling="flux_shift", sigmoid_scale=float(values["scale"])))
        tokens = (height // 16) * (width // 16)
        assert tokens == expected["tokens"]
        assert resolution_mu(tokens) == pytest.approx(expected["mu"])
        assert_close(flow.sigmas(draws, tokens), expected["sigma"])


def test_sigma_sampling_looks_into_the_table(timesteps, draws):
    for key, expected in timesteps["sigma"].items():
        if key == "_note":
            continue
        values = named(key)
        settings = FlowSettings(
            discrete_flow_shift=float(values["discrete_flow_shift"]),
            weighting_scheme=values["weighting_scheme"],
            logit_mean=float(values.get("mean", 0)),
            logit_std=float(values.get("std", 1)),
            mode_scale=float(values.get("mode_scale", 1.29)),
        )
        assert_close(Flow(settings).sigmas(draws, 256), expected["sigma"])


def test_the_table(timesteps):
    for key, expected in timesteps["scheduler_table"].items():
        flow = Flow(FlowSettings(discrete_flow_shift=float(named(key)["shift"])))
        middles = [(index + 0.5) / 1000 for index in expected["index"]]
        assert_close(flow.sigmas(FixedDraws(uniform=middles), 256), expected["sigma"])


def test_density_one_is_the_last_entry_of_the_table():
    flow = Flow(FlowSettings(weighting_scheme="mode", discrete_flow_shift=1.0))
    assert_close(flow.sigmas(FixedDraws(uniform=[0.0]), 256), [0.001])


def test_densities():
    numbers = golden("sd3_weighting")["density"]
    draws = FixedDraws(numbers["uniform_draws"], numbers["normal_draws"])
    for key, expected in numbers.items():
        scheme, *rest = key.split(",")
        if scheme not in ("logit_normal", "mode"):
            continue
        values = named(",".join(rest))
        settings = FlowSettings(
            weighting_scheme=scheme,
            discrete_flow_shift=1.0,
            logit_mean=float(values.get("mean", 0)),
            logit_std=float(values.get("std", 1)),
            mode_scale=float(values.get("scale", 1.29)),
        )
        assert (Flow(settings).sigmas(draws, 256) - (1 - torch.tensor(expected))).abs().max() < 1.01e-3


def test_loss_weights():
    numbers = golden("sd3_weighting")
    for scheme, expected in numbers["weights"].items():
        assert_close(loss_weight(scheme, torch.tensor(numbers["sigma"])), expected, 1e-5)


def test_loss_weights_are_finite_at_every_level():
    for scheme in ("sigma_sqrt", "cosmap", "none"):
        assert torch.isfinite(loss_weight(scheme, torch.tensor([0.0, 1.0]))).all()


def test_huber_thresholds():
    numbers = golden("huber")
    t = torch.tensor(numbers["timesteps"], dtype=torch.float32)
    for schedule in ("exponential", "constant"):
        for c in (0.05, 0.1, 0.3):
            expected = torch.tensor(numbers[f"c,{schedule},huber_c={c}"])
            settings = FlowSettings(huber_schedule=schedule, huber_c=c)
            torch.testing.assert_close(huber_threshold(settings, t), expected, atol=1e-6, rtol=1e-6)
            doubled = FlowSettings(huber_schedule=schedule, huber_c=c, huber_scale=2)
            torch.testing.assert_close(huber_threshold(doubled, t), 2 * expected, atol=2e-6, rtol=1e-6)


def noised_of(settings, batch=3, seed=0):
    """A flow, latents with noise, and the velocity."""
    flow = Flow(settings)
    draws = Draws([mix(seed, index) for index in range(batch)])
    latents = torch.randn(batch, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    return flow, flow.noise(latents, draws), draws.normal((16, 4, 6)) - latents


def test_loss_types():
    numbers = golden("huber")
    difference = torch.tensor(numbers["diff"])
    for key, expected in numbers.items():
        if not key.startswith("loss,"):
            continue
        _, loss_type, *c = key.split(",")
        settings = FlowSettings(
            timestep_sampling="uniform",
            model_prediction_type="raw",
            loss_type=loss_type,
            huber_schedule="constant",
            huber_c=float(c[0].removeprefix("c=")) if c else 0.1,
        )
        flow, noised, velocity = noised_of(settings, batch=len(difference))
        losses = flow.loss(velocity + difference[:, None, None, None], noised)
        torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_noise_is_a_straight_way_from_image_to_noise():
    _, noised, velocity = noised_of(FlowSettings(timestep_sampling="uniform", model_prediction_type="raw"))
    sigma = noised.timesteps[:, None, None, None] / 1000
    torch.testing.assert_close(noised.input, noised.latents + sigma * velocity)
    torch.testing.assert_close(noised.target, velocity)
    assert noised.weight.tolist() == [1, 1, 1]


def test_one_euler_step_with_the_true_velocity_gives_the_latents_back():
    flow, noised, velocity = noised_of(FlowSettings(timestep_sampling="uniform"), batch=1)
    t = noised.timesteps.item() / 1000
    torch.testing.assert_close(flow.denoise(noised.input, velocity, t, 0.0), noised.latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["raw", "sigma_scaled"])
def test_the_true_velocity_has_no_loss(kind):
    flow, noised, velocity = noised_of(FlowSettings(model_prediction_type=kind, timestep_sampling="shift"))
    assert flow.loss(velocity, noised).max() < 1e-9


def test_sigma_scaled_with_sigma_sqrt_is_the_raw_loss():
    raw_flow, raw, velocity = noised_of(FlowSettings(model_prediction_type="raw", timestep_sampling="shift"))
    flow, noised, _ = noised_of(FlowSettings(weighting_scheme="sigma_sqrt", timestep_sampling="shift"))
    prediction = velocity + torch.randn(velocity.shape, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(flow.loss(prediction, noised), raw_flow.loss(prediction, raw), atol=1e-4, rtol=1e-4)


def test_weighting_counts_only_with_sigma_scaled():
    for kind, weighted in (("raw", False), ("additive", False), ("sigma_scaled", True)):
        settings = FlowSettings(model_prediction_type=kind, weighting_scheme="cosmap", timestep_sampling="uniform")
        assert (noised_of(settings)[1].weight.tolist() != [1, 1, 1]) is weighted


def test_additive_adds_the_noisy_latents():
    flow, noised, velocity = noised_of(FlowSettings(model_prediction_type="additive"))
    assert flow.loss(velocity - noised.input, noised).max() < 1e-9


def test_half_precision_latents_stay_half_and_losses_are_float32():
    flow = Flow(FlowSettings(model_prediction_type="raw", timestep_sampling="uniform"))
    noised = flow.noise(torch.ones(2, 16, 4, 4, dtype=torch.bfloat16), Draws([1, 2]))
    assert noised.input.dtype is torch.bfloat16
    assert noised.timesteps.dtype is noised.weight.dtype is torch.float32
    assert flow.loss(torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16), noised).dtype is torch.float32


def test_masked_pixels_get_no_gradient_and_the_mean_is_over_all():
    flow, noised, velocity = noised_of(FlowSettings(model_prediction_type="raw"), batch=2)
    prediction = (velocity + 1).requires_grad_()
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2] = 1
    losses = flow.loss(prediction, noised, mask)
    torch.testing.assert_close(losses, torch.tensor([0.5, 0.5]))
    losses.sum().backward()
    assert prediction.grad[:, :, 2:].abs().max() == 0
    assert prediction.grad[:, :, :2].abs().min() > 0


def test_timestep_range():
    settings = FlowSettings(timestep_sampling="uniform", min_timestep=200, max_timestep=600)
    sigma = Flow(settings).sigmas(Draws([mix(0, index) for index in range(500)]), 256)
    assert sigma.min() >= 0.2
    assert sigma.max() < 0.6
    assert abs(sigma.mean() - 0.4) < 0.02


def test_input_perturbation_changes_the_input_but_not_the_target():
    plain = FlowSettings(timestep_sampling="uniform", model_prediction_type="raw")
    perturbed = FlowSettings(timestep_sampling="uniform", model_prediction_type="raw", ip_noise_gamma=0.5)
    _, one, _ = noised_of(plain)
    _, other, _ = noised_of(perturbed)
    torch.testing.assert_close(one.target, other.target)
    extra = (other.input - one.input) / (one.timesteps[:, None, None, None] / 1000)
    assert abs(extra.std() - 0.5) < 0.05
    random = FlowSettings(
        timestep_sampling="uniform",
        model_prediction_type="raw",
        ip_noise_gamma=0.5,
        ip_noise_gamma_random_strength=True,
    )
    weaker = (noised_of(random)[1].input - one.input) / (one.timesteps[:, None, None, None] / 1000)
    assert (weaker.flatten(1).std(1) < extra.flatten(1).std(1)).all()


def test_schedules():
    numbers = golden("flux_schedule")
    flow = Flow(FlowSettings())
    for kind, shift in (("shift", True), ("no_shift", False)):
        for key, expected in numbers[kind].items():
            values = named(key)
            assert_close(flow.schedule(int(values["steps"]), int(values["tokens"]), shift), expected, 1e-6)
    for tokens, mu in numbers["mu"].items():
        assert resolution_mu(int(tokens)) == pytest.approx(mu)


def test_schedules_with_a_fixed_shift():
    numbers = golden("sd3_weighting")["sampling"]
    flow = Flow(FlowSettings(sampling_shift=3.0))
    found = [key for key in numbers if key.startswith("steps=")]
    assert len(found) == 7
    for key in found:
        levels = flow.schedule(int(named(key)["steps"]), 256, False)
        assert_close(levels, numbers[key], 1e-6)
        assert levels.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"loss_type": "huber"}, "exponential or constant"),
        ({"loss_type": "smooth_l1"}, "exponential or constant"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ({"max_timestep": 1001}, "--max_timestep"),
        ({"timestep_sampling": "sigmiod"}, "sigmoid"),
        ({"weighting_scheme": "x"}, "cosmap"),
    ],
)
def test_what_cannot_be_is_refused(changes, word):
    with pytest.raises(UserError, match=word):
        Flow(FlowSettings(**changes))


def test_noise_does_not_depend_on_the_batch():
    flow = Flow(FlowSettings(timestep_sampling="flux_shift"))
    latents = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    together = flow.noise(latents, Draws([1, 2, 3]))
    alone = flow.noise(latents[1:2], Draws([2]))
    assert torch.equal(together.input[1:2], alone.input)
    assert together.timesteps[1] == alone.timesteps[0]
    assert not math.isclose(together.timesteps[0], together.timesteps[1])
