"""A network that `sd3_train_network.py` trained does in the pipeline of Diffusers what it does here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.families.sd3 import Sd3
from library.families.sd3_files import Sd3Model
from library.models.keymaps import Mapped
from library.models.keymaps_sd3 import mmdit_to_diffusers
from library.models.sd3_text import context, joint_clip
from networks import lora_sd3, reading
from tests import tiny_sd3
from tests.cells_sd3 import NETWORK, MakeSd3Cell
from tests.tiny_sd3 import Variant

CPU, TEXT, STEPS = torch.device("cpu"), "a cat on a mat", "4"
ENCODERS = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


def for_diffusers(tensors: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """A file in the layout of PEFT, worked out from the names of the transformer alone: rows of `up` are the weight's.

    So what is split or swapped on the way to Diffusers is in `up`, and `down` stays, times alpha / rank.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    paths = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes}
    ups, downs, found = {}, {}, {}
    for module, parts in reading.by_module(tensors).items():
        down = parts["lora_down.weight"] * (parts["alpha"] / len(parts["lora_down.weight"]))
        if module.startswith("lora_unet_"):
            name = paths[module.removeprefix("lora_unet_")]
            ups[name], downs[name] = parts["lora_up.weight"], down
        else:
            start = next(start for start in ENCODERS if module.startswith(start))
            layer = module.removeprefix(f"{start}text_model_encoder_layers_").split("_", 1)
            inside = layer[1].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
            path = f"{ENCODERS[start]}.text_model.encoder.layers.{layer[0]}.{inside}"
            found |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": parts["lora_up.weight"]}
    for theirs, recipe in mmdit_to_diffusers(shapes).items():
        if set(recipe.sources) <= ups.keys():
            path = f"transformer.{theirs.removesuffix('.weight')}"
            found[f"{path}.lora_A.weight"] = downs[recipe.sources[0]]
            found[f"{path}.lora_B.weight"] = Mapped(ups, {theirs: recipe})[theirs].contiguous()
    return found


def answers(sd3: Sd3, encoders: dict[str, torch.nn.Module], model: torch.nn.Module) -> dict[str, Tensor]:
    """What our encoders say of the text, and the transformer of noise with it."""
    with torch.no_grad():
        cond = joint_clip(sd3.encode_text(encoders, sd3.tokenize([TEXT])), tiny_sd3.L_WIDTH)
        return {
            "text": context(cond["lg_out"], cond["t5_out"], tiny_sd3.CONTEXT_WIDTH),
            "pooled": cond["lg_pooled"],
            "velocity": sd3.predict(model, noise(), torch.tensor([700.0]), cond),
        }


def their_answers(pipeline: Any, length: int) -> dict[str, Tensor]:
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            TEXT, TEXT, TEXT, do_classifier_free_guidance=False, max_sequence_length=length
        )
        velocity = pipeline.transformer(
            hidden_states=noise(),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([700.0]),
        ).sample
    return {"text": text, "pooled": pooled, "velocity": velocity}


def noise() -> Tensor:
    return torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)


@pytest.mark.parametrize("split", ["False", "True"])
@pytest.mark.parametrize("variant", ["medium", "5-medium"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_gives_the_same_answers(
    make_sd3: MakeSd3Cell, sd3_models: dict[str, Path], tmp_path: Path, variant: Variant, split: str
) -> None:
    from diffusers import StableDiffusion3Pipeline

    name = "sd3" if variant == "medium" else "sd3.5"
    cell = make_sd3(NETWORK, name)
    cell("--max_train_steps", STEPS, "--learning_rate", "3e-2", "--network_args", f"split_qkv={split}")
    path = cell.output / "run.safetensors"

    sd3 = Sd3(Sd3Model(str(sd3_models[name]), {}), str(sd3_models["tokenizers"]))
    model, encoders = sd3.load_denoiser(CPU, torch.float32), sd3.load_encoders(sd3.encoder_names, CPU, torch.float32)
    plain = answers(sd3, encoders, model)
    converted = for_diffusers(cell.weights(), model)
    network, tensors = lora_sd3.create_network_from_weights(
        1.0, path, None, [*encoders.values()], model, for_inference=True
    )
    network.merge_to([*encoders.values()], model, tensors)
    ours = answers(sd3, encoders, model)
    assert distance(plain, ours) > 0.02

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3.write_folder(tmp_path / "folder", variant))
    assert distance(their_answers(pipeline, 256), plain) < 1e-4
    pipeline.load_lora_weights(converted)
    assert set(pipeline.get_list_adapters()) == {"transformer", *ENCODERS.values()}
    assert distance(their_answers(pipeline, 256), ours) < 1e-4
