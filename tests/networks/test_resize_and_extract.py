"""The tools that make LoRAs of other ranks, of two models, and of DyLoRAs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library import metadata
from library.files import LazyTensors, header, save_safetensors
from library.log import DataError, UserError
from library.option_groups import ExtractDyloraOptions, ExtractLoraOptions, ResizeLoraOptions
from networks import dylora, lora
from networks.algebra import AdapterFile, LowRank, Merged, Source
from networks.places import sd_places
from networks.resizing import first_ranks, resize, split_dylora
from networks.sd_extracting import extract
from tests import tiny_sd
from tests.networks import tiny_unets
from tests.networks.test_merging import checkpoint, shapes_of, single, tensors_of

SHAPES = {
    "lora_unet_input_blocks_4_1_proj_in": (40, 30),
    "lora_unet_input_blocks_3_0_op": (20, 10, 3, 3),
    "lora_unet_input_blocks_4_0_skip_connection": (20, 10, 1, 1),
}


def write_lora(path: Path, facts: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(len(name))
        rank, size = 8, math.prod(shape[1:])
        falls = torch.exp(-torch.arange(rank) / 2)
        left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))[0] * falls
        right = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0].T
        for key, tensor in LowRank.of_matrices(right, left, shape, 4.0).file_tensors(dtype).items():
            tensors[f"{name}.{key}"] = tensor
    save_safetensors(tensors, path, facts)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    file = AdapterFile.open(path)
    return {name: LowRank.of(file[name]).delta() for name in file}


def ranks(path: Path) -> dict[str, int]:
    return {name: size.rank for name, size in AdapterFile.open(path).sizes().items()}


def resized(path: Path, **options: object) -> Path:
    out = path.with_name("out.safetensors")
    resize(ResizeLoraOptions(model=str(path), save_to=str(out), **options))  # type: ignore[arg-type]
    return out


# resize


def test_resizing_to_the_same_rank_changes_nothing(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    old, new = (dict(LazyTensors(file)) for file in (path, resized(path, new_rank=8)))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
    assert ranks(resized(path, new_rank=32)) == ranks(path)


def test_a_smaller_rank_leaves_out_the_smallest_singular_values(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    out = resized(path, new_rank=3, new_conv_rank=5)
    assert [ranks(out)[name] for name in SHAPES] == [3, 5, 3]
    old, new = deltas(path), deltas(out)
    for name, delta in old.items():
        values = torch.linalg.svdvals(delta.flatten(1))
        error = float((delta - new[name]).norm())
        assert error == pytest.approx(float(values[ranks(out)[name] :].norm()), abs=1e-5)
    for name, size in AdapterFile.open(out).sizes().items():
        assert size.alpha == pytest.approx(0.5 * size.rank), name


@pytest.mark.parametrize(("method", "parameter"), [("sv_ratio", 4.0), ("sv_fro", 0.9), ("sv_cumulative", 0.8)])
def test_ranks_can_follow_the_singular_values(
    method: str, parameter: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lora(tmp_path / "a.safetensors", {"ss_training_comment": "mine", "ss_network_dim": "8"})
    with caplog.at_level(logging.INFO):
        out = resized(path, new_rank=6, dynamic_method=method, dynamic_param=parameter, verbose=True)
    wanted = {"sv_ratio": 4, "sv_fro": 3, "sv_cumulative": 5}[method]
    assert set(ranks(out).values()) == {wanted}
    assert caplog.text.count("sum retained") == len(SHAPES)
    facts = header(out).metadata
    assert facts["ss_training_comment"] == f"Dynamic resize with {method}: {parameter} from 8; mine"
    assert facts["ss_network_dim"] == facts["ss_network_alpha"] == "Dynamic"


def test_metadata_are_kept_and_hashes_made_again(tmp_path: Path) -> None:
    facts = {"ss_network_dim": "8", "ss_tag_frequency": "{}", "sshs_model_hash": "old", "modelspec.title": "t"}
    facts["ss_network_args"] = json.dumps({"conv_dim": "8", "conv_alpha": "4.0"})
    out = resized(write_lora(tmp_path / "a.safetensors", facts), new_rank=2, new_conv_rank=3, save_precision="fp16")
    found, tensors = header(out).metadata, dict(LazyTensors(out))
    assert found["ss_training_comment"] == "dimension is resized from 8 to 2 (conv: 3); "
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "1")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5"}
    assert (found["modelspec.title"], found["ss_tag_frequency"]) == ("t", "{}")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert found["sshs_model_hash"] == metadata.network_hashes(tensors, found)["sshs_model_hash"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dynamic_method": "sv_ratio"}, "number above 1, not None"),
        ({"dynamic_method": "sv_fro", "dynamic_param": 2.0}, "between 0 and 1, not 2"),
        ({"dynamic_param": 0.5}, "needs --dynamic_method"),
        ({"save_to": ""}, "no name for the result"),
        ({"save_to": "out.ckpt"}, "only .safetensors files"),
        ({"model": "missing.safetensors"}, "isn't there"),
        ({"model": ""}, "no file"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, object], said: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    values = {"model": str(path), "save_to": str(tmp_path / "out.safetensors"), **options}
    with pytest.raises(UserError, match=said):
        resize(ResizeLoraOptions(**values))  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_input_is_only_replaced_on_request(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        resize(ResizeLoraOptions(model=str(path), save_to=str(tmp_path / "." / "a.safetensors"), new_rank=2))
    assert path.read_bytes() == before
    resize(ResizeLoraOptions(model=str(path), save_to=str(path), new_rank=2, overwrite=True))
    assert set(ranks(path).values()) == {2}


@pytest.mark.parametrize("broken", ["nan", "dora", "loha", "fp16"])
def test_files_that_cannot_be_resized_leave_nothing(broken: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    tensors, name = dict(LazyTensors(path)), next(iter(SHAPES))
    if broken == "nan":
        tensors[f"{name}.lora_up.weight"][0] = torch.nan
    elif broken == "dora":
        tensors[f"{name}.dora_scale"] = torch.ones(40, 1)
    elif broken == "fp16":
        tensors[f"{name}.lora_up.weight"] *= 1e9
    else:
        tensors = {f"{name}.hada_w1_a": torch.ones(2, 2), f"{name}.hada_w1_b": torch.ones(2, 2)}
    save_safetensors(tensors, path)
    with pytest.raises(DataError, match=r"(a|out)\.safetensors"):
        resized(path, new_rank=2, save_precision="fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# DyLoRA


def test_first_ranks_are_as_strong_as_in_training(tmp_path: Path) -> None:
    model = tiny_unets.unet()
    network = tiny_unets.fill(dylora.create_network(1.0, 6, 3.0, None, None, model, unit="2"))
    path = tmp_path / "dy.safetensors"
    save_safetensors(tensors_of(network), path, {"ss_network_dim": "6", "ss_training_comment": "None"})
    split_dylora(ExtractDyloraOptions(model=str(path), save_to=str(tmp_path / "cut.safetensors"), unit=2))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["cut-0002.safetensors", "cut-0004.safetensors", "dy.safetensors"]
    whole, cut = AdapterFile.open(path), AdapterFile.open(tmp_path / "cut-0004.safetensors")
    for name in whole:
        module, small = LowRank.of(whole[name]), LowRank.of(cut[name])
        down, up = module.matrices()
        wanted = 3.0 / math.sqrt(6 * 4) * up[:, :4] @ down[:4]
        assert torch.allclose(small.delta().flatten(1), wanted, atol=1e-5)
    facts = header(tmp_path / "cut-0004.safetensors").metadata
    assert facts["ss_training_comment"] == "split from DyLoRA, rank 6 to 4; None"
    assert facts["ss_network_dim"] == "4"
    assert float(facts["ss_network_alpha"]) == pytest.approx(3 * math.sqrt(4 / 6))


def test_a_dylora_needs_one_rank_and_a_smaller_unit(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    for unit, said in [(8, "no smaller rank"), (None, "--unit")]:
        with pytest.raises(UserError, match=said):
            split_dylora(ExtractDyloraOptions(model=str(path), save_to=str(tmp_path / "c.safetensors"), unit=unit))
    out = resized(path, new_rank=2, new_conv_rank=3)
    with pytest.raises(DataError, match="ranks 2, 3"):
        split_dylora(ExtractDyloraOptions(model=str(out), save_to=str(tmp_path / "c.safetensors"), unit=1))
    module = LowRank.of(AdapterFile.open(path)["lora_unet_input_blocks_3_0_op"])
    assert first_ranks(module, 3).shape == module.shape


# two models


def tuned(version: str, path: Path, **arguments: str) -> tuple[Path, Path, Mapping[str, Tensor]]:
    """A model, one with a network of rank 2 merged into it, and the network."""
    base = single(version)
    model, encoders = tiny_sd.unet(version), tiny_sd.encoders(version)  # type: ignore[arg-type]
    made = lora.create_network(1.0, 2, 2.0, None, list(encoders.values()), model, **arguments)
    network = AdapterFile(tensors_of(tiny_unets.fill(made, 0.05)), "n")
    original, changed = path / "original.safetensors", path / "tuned.safetensors"
    save_safetensors(base, original)
    Merged(base, sd_places(shapes_of(base)), [Source(network)]).save(changed)
    return original, changed, {name: LowRank.of(network[name]).delta() for name in network}


def extracted(original: Path, changed: Path, **options: object) -> Path:
    out = original.with_name("out.safetensors")
    extract(ExtractLoraOptions(model_org=str(original), model_tuned=str(changed), save_to=str(out), **options))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("version", ["2", "xl"])
def test_what_was_merged_is_extracted_again(version: str, tmp_path: Path) -> None:
    original, changed, wanted = tuned(version, tmp_path, conv_dim="2")
    out = extracted(original, changed, dim=2, conv_dim=2, clamp_quantile=1.0, min_diff=1e-4)
    found = deltas(out)
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        assert torch.allclose(delta.reshape(wanted[name].shape), wanted[name], atol=1e-4), name
    facts = header(out).metadata
    assert facts["ss_base_model_version"] == {"2": "sd_v2", "xl": "sdxl_base_v1-0"}[version]
    assert facts["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "2.0"}'
    assert (facts["ss_network_dim"], facts["ss_network_alpha"], facts["ss_v2"]) == ("2", "2.0", str(version == "2"))
    assert facts["modelspec.architecture"].endswith("/lora")
    assert facts["sshs_model_hash"]


def test_encoders_that_hardly_moved_and_kernels_are_left_out(tmp_path: Path) -> None:
    model = tiny_unets.unet()
    base = single("1")
    texts = {key: tensor for key, tensor in base.items() if key.startswith("cond_stage")}
    original, changed = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_safetensors({**checkpoint(model), **texts, **_vae(base)}, original)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    nearly = {key: tensor + 1e-3 for key, tensor in texts.items()}
    save_safetensors({**checkpoint(model), **nearly, **_vae(base)}, changed)
    out = extracted(original, changed, no_metadata=True, save_precision="bf16")
    names = ranks(out)
    assert names
    assert all("_attentions_" in name for name in names)
    assert {tensor.dtype for tensor in LazyTensors(out).values()} == {torch.bfloat16}
    assert not any(key.startswith("modelspec") for key in header(out).metadata)
    assert any("lora_te" in name for name in ranks(extracted(original, changed, min_diff=1e-4)))


def _vae(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in base.items() if key.startswith("first_stage")}


def test_models_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"{version}.safetensors" for version in ("1", "2"))
    for version, path in (("1", first), ("2", second)):
        save_safetensors(single(version), path)
    for pair, options, said in [
        ((first, second), {}, r"the original model is SD 1\.x, the tuned one SD 2\.x"),
        ((first, first), {}, "don't differ"),
        ((first, first), {"sdxl": True}, "leave --sdxl out"),
        ((first, tmp_path / "none.safetensors"), {}, "no such file"),
    ]:
        with pytest.raises(DataError, match=said):
            extracted(*pair, **options)
    assert not (tmp_path / "out.safetensors").exists()
