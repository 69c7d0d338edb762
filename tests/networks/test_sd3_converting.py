"""Networks for SD3 in other layouts: Diffusers does with them what a merged checkpoint does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library import files
from tests import tiny_sd3
from tests.networks import test_lora_sd3, test_sd3_tools
from tests.networks.test_sd3_tools import IDS, KINDS, error, loaded, merge, network, run, said, write
from tests.tiny_sd3 import Variant

models = test_sd3_tools.models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "arguments"), KINDS[:4], ids=str)
def test_diffusers_loads_what_is_converted(
    models: dict[str, Path], tmp_path: Path, variant: Variant, arguments: dict[str, str]
) -> None:
    """The answers of Diffusers' pipeline with the LoRA are those of the merged checkpoint."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    base, out, theirs = models[variant], tmp_path / "m.safetensors", tmp_path / "theirs.safetensors"
    file, back = write(network(base, **arguments), tmp_path / "net.safetensors"), tmp_path / "back.safetensors"
    merge("--sd3_model", base, "--models", file, "--save_to", out)
    wanted = said(loaded(out))
    assert run("networks.convert_lora", "--model", file, "--save_to", theirs, "--to", "diffusers", "--verify") == 0
    to_ours = ("--model", theirs, "--save_to", back, "--to", "kohya", "--family", "sd3", "--verify")
    assert run("networks.convert_lora", *to_ours) == 0
    assert back.read_bytes() == file.read_bytes()
    transformer, first, second, _ = loaded(base)
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3.diffusers_mmdit(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=16),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=theirs.name)
    given = test_lora_sd3.inputs()
    with torch.no_grad():
        found = pipeline.transformer(
            hidden_states=given["x"],
            encoder_hidden_states=given["context"],
            pooled_projections=given["pooled"],
            timestep=given["timesteps"],
        ).sample
        assert error(found, wanted[0]) < 1e-4
        # transformers 5 doesn't find lengths of DoRA under the name that PEFT gives them in files
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2) if "algo" not in arguments else ()
        for index, encoder in enumerate(encoders):
            assert error(encoder(input_ids=IDS).last_hidden_state, wanted[1 + index]) < 1e-4


def test_files_of_diffusers_are_told_apart_by_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for width, family in ((1536, "SD3"), (2432, "SD3"), (3072, "FLUX.1")):
        path, out = tmp_path / f"{width}.safetensors", tmp_path / f"{width}_ours.safetensors"
        layer = "transformer.transformer_blocks.3.attn"
        tensors = {}
        for name in ("to_q", "add_q_proj"):
            tensors[f"{layer}.{name}.lora_A.weight"] = torch.ones(1, width)
            tensors[f"{layer}.{name}.lora_B.weight"] = torch.ones(width, 1)
        files.save_safetensors(tensors, path)
        caplog.clear()
        assert run("networks.convert_lora", "--model", path, "--save_to", out, "--to", "kohya") == 0
        assert f"for {family}:" in caplog.text
