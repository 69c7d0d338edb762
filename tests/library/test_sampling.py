"""The sampler, and the files it leaves."""

from datetime import datetime
from itertools import combinations, pairwise

import pytest
import torch
from PIL import Image

from library.epsilon import Epsilon, EpsilonSettings
from library.objectives import Flow, FlowSettings
from library.prompts import SampleRequest
from library.sampling import generate, image_metadata, overview, preview_name, save_png, to_image

REQUEST = SampleRequest(prompt="x", width=64, height=96, steps=4, seed=5)


def linear_predict(x, timesteps, cond, guidance):
    """A denoiser with an answer that depends on everything."""
    t = timesteps[:, None, None, None] / 1000
    return torch.tanh(x) * (0.5 + t) + cond["text"][:, :, None, None] * guidance[:, None, None, None]


def make(request=REQUEST, predict=linear_predict, text=0.1, negative=None, **more):
    return generate(
        request,
        predict=predict,
        objective=more.pop("objective", None) or Flow(FlowSettings()),
        cond={"text": torch.full((1, 16), text)},
        negative_cond=None if negative is None else {"text": torch.full((1, 16), negative)},
        latent_channels=16,
        stride=8,
        shift=more.pop("shift", True),
        device="cpu",
        **more,
    )


def test_size_and_type():
    latents = make()
    assert latents.shape == (1, 16, 12, 8)
    assert latents.dtype is torch.float32
    assert make(SampleRequest(prompt="x", width=70, height=20, steps=1)).shape == (1, 16, 8, 8)


def test_a_denoiser_that_knows_the_image_finds_it():
    image = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(REQUEST.seed))
    torch.testing.assert_close(make(predict=lambda x, t, c, g: noise - image), image, atol=1e-5, rtol=1e-5)


def test_the_trajectory_is_that_of_diffusers():
    scheduler_module = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    steps, seen = 6, []

    def predict(x, timesteps, cond, guidance):
        seen.append((x.clone(), timesteps.clone()))
        return linear_predict(x, timesteps, cond, guidance)

    request = SampleRequest(prompt="x", width=256, height=128, steps=steps, seed=11)
    latents = make(request, predict)
    scheduler = scheduler_module.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = (256 // 16) * (128 // 16)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    x = torch.randn(1, 16, 16, 32, generator=torch.Generator().manual_seed(11))
    cond, guidance = {"text": torch.full((1, 16), 0.1)}, torch.tensor([3.5])
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(seen[step][0], x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen[step][1], t[None], atol=1e-3, rtol=1e-5)
        x = scheduler.step(linear_predict(x, t[None], cond, guidance), t, x).prev_sample
    torch.testing.assert_close(latents, x, atol=1e-4, rtol=1e-4)


def test_shift_follows_the_family():
    assert not torch.equal(make(shift=True), make(shift=False))


def test_seeds_decide_and_global_randomness_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, again = make(), make()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, make(SampleRequest(prompt="x", width=64, height=96, steps=4, seed=6)))
    unseeded = SampleRequest(prompt="x", width=64, height=96, steps=4)
    assert not torch.equal(make(unseeded), make(unseeded))
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_by_a_negative_prompt():
    calls = []

    def predict(x, timesteps, cond, guidance):
        calls.append((len(x), len(timesteps), len(guidance), cond["text"][:, 0].tolist()))
        return linear_predict(x, timesteps, cond, guidance)

    request = SampleRequest(prompt="x", width=64, height=64, steps=1, seed=5, cfg=3.0, guidance=2.0)
    guided = make(request, predict, text=0.5, negative=0.25)
    assert calls == [(2, 2, 2, [0.25, 0.5])]
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    negative, positive = torch.tanh(noise) * 1.5 + 0.25 * 2, torch.tanh(noise) * 1.5 + 0.5 * 2
    torch.testing.assert_close(guided, noise - (negative + 3 * (positive - negative)))


def test_prompts_of_different_lengths_are_guided_one_after_the_other():
    def predict(x, timesteps, cond, guidance):
        assert len(x) == len(timesteps) == len(guidance) == 1
        return x * cond["text"].mean()

    def at(width, value):
        return {"text": torch.full((1, width), value)}

    request = SampleRequest(prompt="x", width=64, height=64, steps=1, seed=5, cfg=3.0)
    found = generate(
        request,
        predict=predict,
        objective=Flow(FlowSettings()),
        cond=at(5, 0.5),
        negative_cond=at(3, 0.25),
        latent_channels=16,
        stride=8,
        shift=True,
        device="cpu",
    )
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, noise - noise * (0.25 + 3 * 0.25))


