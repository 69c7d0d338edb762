"""The models of SD3 from single files, folders and files of their own; single files written again; what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.files import header, save_safetensors
from library.log import DataError
from library.models import autoencoder, keymaps, keymaps_sd, keymaps_sd3
from library.models.detect import check, detect
from library.models.keymaps_sd3 import ENCODERS
from library.models.loading_sd3 import Sd3Files, load_encoder, load_mmdit, load_vae, single_file
from library.models.locations import open_tensors
from library.models.sd3_text import context, joint_clip, without_dropped
from library.models.t5 import t5_hidden
from library.models.text_chunks import penultimate_and_pooled
from library.types import DENOISER
from tests import tiny, tiny_sd3
from tests.tiny_sd3 import VARIANTS, Variant

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "sd3_keys.json").read_text(encoding="utf-8"))
UNIFIED: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in GOLDEN["sd3_medium_unified"].items()}


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    theirs = expected.state_dict()
    return set(found.state_dict()) == set(theirs) and all(
        torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items()
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_all_parts_come_from_a_file_or_a_folder(tmp_path: Path, variant: Variant, layout: str) -> None:
    write = tiny_sd3.write_single if layout == "file" else tiny_sd3.write_folder
    files = Sd3Files(write(tmp_path / "sd3.safetensors", variant))
    assert same(load_mmdit(files), tiny_sd3.mmdit(variant))
    assert same(load_vae(files), tiny_sd3.vae())
    for name in ENCODERS:
        assert same(load_encoder(files, name), tiny_sd3.encoder(name)), name
    assert set(files.shapes()) == {DENOISER, *ENCODERS}


def test_type_place_and_callback(tmp_path: Path) -> None:
    files = Sd3Files(tiny_sd3.write_single(tmp_path / "a.safetensors", "5-medium"))
    seen: list[str] = []
    model = load_mmdit(files, torch.bfloat16, finished=lambda name, _: seen.append(name))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert not isinstance(model.pos_embed, torch.nn.Parameter)
    assert "joint_blocks.0.x_block.attn2.qkv" in seen
    assert len(seen) == len(set(seen))
    kept = load_encoder(files, "t5xxl", torch.float16)
    assert kept.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").dtype == torch.float32


def test_float8_weights_may_stay(tmp_path: Path) -> None:
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if name.endswith("qkv.weight") else tensor
        for name, tensor in tiny_sd3.single_tensors(parts=()).items()
    }
    save_safetensors(tensors, tmp_path / "a.safetensors")
    files = Sd3Files(tmp_path / "a.safetensors")
    layer = "joint_blocks.0.x_block.attn.qkv"
    kept = load_mmdit(files, torch.bfloat16, keep_float8=True).get_parameter(f"{layer}.weight")
    dense = load_mmdit(files, torch.bfloat16).get_parameter(f"{layer}.weight")
    assert (kept.dtype, dense.dtype) == (torch.float8_e4m3fn, torch.bfloat16)


def test_a_file_of_its_own_wins(tmp_path: Path) -> None:
    path = tiny_sd3.write_single(tmp_path / "a.safetensors")
    own = tiny_sd3.write_encoder(tmp_path / "g.safetensors", "clip_g", seed=90)
    files = Sd3Files(path, {"clip_g": str(own), "t5xxl": None})
    assert same(load_encoder(files, "clip_g"), tiny_sd3.encoder("clip_g", seed=90))
    assert same(load_encoder(files, "t5xxl"), tiny_sd3.encoder("t5xxl"))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_files_with_a_prefix_or_another_whole_checkpoint(tmp_path: Path, name: str) -> None:
    bare = tiny_sd3.write_single(tmp_path / "a.safetensors", parts=("vae",))
    tiny.save(
        {f"transformer.{key}": tensor for key, tensor in tiny_sd3.encoder_tensors(name).items()},
        tmp_path / "b.safetensors",
        torch.float32,
    )
    whole = tiny_sd3.write_single(tmp_path / "c.safetensors")
    for path in (tmp_path / "b.safetensors", whole):
        files = Sd3Files(bare, {name: str(path)})
        assert same(load_encoder(files, name), tiny_sd3.encoder(name))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    files = Sd3Files(tiny_sd3.write_single(tmp_path / "a.safetensors", parts=("clip_l",)))
    assert files.find("t5xxl") is None
    assert set(files.shapes()) == {DENOISER, "clip_l"}
    for name in ("clip_g", "t5xxl", "vae"):
        with pytest.raises(DataError, match=f"there is no {name}") as error:
            files.part(name)
        assert f"--{name}" in error.value.hint
    tensors = {n: t for n, t in tiny_sd3.encoder_tensors("clip_g").items() if n != keymaps.PROJECTION}
    tiny.save(tensors, tmp_path / "g.safetensors", torch.float32)
    with pytest.raises(DataError, match=r"no text_projection\.weight"):
        Sd3Files(files.path, {"clip_g": str(tmp_path / "g.safetensors")}).part("clip_g")


def test_wrong_files_get_one_clear_line(tmp_path: Path) -> None:
    paths = tiny_sd3.write_all(tmp_path, "5-large")
    flux = tiny.write_flux(tmp_path / "flux.safetensors")
    for name, role, option in (
        ("sd3", "sd3", "--pretrained_model_name_or_path"),
        ("vae", "sd3_vae", "--vae"),
        *((name, name, f"--{name}") for name in ENCODERS),
        *(("sd3", role, "--x") for role in ("sd3_vae", *ENCODERS)),
    ):
        assert check(paths[name], option, role) is None, (name, role)
    found = check(flux, "--pretrained_model_name_or_path", "sd3")
    assert found is not None
    assert "flux.safetensors is a FLUX.1-dev transformer" in found.what
    found = check(paths["sd3"], "--pretrained_model_name_or_path", "flux")
    assert found is not None
    assert found.what.startswith("sd3.safetensors is an SD3.5-large checkpoint")
    bare = tiny_sd3.write_single(tmp_path / "bare.safetensors", "5-medium", parts=())
    found = check(bare, "--vae", "sd3_vae")
    assert found is not None
    assert found.what == "bare.safetensors is an SD3.5-medium transformer, but --vae wants an SD3 autoencoder"
    with pytest.raises(DataError, match="FLUX"):
        load_mmdit(Sd3Files(flux))


def test_golden_single_file_is_read_whole() -> None:
    used: set[str] = set()
    layouts = {DENOISER: keymaps_sd3.mmdit_from_file(UNIFIED), "vae": keymaps_sd.vae_from_file(UNIFIED)}
    layouts |= {name: keymaps_sd3.encoder_from_file(UNIFIED, name) for name in ENCODERS}
    for recipes in layouts.values():
        used |= {source for recipe in recipes.values() for source in recipe.sources}
    left = set(UNIFIED) - used
    projection = keymaps_sd3.ENCODER_PREFIX.format("clip_l") + keymaps.PROJECTION
    assert left == {f"text_encoders.{name}.logit_scale" for name in ENCODERS} | {projection}
    assert detect(UNIFIED).roles == ("sd3", "sd3_vae", *ENCODERS)


@pytest.mark.parametrize("trained", [(DENOISER,), (DENOISER, "clip_l", "clip_g", "t5xxl")], ids=len)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_written_file_is_what_was_read(tmp_path: Path, trained: tuple[str, ...], layout: str) -> None:
    write = tiny_sd3.write_single if layout == "file" else tiny_sd3.write_folder
    files = Sd3Files(write(tmp_path / "a.safetensors", "5-medium"))
    models = {name: load_mmdit(files) if name == DENOISER else load_encoder(files, name) for name in trained}
    with torch.no_grad():
        for model in models.values():
            next(model.parameters()).add_(1)
    out = tmp_path / "b.safetensors"
    with single_file(files, models, ENCODERS, torch.bfloat16) as tensors:
        tensors.save_safetensors(out, {"a": "b"})
    wanted = {name for name in tiny_sd3.single_tensors("5-medium") if not name.endswith("logit_scale")}
    assert set(header(out).tensors) == wanted
    assert {info.dtype for info in header(out).tensors.values()} == {"BF16"}
    again = Sd3Files(out)
    assert same(load_mmdit(again), models[DENOISER].bfloat16())
    assert same(load_vae(again), tiny_sd3.vae().bfloat16())
    for name in ENCODERS:
        expected = models.get(name) or tiny_sd3.encoder(name)
        assert same(load_encoder(again, name), expected.bfloat16()), name
    with open_tensors([out]) as found:
        assert torch.equal(
            found["text_encoders.clip_l.transformer.text_projection.weight"],
            torch.eye(tiny_sd3.L_WIDTH, dtype=torch.bfloat16),
        )


def test_without_encoders_and_with_a_lost_source_the_rest_is_written(tmp_path: Path) -> None:
    files = Sd3Files(tiny_sd3.write_single(tmp_path / "a.safetensors"))
    model = load_mmdit(files)
    with single_file(files, {DENOISER: model}) as tensors:
        assert {name.split(".")[0] for name in tensors} == {"model", "first_stage_model"}
    Path(files.path).unlink()
    with single_file(Sd3Files(files.path), {DENOISER: model}, ENCODERS) as tensors:
        assert {name.split(".")[0] for name in tensors} == {"model"}


def test_scaled_float8_encoders_are_written_with_their_scales(tmp_path: Path) -> None:
    tensors = tiny_sd3.encoder_tensors("t5xxl")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name], scale = tensors[name].to(torch.float8_e4m3fn), torch.tensor([3.0])
    save_safetensors(tensors | {name.replace(".weight", ".scale_weight"): scale}, tmp_path / "t5.safetensors")
    files = Sd3Files(
        tiny_sd3.write_single(tmp_path / "a.safetensors", parts=()), {"t5xxl": str(tmp_path / "t5.safetensors")}
    )
    with single_file(files, {}, ("t5xxl",)) as joined:
        key = keymaps_sd3.ENCODER_PREFIX.format("t5xxl") + name
        assert joined.like[key].dtype == joined[key].dtype == torch.float32
        assert torch.equal(joined[key], 3 * tensors[name].float())


def test_latents_have_sixteen_channels(tmp_path: Path) -> None:
    vae = load_vae(Sd3Files(tiny_sd3.write_single(tmp_path / "a.safetensors")))
    assert autoencoder.encode(vae, torch.zeros(1, 3, 16, 24)).mean.shape == (1, 16, 2, 3)


# texts


def said(batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    said = {"l_out": numbers(77, 3), "l_pooled": numbers(3), "g_out": numbers(77, 5), "g_pooled": numbers(5)}
    cond = joint_clip(said, 3)
    masks = {name: torch.ones(batch, 77, dtype=torch.int64) for name in ("clip_l_attn_mask", "clip_g_attn_mask")}
    return cond | masks | {"t5_out": numbers(6, 12), "t5_attn_mask": torch.ones(batch, 6, dtype=torch.int64)}


def test_context_is_clip_filled_up_then_t5() -> None:
    cond = said()
    found = context(cond["lg_out"], cond["t5_out"], 12)
    assert found.shape == (4, 83, 12)
    assert torch.equal(found[:, :77, :8], cond["lg_out"])
    assert not found[:, :77, 8:].any()
    assert torch.equal(found[:, 77:], cond["t5_out"])
    without = context(cond["lg_out"], None, 12)
    assert without.shape == (4, 154, 12)
    assert not without[:, 77:].any()


def test_dropped_encoders_leave_zeros() -> None:
    cond = said()
    dropped = {
        "clip_l": torch.tensor([True, False, False, False]),
        "clip_g": torch.tensor([False, True, False, False]),
        "t5xxl": torch.tensor([False, False, True, False]),
    }
    before = {name: array.clone() for name, array in cond.items()}
    found = without_dropped(cond, dropped, 3)
    for index, (part, mask) in enumerate(((slice(0, 3), "clip_l_attn_mask"), (slice(3, None), "clip_g_attn_mask"))):
        for array in ("lg_out", "lg_pooled"):
            assert not found[array][index, ..., part].any()
            before[array][index, ..., part] = 0
        before[mask][index] = 0
    before["t5_out"][2] = before["t5_attn_mask"][2] = 0
    assert all(torch.equal(found[name], array) for name, array in before.items())
    assert cond["lg_out"][0, :, :3].all()


def test_what_an_encoder_says_alone_replaces_its_part() -> None:
    cond = said()
    alone = {"g_out": cond["lg_out"][..., 3:] + 1, "g_pooled": cond["lg_pooled"][..., 3:] + 1}
    found = joint_clip(cond | alone, 3)
    assert set(found) == set(cond)
    for name in ("lg_out", "lg_pooled"):
        assert torch.equal(found[name][..., :3], cond[name][..., :3])
        assert torch.equal(found[name][..., 3:], cond[name][..., 3:] + 1)
    assert joint_clip(cond, 3)["lg_out"] is cond["lg_out"]


def test_pooled_of_clip_l_is_not_projected_and_padding_can_be_hidden() -> None:
    ids = torch.randint(5, 60, (2, 77))
    eos = len(tiny.clip_vocabulary()) - 1
    ids[:, 9:] = eos
    plain = tiny_sd3.encoder("clip_l")
    with torch.no_grad():
        hidden, pooled = penultimate_and_pooled(plain, ids, eos)
        same_hidden, same_pooled = penultimate_and_pooled(tiny_sd3.projected_clip_l(), ids, eos)
        assert torch.equal(hidden, same_hidden)
        torch.testing.assert_close(pooled, same_pooled)
        mask = (torch.arange(77) < 10).long().expand(2, -1)
        masked, masked_pooled = penultimate_and_pooled(plain, ids, eos, mask)
    torch.testing.assert_close(masked[:, :10], hidden[:, :10])
    torch.testing.assert_close(masked_pooled, pooled)
    assert not torch.allclose(masked[:, 20:], hidden[:, 20:], atol=1e-3)


def test_the_pipeline_of_diffusers_says_the_same(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    folder = tiny_sd3.write_folder(tmp_path / "sd3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    files, text = Sd3Files(folder), "a photo of a red cat"
    ids = {
        name: tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        for name, tokenizer, length in zip(
            ENCODERS, (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3), (77, 77, 20), strict=True
        )
    }
    assert int(ids["clip_g"][0, -1]) == 0
    models = {name: load_encoder(files, name).eval() for name in ENCODERS}
    eos = pipeline.tokenizer.eos_token_id
    with torch.no_grad():
        spoken = [penultimate_and_pooled(models[name], ids[name], eos) for name in ENCODERS[:2]]
        names = ("l_out", "l_pooled", "g_out", "g_pooled")
        cond = joint_clip(dict(zip(names, [*spoken[0], *spoken[1]], strict=True)), tiny_sd3.L_WIDTH)
        found = context(cond["lg_out"], t5_hidden(models["t5xxl"], ids["t5xxl"]), tiny_sd3.CONTEXT_WIDTH)
        expected, _, pooled, _ = pipeline.encode_prompt(
            text, text, text, do_classifier_free_guidance=False, max_sequence_length=20
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond["lg_pooled"], pooled, rtol=1e-4, atol=1e-5)
