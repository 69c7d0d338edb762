"""The autoencoder: sizes, sampling of latents, and equality with the Diffusers class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.log import DataError
from library.models import autoencoder, loading
from tests import tiny


def reference() -> torch.nn.Module:
    """The same tiny autoencoder, made by hand with the Diffusers class."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tiny.fill(model, 2)
    return model


@pytest.mark.parametrize("diffusers", [False, True])
def test_file_of_either_layout_gives_the_diffusers_model(tmp_path: Path, diffusers: bool) -> None:
    vae = loading.load_autoencoder(tiny.write_autoencoder(tmp_path / "ae.safetensors", diffusers=diffusers))
    expected = reference()
    state = expected.state_dict()
    assert vae.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    pixels = torch.rand(1, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        posterior = expected.encode(pixels).latent_dist
        mean = autoencoder.encode(vae, pixels).mean
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-6)
        assert mean.shape == (1, 16, 4, 2)
        drawn = torch.randn(mean.shape)
        sample = autoencoder.encode(vae, pixels).sample(drawn)
        torch.testing.assert_close(sample, posterior.mean + posterior.std * drawn, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(autoencoder.decode(vae, mean), expected.decode(mean).sample, rtol=1e-5, atol=1e-6)


def test_log_variance_is_not_clamped() -> None:
    class Stub(torch.nn.Module):
        quant_conv = None

        def encoder(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.cat((torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 42.0)), dim=1)

    sample = autoencoder.encode(Stub(), torch.zeros(1, 3, 8, 8)).sample(torch.ones(1))
    torch.testing.assert_close(sample.item(), float(torch.exp(torch.tensor(21.0))))


def test_quant_convolutions_by_presence() -> None:
    shapes = tiny.autoencoder_shapes() | {"quant_conv.weight": (32, 32, 1, 1), "post_quant_conv.weight": (16, 16, 1, 1)}
    vae = autoencoder.build_autoencoder(shapes)
    assert vae.quant_conv is not None
    assert vae.post_quant_conv is not None
    assert autoencoder.build_autoencoder(tiny.autoencoder_shapes()).quant_conv is None


def test_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="not an image autoencoder"):
        autoencoder.build_autoencoder({"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)})