def test_the_denoiser_is_told_the_wanted_size():
    seen = []

    def size_cond(original_sizes, crops, size):
        return {"sizes": torch.tensor([[*original_sizes[0], *crops[0], *size]])}

    def predict(x, timesteps, cond, guidance):
        seen.append(cond["sizes"].tolist())
        return x

    make(SampleRequest(prompt="x", width=77, height=100, steps=1, seed=5), predict, size_cond=size_cond, patch=1)
    wanted = [72, 96, 0, 0, 72, 96]
    assert seen == [[wanted]]
    guided = SampleRequest(prompt="x", width=72, height=96, steps=1, seed=5, cfg=2.0)
    make(guided, predict, negative=0.2, size_cond=size_cond, patch=1)
    assert seen[1:] == [[wanted, wanted]]


def test_stable_diffusion_is_sampled_as_the_request_says():
    def of(**more):
        return make(
            SampleRequest(prompt="x", width=64, height=64, steps=3, seed=5, **more),
            lambda x, t, c, g: torch.tanh(x),
            objective=Epsilon(EpsilonSettings()),
        )

    assert torch.equal(of(), of(sampler="ddim"))
    results = [of(sampler=name) for name in ("ddim", "euler", "euler_a")]
    assert not any(torch.equal(one, other) for one, other in combinations(results, 2))
    assert torch.equal(results[2], of(sampler="euler_a")), "the noise on the way is the seed's, too"


def test_flow_images_are_those_from_before_there_were_samplers():
    """Bit for bit."""
    flow, request = Flow(FlowSettings()), SampleRequest(prompt="x", width=64, height=96, steps=5, seed=5, cfg=2.0)
    x = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(5))
    cond = {"text": torch.cat([torch.full((1, 16), 0.3), torch.full((1, 16), 0.1)])}
    for t, t_next in pairwise(flow.schedule(5, 24, True).tolist()):
        answer = linear_predict(x.expand(2, -1, -1, -1), torch.full((2,), t * 1000), cond, torch.full((2,), 3.5))
        negative, positive = answer.chunk(2)
        x = flow.denoise(x, negative + 2.0 * (positive - negative), t, t_next)
    assert torch.equal(make(request, negative=0.3), x)


def test_embedded_guidance_reaches_the_model():
    quiet = SampleRequest(prompt="x", width=64, height=96, steps=4, seed=5, guidance=1.0)
    assert not torch.equal(make(quiet), make())


def test_progress_and_types():
    seen, types = [], set()

    def predict(x, timesteps, cond, guidance):
        types.add((x.dtype, timesteps.dtype))
        return x

    latents = make(predict=predict, dtype=torch.bfloat16, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert types == {(torch.bfloat16, torch.float32)}
    assert latents.dtype is torch.float32


def test_pictures():
    pixels = torch.zeros(3, 2, 4)
    pixels[0], pixels[1], pixels[2, 0, 0] = 1.5, -1.0, float("nan")
    image = to_image(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((0, 0)) == (255, 0, 128)
    assert to_image(pixels[None]).tobytes() == image.tobytes()


def test_png_carries_how_it_was_made(tmp_path):
    path = tmp_path / "サンプル" / "a.png"
    request = SampleRequest(prompt="кошка, 猫", seed=3, cfg=2.0, steps=4, width=64, height=96)
    save_png(Image.new("RGB", (4, 4)), path, image_metadata(request))
    with Image.open(path) as image:
        assert image.text == {
            "prompt": "кошка, 猫",
            "negative_prompt": "",
            "seed": "3",
            "steps": "4",
            "guidance": "3.5",
            "cfg": "2.0",
            "size": "64x96",
        }
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_preview_names():
    moment = datetime(2024, 10, 5, 1, 2, 3)
    seeded = SampleRequest(prompt="x", seed=42, index=3)
    assert preview_name(seeded, "mine", step=7, epoch=2, moment=moment) == "mine_e000002_03_20241005010203_42.png"
    assert preview_name(seeded, None, step=7, moment=moment) == "000007_03_20241005010203_42.png"
    unseeded = SampleRequest(prompt="x")
    assert preview_name(unseeded, "mine", step=7, moment=moment) == "mine_000007_00_20241005010203.png"


def test_overview(tmp_path):
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (10, 30), "blue")
    red.save(tmp_path / "red.png")
    sheet = overview(
        [[tmp_path / "red.png", None], [blue, blue]], ["step 10", "step 20"], ["a cat", "a dog " * 40], cell=64
    )
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == pytest.approx(64 * 32, rel=0.1)
    assert colours[(0, 0, 255)] == pytest.approx(2 * 21 * 64, rel=0.1)
    assert colours[(0, 0, 0)] > 0
    with pytest.raises(ValueError, match="argument"):
        overview([[None]], ["one", "two"], ["a"])
