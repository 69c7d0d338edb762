"""The tools that convert LoRAs and models for FLUX.1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library import files
from networks import convert_flux_lora
from tests import tiny
from tests.networks.test_flux_tools import diffusers_folder, models, module_delta, network, read, write
from tools import convert_diffusers_to_flux

_ = models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_from_diffusers_is_the_same_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    flux = tiny.write_flux(tmp_path / "flux.safetensors", double=2, dtype=dtype)
    folder = diffusers_folder(flux, tmp_path / "FLUX.1-dev", shards=3)
    first = folder / "transformer" / "diffusion_pytorch_model-00001-of-00003.safetensors"
    for number, place in enumerate((folder, folder / "transformer", first)):
        out = tmp_path / f"{number}.safetensors"
        convert_diffusers_to_flux.main(["--diffusers_path", str(place), "--save_to", str(out), "--mem_eff_load_save"])
        wanted, found = read(flux), read(out)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == dtype for name in wanted)


def test_a_model_from_diffusers_in_another_type(models: dict[str, Path], tmp_path: Path) -> None:
    folder, out = diffusers_folder(models["flux"], tmp_path / "FLUX.1-dev"), tmp_path / "out.safetensors"
    convert_diffusers_to_flux.main(["--diffusers_path", str(folder), "--save_to", str(out), "--save_precision", "fp8"])
    base = read(models["flux"])
    assert all(
        torch.equal(tensor.float(), base[name].to(torch.float8_e4m3fn).float()) for name, tensor in read(out).items()
    )


def test_a_lora_there_and_back(models: dict[str, Path], tmp_path: Path) -> None:
    file = write(network(models, "split"), tmp_path / "a.safetensors", ss_training_comment="mine")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert_flux_lora.main(
        ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(file), "--dst_path", str(there)]
    )
    assert not any(name.startswith("lora_") or "alpha" in name for name in files.header(there).tensors)
    convert_flux_lora.main(["--src_path", str(there), "--dst_path", str(back)])
    source, found = read(file), read(back)
    assert found.keys() == source.keys()
    for name in {key.partition(".")[0] for key in source}:
        torch.testing.assert_close(module_delta(found, name), module_delta(source, name), atol=1e-7, rtol=1e-6)
    facts = files.header(back).metadata
    assert facts["ss_training_comment"] == "mine"
    assert facts["sshs_model_hash"] != files.header(file).metadata["sshs_model_hash"]
