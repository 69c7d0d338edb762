"""What the inference scripts share: which text goes to which encoder, guidance, sizes, parts that come and go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.epsilon import Epsilon, EpsilonSettings
from library.generate.painter import VAE, LoraFile, Painter
from library.log import UserError
from library.prompts import SampleRequest
from library.types import DENOISER
from networks import lora_flux

REQUEST = SampleRequest(prompt="cat", width=70, height=64, steps=2, seed=4, cfg=5.0, sampler="euler_a", guidance=None)
WORDS = ("cat", "dog", "ugly", "")


class Family:
    """Two encoders that say the number of the text, and a denoiser that remembers what it was told."""

    encoder_names = ("one", "two")
    traits = SimpleNamespace(latent_channels=4, latent_stride=8, patch=1)

    def __init__(self) -> None:
        self.told, self.loaded, self.broken = [], [], False

    def tokenize(self, captions):
        return {"ids": torch.tensor([[WORDS.index(caption)] for caption in captions])}

    def encode_text(self, encoders, tokens):
        bad = torch.nan if self.broken else 0.0
        return {name: encoder.weight.sum() * 0 + tokens["ids"].float() + bad for name, encoder in encoders.items()}

    def size_cond(self, original_sizes, crops, size):
        return {"sizes": torch.tensor([[*original_sizes[0], *crops[0], *size]])}

    def load_encoders(self, names, device, dtype):
        self.loaded += names
        return {name: nn.Linear(1, 1, dtype=dtype) for name in names}

    def load_denoiser(self, device, dtype):
        self.loaded.append(DENOISER)
        return nn.Linear(1, 1, dtype=dtype)

    def load_vae(self, device, dtype):
        self.loaded.append(VAE)
        return nn.Linear(1, 1, dtype=dtype)

    def objective(self):
        return Epsilon(EpsilonSettings())

    def sampling_shift(self):
        return False

    def predict(self, denoiser, x, timesteps, cond, guidance=None):
        self.told.append({name: tensor.tolist() for name, tensor in cond.items()})
        return torch.tanh(x) + 0.01 * cond["two"][:, :, None, None]

    def decode_latents(self, vae, latents):
        return torch.tanh(latents[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3)


def painter(family: Family, **more) -> Painter:
    names = (*family.encoder_names, DENOISER, VAE)
    types = dict.fromkeys(names, torch.float32)
    return Painter(family, types, torch.device("cpu"), lambda weights: lora_flux, **more)


def test_the_second_encoder_gets_the_second_prompt() -> None:
    family = Family()
    image = painter(family).render(SampleRequest(**{**vars(REQUEST), "prompt2": "dog", "negative_prompt": "ugly"}))
    assert image.size == (64, 64)
    assert family.told[0] == {
        "one": [[2.0], [0.0]],
        "two": [[2.0], [1.0]],
        "sizes": [[64, 64, 0, 0, 64, 64]] * 2,
    }
    painter(family).render(REQUEST)
    assert family.told[-1]["one"] == family.told[-1]["two"] == [[3.0], [0.0]], "an empty negative prompt, and the same"


def test_without_guidance_there_is_one_pass() -> None:
    family = Family()
    painter(family).render(SampleRequest(**{**vars(REQUEST), "cfg": 1.0, "negative_prompt": "ugly"}))
    assert [told["one"] for told in family.told] == [[[0.0]]] * 2


def test_the_seed_decides_the_image() -> None:
    one = painter(Family())
    images = [one.render(REQUEST).tobytes(), one.render(REQUEST).tobytes(), painter(Family()).render(REQUEST).tobytes()]
    assert len(set(images)) == 1
    assert one.render(SampleRequest(**{**vars(REQUEST), "seed": 5})).tobytes() not in images


def test_encoders_are_dropped_where_one_prompt_comes() -> None:
    family = Family()
    kept, dropped = painter(family), painter(family, keep_encoders=False)
    for one in (kept, dropped):
        one.render(REQUEST)
        one.render(REQUEST)
    assert family.loaded == ["one", "two", DENOISER, VAE, "one", "two", DENOISER, VAE, "one", "two"]


def test_texts_that_are_not_numbers_are_refused() -> None:
    family = Family()
    family.broken = True
    with pytest.raises(UserError) as caught:
        painter(family).render(REQUEST)
    assert caught.value.code == "E-NONFINITE"


def test_network_files_on_the_command_line(tmp_path) -> None:
    assert LoraFile.parse("a;b.safetensors;0.5") == LoraFile("a;b.safetensors", 0.5)
    assert LoraFile.parse("a.safetensors") == LoraFile("a.safetensors", 1.0)
    with pytest.raises(UserError, match="'much'"):
        LoraFile.parse("a.safetensors;much")
    (missing,) = LoraFile(str(tmp_path / "none.safetensors")).findings()
    assert missing.error
