"""Which options fit known models into which graphics card: `python -m library.train.card_table` renews the documents.

A table stands between `<!-- cards:MODEL:begin -->` and `<!-- cards:MODEL:end -->`, MODEL being a key of `SUBJECTS`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.models.ledger_flux import FluxActivations
from library.models.ledger_mmdit import MMDiTActivations
from library.models.ledger_unet import UnetActivations
from library.train.activations import Shapes
from library.train.advice import Planner
from library.train.forecast import GIB, blocks_of, gib
from library.train.setups import Setup
from library.types import DENOISER, Size

if TYPE_CHECKING:
    from torch import nn

    from library.models.activations import ActivationModel

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
CARDS = (8, 10, 12, 16, 24, 48, 80)
"""GiB."""
FREE = 0.96
"""Of a card; the screen and other programs take the rest."""
RANK = 16

_MARKED = re.compile(r"(<!-- cards:(\S+):begin -->\n).*?(<!-- cards:\2:end -->)", re.DOTALL)


class Run(NamedTuple):
    """A row's head, and what is run."""

    title: str
    setup: Setup


@dataclass(frozen=True)
class Subject:
    """A model whose table is made. Nothing of it is loaded."""

    build: Callable[[], nn.Module]
    """The denoiser; asked for within the meta device."""
    reckon: Callable[[nn.Module, Shapes], ActivationModel]
    """What the denoiser takes besides its weights."""
    encoders: Callable[[], Mapping[str, Shapes]]
    tokens: Mapping[str, int]
    """Of a text, by encoder."""
    sides: Sequence[int] = (1024,)
    """Of the images."""

    @cached_property
    def _denoiser(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self.build()

    @cached_property
    def shapes(self) -> Mapping[str, Shapes]:
        """Of the tensors of the denoiser and the text encoders."""
        denoiser = {name: tuple(value.shape) for name, value in self._denoiser.named_parameters()}
        return {DENOISER: denoiser, **self.encoders()}

    @cached_property
    def model(self) -> ActivationModel:
        """Kept, because it remembers what it has reckoned."""
        return self.reckon(self._denoiser, self.shapes[DENOISER])

    def runs(self) -> Sequence[Run]:
        """LoRA and fine-tuning in the sizes of the table, one image at a time, with all outputs cached."""
        blocks = blocks_of(self.shapes[DENOISER], self.model.block_lists)
        matrices = [shape for block in blocks for shape in block.values() if len(shape) == 2]
        common = Setup(
            full=False,
            trained_elements=RANK * sum(map(sum, matrices)),
            rank=RANK,
            cached_text=True,
            cached_latents=True,
            token_limits=tuple(self.tokens.items()),
        )
        elements = sum(map(math.prod, self.shapes[DENOISER].values()))
        whole = replace(common, full=True, rank=0, trained_elements=elements)
        return [
            Run(f"{name}, {side} x {side}", replace(setup, size=Size(side, side)))
            for name, setup in ((f"LoRA, rank {RANK}", common), ("fine-tuning", whole))
            for side in self.sides
        ]

    def planner(self, setup: Setup, card: float) -> Planner:
        """The plan of a run on a card with so many GiB."""
        return Planner(self.shapes, self.model, setup, memory=round(FREE * card * GIB))

    def table(self) -> str:
        """In Markdown: for each card and kind of training the options to add, GPU and main memory."""
        lines = [
            "| card | training | options to add | GPU memory | main memory |",
            "|---|---|---|---|---|",
        ]
        for card in CARDS:
            for title, setup in self.runs():
                found = self.planner(setup, card).advice
                flags = " ".join(f"`{flag}`" for flag in found.flags) if found.flags else "none"
                main = sum(found.forecast.main_memory.values())
                cells = [f"{card} GB", title, flags, gib(found.forecast.needed), gib(main)]
                if not found.fits:
                    cells[2:] = ["doesn't fit", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def renew(text: str) -> str:
    """The document with new tables. Errors: KeyError for a mark that names no model."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{SUBJECTS[match[2]].table()}\n{match[3]}", text)


# the models


def _flux() -> nn.Module:
    from library.models.flux import Flux, FluxConfig

    return Flux(FluxConfig())


def _mmdit(**sizes: Any) -> nn.Module:
    from library.models.mmdit import MMDiT, MMDiTConfig

    return MMDiT(MMDiTConfig(qk_norm=True, **sizes))


def _sd35_medium() -> nn.Module:
    return _mmdit(table_side=384, dual_blocks=frozenset(range(13)))


def _sd35_large() -> nn.Module:
    return _mmdit(depth=38, width=2432, mlp_width=4 * 2432)


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return model


def _of_config(kind: Callable[[Any], ActivationModel]) -> Callable[[nn.Module, Shapes], ActivationModel]:
    return lambda denoiser, shapes: kind(denoiser.config)


def _clip(width: int = 768, layers: int = 12) -> Shapes:
    found = {"embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width)}
    for layer in range(layers):
        for name in "qkvo":
            found[f"encoder.layers.{layer}.self_attn.{name}.weight"] = (width, width)
        found[f"encoder.layers.{layer}.mlp.fc1.weight"] = (4 * width, width)
        found[f"encoder.layers.{layer}.mlp.fc2.weight"] = (width, 4 * width)
    return found


def _t5(width: int = 4096, inner: int = 10240, layers: int = 24) -> Shapes:
    found = {"shared.weight": (32128, width)}
    for layer in range(layers):
        for name in "qkvo":
            found[f"encoder.block.{layer}.layer.0.SelfAttention.{name}.weight"] = (width, width)
        for name in ("wi_0", "wi_1"):
            found[f"encoder.block.{layer}.layer.1.DenseReluDense.{name}.weight"] = (inner, width)
        found[f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight"] = (width, inner)
    return found


def _clip_g() -> Shapes:
    return _clip(1280, 32)


_SD3: dict[str, Any] = {
    "reckon": _of_config(MMDiTActivations),
    "encoders": lambda: {"clip_l": _clip(), "clip_g": _clip_g(), "t5xxl": _t5()},
    "tokens": {"clip_l": 77, "clip_g": 77, "t5xxl": 256},
}
SUBJECTS = {
    "flux": Subject(
        _flux,
        _of_config(FluxActivations),
        lambda: {"clip_l": _clip(), "t5xxl": _t5()},
        {"clip_l": 77, "t5xxl": 512},
        (512, 1024),
    ),
    "sd3.5-medium": Subject(_sd35_medium, **_SD3),
    "sd3.5-large": Subject(_sd35_large, **_SD3),
    "sdxl": Subject(
        _sdxl,
        lambda denoiser, shapes: UnetActivations(shapes),
        lambda: {"text_encoder": _clip(), "text_encoder_2": _clip_g()},
        {"text_encoder": 77, "text_encoder_2": 77},
    ),
}
"""By the names in the marks."""


def main() -> None:
    """Renews the tables in all documents."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := renew(text)) != text:
            path.write_text(new, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
