"""Makes the toy's denoiser with random weights: FLUX.1-dev in small."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from examples.toy.make_encoders import WIDTH as TEXT_WIDTH
from library.models.flux import Flux, FluxConfig

WIDTH, HEAD_WIDTH = 160, 32


def build() -> Flux:
    """The denoiser at the start: every block passes its input on, and the answer is zero.

    Source: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), adaLN-Zero.
    """
    model = Flux(
        FluxConfig(
            width=WIDTH,
            head_width=HEAD_WIDTH,
            mlp_width=4 * WIDTH,
            double_blocks=3,
            single_blocks=6,
            context_width=TEXT_WIDTH,
            pooled_width=TEXT_WIDTH,
        )
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            silent = name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear"))
            (nn.init.zeros_ if silent else nn.init.xavier_uniform_)(module.weight)
            nn.init.zeros_(module.bias)
    return model


def main() -> None:
    """Reads the command line and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = build()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    save_file(model.state_dict(), arguments.output)


if __name__ == "__main__":
    main()
