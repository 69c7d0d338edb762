"""SD3 as a family: what is learned, what texts and positions become, and what a cache depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library import caching, placing
from library.assembly import Precision
from library.families.sd3 import Sd3, Sd3Settings, flow_settings
from library.families.sd3_files import Sd3Model
from library.log import UserError
from library.models.sd3_text import CLIP_TOKENS, context, joint_clip
from library.objectives import Flow
from library.option_groups import CACHE_TEXT_ENCODER_OUTPUTS, SD3_TRAIN_NETWORK
from library.options import Options, parse
from library.randomness import Draws, Stream
from library.types import Size, errors
from tests import tiny_sd3
from tests.tiny_sd3 import Variant

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "sd3_weighting.json").read_text("utf-8"))
CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a very long story of a dog " * 3, ""]
WIDTHS = {"clip_l": slice(0, tiny_sd3.L_WIDTH), "clip_g": slice(tiny_sd3.L_WIDTH, None)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd3")
    return {
        **tiny_sd3.write_all(folder),
        "sd3.5": tiny_sd3.write_single(folder / "large.safetensors", "5-medium"),
        "without t5": tiny_sd3.write_single(folder / "few.safetensors", parts=("vae", "clip_l", "clip_g")),
    }


def family(files: dict[str, Path], model: str = "sd3", separate: Any = None, **settings: Any) -> Sd3:
    """Untrained, at 12 tokens of T5."""
    return Sd3(
        Sd3Model(str(files[model]), separate or {}),
        str(files["tokenizers"]),
        Sd3Settings(**{"t5_length": 12, **settings}),
    )


def options_of(files: dict[str, Path], *more: str, script: Any = SD3_TRAIN_NETWORK) -> Options:
    given = ("--pretrained_model_name_or_path", str(files["sd3"]), "--tokenizer_cache_dir", str(files["tokenizers"]))
    network = ("--network_module", "networks.lora_sd3") if script is SD3_TRAIN_NETWORK else ()
    return parse(script, [*given, *network, *more])


def flow_of(files: dict[str, Path], *more: str) -> Flow:
    return Sd3.from_options(options_of(files, *more)).objective()


class FixedDraws(Draws):
    """Scalars are those given."""

    def __init__(self, uniform: Sequence[float] = (), normal: Sequence[float] = ()) -> None:
        super().__init__(range(max(len(uniform), len(normal))))
        self.uniform, self.gaussian = uniform, normal

    def uniform_scalars(self, stream: int = Stream.TIMESTEP) -> Tensor:
        return torch.tensor(self.uniform)

    def normal_scalars(self, stream: int = Stream.TIMESTEP) -> Tensor:
        return torch.tensor(self.gaussian)


# what is learned


def densities() -> Iterator[Any]:
    """Options and golden levels of each density."""
    for key, expected in GOLDEN["density"].items():
        scheme, *rest = key.split(",")
        names = {"mean": "logit_mean", "std": "logit_std", "scale": "mode_scale"}
        values = [item.split("=") for item in rest]
        if values:
            more = [word for name, value in values for word in (f"--{names[name]}={value}",)]
            yield pytest.param(("--weighting_scheme", scheme, *more), expected, id=key)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("more", "expected"), densities())
def test_levels_have_the_density_of_the_reference(
    files: dict[str, Path], more: tuple[str, ...], expected: list[float], shift: float
) -> None:
    """They are whole timesteps: what the reference draws, shifted, cut down to one."""
    draws = FixedDraws(GOLDEN["density"]["uniform_draws"], GOLDEN["density"]["normal_draws"])
    found = flow_of(files, *more, f"--training_shift={shift}").sigmas(draws, 64) * 1000
    u = torch.tensor(expected, dtype=torch.float64)
    shifted = 1000 * shift * u / (1 + (shift - 1) * u)
    assert torch.equal(found.round(), found.round().clamp(1, 1000))
    assert (found - found.round()).abs().max() < 1e-3
    assert (found.double() <= shifted.clamp(min=1) + 1e-3).all()
    assert (found.double() > shifted - 1 - 1e-3).all()


@pytest.mark.parametrize("scheme", ["uniform", "none", "sigma_sqrt", "cosmap"])
def test_the_other_schemes_draw_evenly(files: dict[str, Path], scheme: str) -> None:
    flow = flow_of(files, "--weighting_scheme", scheme)
    found = flow.sigmas(FixedDraws([0.0, 0.0004, 0.0015, 0.5, 0.9999]), 64) * 1000
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1.0, 500.0, 999.0]))


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (0, 1), (200, 600), (999, 1000)])
@pytest.mark.parametrize("scheme", ["logit_normal", "uniform"])
def test_timesteps_are_whole_and_in_their_range(files: dict[str, Path], low: int, high: int, scheme: str) -> None:
    flow = flow_of(files, "--weighting_scheme", scheme, "--min_timestep", str(low), "--max_timestep", str(high))
    found = flow.sigmas(Draws(range(500)), 64) * 1000
    assert (found - found.round()).abs().max() < 1e-3
    assert found.min() >= max(low, 1) - 1e-3
    assert found.max() <= high
    if high - low > 100:
        assert found.max() - found.min() > (high - low) / 2


@pytest.mark.parametrize("scale", ["-9", "20"])
def test_levels_stay_levels_whatever_the_scale_of_mode(files: dict[str, Path], scale: str) -> None:
    flow = flow_of(files, "--weighting_scheme", "mode", f"--mode_scale={scale}", "--training_shift", "3")
    found = flow.sigmas(FixedDraws([number / 100 for number in range(100)]), 64)
    assert found.min() >= 0.001
    assert found.max() <= 1


@pytest.mark.parametrize("scheme", GOLDEN["weights"])
def test_losses_weigh_as_in_the_reference(files: dict[str, Path], scheme: str) -> None:
    """The loss is that of the clean latents, estimated as noisy - sigma x velocity."""
    flow = flow_of(files, "--weighting_scheme", scheme)
    sigma = torch.tensor(GOLDEN["sigma"])
    draws = Draws(range(len(sigma)))
    latents = Draws(range(50, 50 + len(sigma))).normal((16, 4, 4))
    noised = flow.noise_at(latents, sigma, draws)
    torch.testing.assert_close(noised.timesteps, 1000 * sigma)
    velocity = draws.normal((16, 4, 4), Stream.PERTURBATION)
    level = sigma[:, None, None, None]
    noisy = (1 - level) * latents + level * draws.normal((16, 4, 4))
    off = (noisy - level * velocity - latents) ** 2
    expected = off.mean(dim=(1, 2, 3)) * torch.tensor(GOLDEN["weights"][scheme])
    torch.testing.assert_close(flow.loss(velocity, noised), expected, rtol=1e-4, atol=1e-5)
    perfect = draws.normal((16, 4, 4)) - latents
    assert flow.loss(perfect, noised).max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_samples_follow_the_schedule_of_the_reference(steps: int) -> None:
    found = Flow(flow_settings(None)).schedule(steps, 1024, shift=False)
    torch.testing.assert_close(found, torch.tensor(GOLDEN["sampling"][f"steps={steps}"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [("--loss_type", "huber"), ("--loss_type", "smooth_l1"), ("--min_timestep", "9", "--max_timestep", "9")],
    ids=" ".join,
)
def test_what_a_flow_cannot_follow_is_found_before_the_training(files: dict[str, Path], more: tuple[str, ...]) -> None:
    found = Sd3.from_options(options_of(files, *more, "--huber_schedule", "snr"))
    assert len(errors(found.findings())) == 1
    with pytest.raises(UserError):
        found.objective()


# latents


def test_latents_are_shifted_and_scaled_for_the_transformer_only(files: dict[str, Path]) -> None:
    sd3 = family(files)
    vae = sd3.load_vae(CPU, torch.float32)
    pixels = Draws([1]).normal((3, 32, 32)).clamp(-1, 1)
    with torch.no_grad():
        posterior = sd3.encode_images(vae, pixels)
        assert posterior.mean.shape == (1, 16, 4, 4)
        seen = sd3.traits.for_denoiser(posterior.mean)
        torch.testing.assert_close(seen, (posterior.mean - 0.0609) * 1.5305)
        torch.testing.assert_close(sd3.traits.from_denoiser(seen), posterior.mean)
        decoded: Any = vae
        torch.testing.assert_close(sd3.decode_latents(vae, seen), decoded.decode(posterior.mean).sample)


# texts


def said(sd3: Sd3, captions: Sequence[str] = CAPTIONS) -> dict[str, Tensor]:
    sd3.load_tokenizers()
    encoders = sd3.load_encoders(sd3.encoder_names, CPU, torch.float32)
    with torch.no_grad():
        return sd3.encode_text(encoders, sd3.tokenize(captions))


def test_padding_is_hidden_from_the_encoders_that_are_told_to(files: dict[str, Path]) -> None:
    """Tokens of the text attend to the same as without padding; what pads differs, and so does nothing of the other."""
    plain, clip, t5 = (said(family(files, apply_lg_mask=lg, apply_t5_mask=t5)) for lg, t5 in ((0, 0), (1, 0), (0, 1)))
    length = int(plain["t5_attn_mask"][0].sum())
    assert 0 < length < 12
    short = said(family(files, t5_length=length), CAPTIONS[:1])
    torch.testing.assert_close(t5["t5_out"][0, :length], short["t5_out"][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain["t5_out"][0, :length], short["t5_out"][0], atol=1e-3)
    end = int(plain["clip_l_attn_mask"][0].sum())
    torch.testing.assert_close(clip["lg_out"][0, :end], plain["lg_out"][0, :end], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(clip["lg_out"][0, end + 1 :], plain["lg_out"][0, end + 1 :], atol=1e-3)
    assert torch.equal(clip["t5_out"], plain["t5_out"])
    assert torch.equal(t5["lg_out"], plain["lg_out"])
    for cond, masks in ((plain, (0, 0)), (clip, (1, 0)), (t5, (0, 1))):
        flags = ("apply_lg_attn_mask", "apply_t5_attn_mask")
        assert tuple(int(cond[name].float().mean()) for name in flags) == masks


def test_masks_reach_up_to_the_end_mark(files: dict[str, Path]) -> None:
    sd3 = family(files)
    tokens = sd3.tokenize(["a cat", ""])
    counts = sd3.count_tokens(["a cat", ""])
    for name in ("clip_l", "clip_g"):
        assert tokens[f"{name}_attn_mask"].sum(dim=1).tolist() == counts[name]
    assert tokens["t5_attn_mask"].sum(dim=1).tolist() == counts["t5xxl"]
    assert tokens["clip_g"][1, -1] == 0
    assert tokens["clip_l"][1, -1] == tokens["clip_l"][1, 1]


def test_without_t5_its_part_is_empty(files: dict[str, Path]) -> None:
    sd3 = family(files, "without t5")
    cond = said(sd3)
    assert not any("t5" in name for name in cond)
    shown = context(cond["lg_out"], cond.get("t5_out"), tiny_sd3.CONTEXT_WIDTH)
    assert shown.shape[1] == 2 * CLIP_TOKENS
    assert not shown[:, CLIP_TOKENS:].any()
    findings = sd3.findings()
    assert not errors(findings)
    assert [finding.where for finding in findings] == ["--t5xxl"]


DROPS = {"clip_l": "clip_l_attn_mask", "clip_g": "clip_g_attn_mask", "t5xxl": "t5_attn_mask"}


@pytest.mark.parametrize("dropped", DROPS)
@pytest.mark.parametrize("model", ["sd3", "without t5"])
def test_dropped_encoders_leave_zeros_at_their_rate(files: dict[str, Path], model: str, dropped: str) -> None:
    """Each sample by itself, as often as wanted; cached (both CLIPs together) and live (each alone)."""
    sd3, many = family(files, model, dropout={dropped: 0.3}), 2000
    cond = {name: array[:1].expand(many, *array.shape[1:]) for name, array in said(family(files, model)).items()}
    small = {name: array[..., :3, :] if array.dim() == 3 else array for name, array in cond.items()}
    found = sd3.vary(small, Size(64, 64), Draws(range(many)))
    lost = (found["lg_pooled"] == 0).all(dim=1)
    if dropped in WIDTHS:
        for name in ("lg_out", "lg_pooled"):
            gone = (found[name][..., WIDTHS[dropped]] == 0).flatten(1).all(dim=1)
            assert 0.26 < gone.float().mean() < 0.34
            other = WIDTHS["clip_g" if dropped == "clip_l" else "clip_l"]
            assert torch.equal(found[name][..., other], small[name][..., other])
            assert torch.equal(found[name][~gone], small[name][~gone])
            assert torch.equal((found[DROPS[dropped]] == 0).all(dim=1), gone)
    elif model == "sd3":
        gone = (found["t5_out"] == 0).flatten(1).all(dim=1)
        assert 0.26 < gone.float().mean() < 0.34
        assert torch.equal(found["lg_out"], small["lg_out"])
    assert not lost.any()


def test_dropouts_are_independent_and_the_same_for_every_batch_size(files: dict[str, Path]) -> None:
    sd3 = family(files, dropout={"clip_l": 0.5, "clip_g": 0.5, "t5xxl": 0.5})
    cond = {name: torch.ones(64, *array.shape[1:]) for name, array in said(sd3, CAPTIONS[:1]).items()}
    whole = sd3.vary(cond, Size(64, 64), Draws(range(64)))
    for row in (0, 5, 63):
        one = sd3.vary({name: array[:1] for name, array in cond.items()}, Size(64, 64), Draws([row]))
        assert all(torch.equal(one[name][0], whole[name][row]) for name in one)
    parts = torch.stack(
        [whole["lg_pooled"][:, 0] == 0, whole["lg_pooled"][:, -1] == 0, (whole["t5_out"] == 0).flatten(1).all(dim=1)]
    )
    assert len({tuple(column) for column in parts.T.tolist()}) == 8


def test_live_and_cached_outputs_are_dropped_alike(files: dict[str, Path]) -> None:
    sd3 = family(files, dropout={"clip_l": 0.5, "clip_g": 0.5, "t5xxl": 0.5})
    sd3.load_tokenizers()
    encoders = sd3.load_encoders(sd3.encoder_names, CPU, torch.float32)
    tokens = sd3.tokenize(CAPTIONS)
    with torch.no_grad():
        together = sd3.encode_text(encoders, tokens)
        alone: dict[str, Tensor] = {}
        for name, encoder in encoders.items():
            alone |= sd3.encode_text({name: encoder}, tokens)
    assert {"l_out", "g_pooled"} <= alone.keys()
    draws = Draws(range(len(CAPTIONS)))
    one, other = (sd3.vary(cond, Size(64, 64), draws) for cond in (together, alone))
    for name in ("lg_out", "lg_pooled", "t5_out"):
        assert torch.equal(one[name], other[name])


def test_nothing_varies_without_being_asked_to(files: dict[str, Path]) -> None:
    sd3 = family(files, dropout={"clip_l": 0.0, "clip_g": 0.0, "t5xxl": 0.0})
    cond = said(sd3)
    assert sd3.vary(cond, Size(64, 64), Draws(range(3))) is cond


# positions


@pytest.mark.parametrize("size", [Size(64, 64), Size(384, 64), Size(72, 200)])
def test_random_places_are_legal_and_the_others_central(files: dict[str, Path], size: Size) -> None:
    """The table has 24 x 24 tokens of 16 pixels."""
    many, rows, columns = 3000, -(-size.height // 16), -(-size.width // 16)
    origins = family(files, random_crop_rate=1.0).vary({}, size, Draws(range(many)))["origin"]
    assert origins.min(dim=0).values.tolist() == [0, 0]
    assert origins.max(dim=0).values.tolist() == [24 - rows, 24 - columns]
    for axis, extent in ((0, rows), (1, columns)):
        counts = torch.bincount(origins[:, axis], minlength=25 - extent)
        assert counts.min() > 0.6 * many / len(counts)
    some = family(files, random_crop_rate=0.25).vary({}, size, Draws(range(many)))["origin"]
    central = (some == torch.tensor([(24 - rows) // 2, (24 - columns) // 2])).all(dim=1)
    assert 0.7 < central.float().mean() < 0.85
    assert torch.equal(some[~central], origins[~central])


@pytest.mark.parametrize("variant", ["medium", "5-medium"])
def test_places_decide_the_answer_and_the_middle_is_the_default(files: dict[str, Path], variant: Variant) -> None:
    sd3 = family(files, "sd3" if variant == "medium" else "sd3.5")
    model, cond = sd3.load_denoiser(CPU, torch.float32), said(sd3, CAPTIONS[:2])
    x, timesteps = Draws([1, 2]).normal((16, 8, 6)), torch.tensor([100.0, 900.0])
    with torch.no_grad():
        plain = sd3.predict(model, x, timesteps, cond)
        middle, moved = (
            sd3.predict(model, x, timesteps, {**cond, "origin": torch.tensor(origins)})
            for origins in ([[10, 10], [10, 10]], [[10, 10], [0, 20]])
        )
    assert sd3.config.table_side == 24  # of which 4 x 3 tokens are in the middle from 10 on
    torch.testing.assert_close(middle, plain)
    torch.testing.assert_close(moved[0], plain[0])
    assert not torch.allclose(moved[1], middle[1], atol=1e-4)


@pytest.mark.parametrize("variant", ["medium", "5-medium"])
def test_the_same_answer_as_diffusers(files: dict[str, Path], variant: Variant) -> None:
    sd3 = family(files, "sd3" if variant == "medium" else "sd3.5")
    model, cond = sd3.load_denoiser(CPU, torch.float32), said(sd3, CAPTIONS[:2])
    other = tiny_sd3.diffusers_mmdit(model)  # type: ignore[arg-type]
    joint = joint_clip(cond, tiny_sd3.L_WIDTH)
    for height, width in ((8, 8), (12, 6)):
        x, timesteps = Draws([1, 2]).normal((16, height, width)), torch.tensor([100.0, 900.0])
        with torch.no_grad():
            expected = other(
                hidden_states=x,
                encoder_hidden_states=context(joint["lg_out"], joint["t5_out"], tiny_sd3.CONTEXT_WIDTH),
                pooled_projections=joint["lg_pooled"],
                timestep=timesteps,
            ).sample
            torch.testing.assert_close(sd3.predict(model, x, timesteps, cond), expected, rtol=1e-4, atol=1e-4)


def test_scaled_tables_follow_the_resolutions_of_the_datasets(files: dict[str, Path]) -> None:
    """Of 256 and 512 pixels there are 16 and 32 tokens per side; images of more than 640 tokens take the larger.

    One that is longer than 24 tokens at less gets a table of its own.
    """
    from library.models.positions import crop, scaled_table

    sd3 = family(files, "sd3.5", scaled_positions=True)
    sd3.train_at([Size(512, 512), Size(256, 256), Size(256, 256)], ())
    model: Any = sd3.load_denoiser(CPU, torch.float32)
    width = sd3.config.width
    for rows, columns, size in ((16, 16, 16), (20, 24, 16), (24, 26, 26), (32, 32, 32)):
        found = sd3.positions.of(model.pos_embed, rows, columns, None)
        torch.testing.assert_close(found, crop(scaled_table(width, size), rows, columns))
    centre = sd3.positions.of(model.pos_embed, 16, 16, None)
    large = sd3.positions.of(model.pos_embed, 32, 32, None).view(1, 32, 32, -1)
    torch.testing.assert_close(large[:, ::2, ::2].flatten(1, 2), centre)  # both span the same range


@pytest.mark.parametrize("size", [Size(256, 256), Size(64, 512), Size(512, 512), Size(1024, 96)])
def test_random_places_fit_into_scaled_tables(files: dict[str, Path], size: Size) -> None:
    sd3 = family(files, "sd3.5", scaled_positions=True, random_crop_rate=1.0)
    sd3.train_at([Size(512, 512), Size(256, 256)], ())
    model: Any = sd3.load_denoiser(CPU, torch.float32)
    rows, columns = size.height // 16, size.width // 16
    origins = sd3.vary({}, size, Draws(range(400)))["origin"]
    table = sd3.positions.of(model.pos_embed, rows, columns, torch.zeros(1, 2, dtype=torch.long))
    assert table.shape == (1, rows * columns, sd3.config.width)
    side = sd3.positions.side(rows, columns)
    assert origins.min() >= 0
    assert (origins + torch.tensor([rows, columns])).max() == side
    assert sd3.positions.of(model.pos_embed, rows, columns, origins[:5]).isfinite().all()


def test_images_larger_than_the_table_are_found_before_the_training(files: dict[str, Path]) -> None:
    for more, sizes, wrong in (
        ((), [Size(384, 384)], []),
        ((), [Size(64, 64), Size(64, 400)], ["images of 64 x 400"]),
        (("--enable_scaled_pos_embed",), [Size(64, 400)], []),
        (("--clip_l", str(files["t5xxl"])), [Size(64, 400)], []),  # which is told by itself
    ):
        found = Sd3.from_options(options_of(files, *more)).train_at([Size(64, 64)], sizes)
        assert [finding.what.split(" are ")[0] for finding in errors(found)] == wrong


def test_scaled_positions_are_told_of_where_they_are_odd(files: dict[str, Path]) -> None:
    where = [finding.where for finding in family(files, "sd3", scaled_positions=True).findings()]
    assert where == ["--enable_scaled_pos_embed"]
    assert not family(files, "sd3.5", scaled_positions=True).findings()


# what a cache depends on


def test_text_outputs_are_others_when_what_makes_them_is_another(files: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_sd3.write_encoder(tmp_path / "other.safetensors", "clip_g", seed=99)
    ways = [
        family(files),
        family(files, "without t5"),
        family(files, separate={"clip_g": str(other)}),
        *(family(files, **{name: True}) for name in ("apply_lg_mask", "apply_t5_mask")),
        family(files, t5_length=13),
    ]
    assert len({sd3.text_identity() for sd3 in ways}) == len(ways)
    same = [family(files), family(files, dropout={"t5xxl": 0.5}, random_crop_rate=0.5, scaled_positions=True)]
    assert {sd3.text_identity() for sd3 in same} == {ways[0].text_identity()}
    assert len({sd3.vae_identity() for sd3 in (*ways[:1], *ways[3:])}) == 1
    assert family(files, separate={"vae": str(files["vae"])}).vae_identity() != ways[0].vae_identity()


def test_the_type_of_t5_is_one_of_them_for_trainer_and_tool(files: dict[str, Path]) -> None:
    found: dict[str, set[str]] = {}
    for more in ((), ("--t5xxl_dtype", "fp32"), ("--t5xxl_dtype", "bf16"), ("--t5xxl_dtype", "fp8")):
        for script in (SD3_TRAIN_NETWORK, CACHE_TEXT_ENCODER_OUTPUTS):
            named = () if script is SD3_TRAIN_NETWORK else ("--sd3",)
            options = options_of(files, *more, *named, script=script)
            types = caching._encoder_types(Sd3.from_options(options), options, Precision.from_options(options))
            found.setdefault(" ".join(more), set()).add(types)
    assert all(len(types) == 1 for types in found.values())
    assert found[""] == found["--t5xxl_dtype fp32"]
    assert len(set.union(*found.values())) == 3


def test_t5_runs_where_and_as_it_is_told_to(files: dict[str, Path]) -> None:
    def loaded(*more: str) -> dict[str, torch.nn.Module]:
        options = options_of(files, *more)
        job: Any = type("Job", (), {})()
        job.options, job.family, job.device = options, Sd3.from_options(options), CPU
        job.precision = Precision.from_options(options)
        return placing.load_encoders(job, job.family.encoder_names, frozenset())

    types = {name: {p.dtype for p in part.parameters()} for name, part in loaded("--t5xxl_dtype", "bf16").items()}
    assert types == {"clip_l": {torch.float32}, "clip_g": {torch.float32}, "t5xxl": {torch.bfloat16}}
    elsewhere = loaded("--t5xxl_device", "meta")
    assert {p.device.type for p in elsewhere["t5xxl"].parameters()} == {"meta"}
    assert {p.device.type for p in elsewhere["clip_l"].parameters()} == {"cpu"}
    small = loaded("--t5xxl_dtype", "fp8")["t5xxl"]
    assert torch.float8_e4m3fn in {p.dtype for p in small.parameters()}
    sd3 = family(files)
    with torch.no_grad():
        tokens = sd3.tokenize(CAPTIONS)
        found = sd3.encode_text({"t5xxl": small}, tokens)["t5_out"]
    whole = said(sd3)["t5_out"]
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), whole.flatten(), dim=0) > 0.98


# files


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clip_l": "clip_g"}, "which this model wants 96"),
        ({"clip_g": "clip_l"}, "which this model wants 96"),
        ({"clip_l": "clip_g", "clip_g": "clip_l"}, "swapped"),
        ({"clip_l": "t5xxl"}, "is a T5 text encoder"),
        ({"t5xxl": "clip_l"}, "is a CLIP text encoder"),
        ({"vae": "clip_l"}, "is a CLIP text encoder"),
    ],
    ids=str,
)
def test_wrong_files_are_one_finding(files: dict[str, Path], given: dict[str, str], said: str) -> None:
    (found,) = errors(family(files, separate={part: str(files[name]) for part, name in given.items()}).findings())
    assert said in found.what
    assert all(f"--{part}" in found.where for part in given)


def test_a_t5_of_another_width_is_told_of(files: dict[str, Path], tmp_path: Path) -> None:
    from tests import tiny

    (found,) = errors(family(files, separate={"t5xxl": str(tiny.write_t5(tmp_path / "t5.safetensors"))}).findings())
    assert found.code == "E-MODEL-KIND"
    assert f"wants {tiny_sd3.CONTEXT_WIDTH}" in found.what


def test_the_picture_of_the_timesteps_names_options_that_sd3_has() -> None:
    settings = flow_settings(None)
    drawn = replace(settings, timestep_sampling="density", discrete_flow_shift=3.0, min_timestep=100)
    for scheme, own in (("logit_normal", ", logit_mean 0, logit_std 1"), ("uniform", "")):
        found = Flow(replace(drawn, weighting_scheme=scheme)).density()
        assert found == f"training_shift 3, weighting_scheme {scheme}{own}, min_timestep 100"
