"""Which options fit FLUX.1-dev into which graphics card: `python -m library.train.card_table` renews the documents.

The table stands between `<!-- cards:flux:begin -->` and `<!-- cards:flux:end -->`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from library.models.ledger_flux import FluxActivations
from library.train.activations import Shapes
from library.train.advice import Planner
from library.train.forecast import GIB, gib
from library.train.setups import Setup
from library.types import DENOISER, Size

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
CARDS = (8, 10, 12, 16, 24, 48, 80)
"""GiB."""
FREE = 0.96
"""Of a card; the screen and other programs take the rest."""
SIDES = (512, 1024)
RANK = 16

_MARKED = re.compile(r"(<!-- cards:flux:begin -->\n).*?(<!-- cards:flux:end -->)", re.DOTALL)


class Run(NamedTuple):
    """A row's head, and what is run."""

    title: str
    setup: Setup


def table() -> str:
    """The table in Markdown: for each card and kind of training the options to add, GPU and main memory."""
    lines = [
        "| card | training | options to add | GPU memory | main memory |",
        "|---|---|---|---|---|",
    ]
    for card in CARDS:
        for title, setup in runs(flux_shapes()):
            found = planner(setup, card).advice
            flags = " ".join(f"`{flag}`" for flag in found.flags) if found.flags else "none"
            main = sum(found.forecast.main_memory.values())
            cells = [f"{card} GB", title, flags, gib(found.forecast.needed), gib(main)]
            if not found.fits:
                cells[2:] = ["doesn't fit", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def renew(text: str) -> str:
    """The document with a new table."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{table()}\n{match[2]}", text) if _MARKED.search(text) else text


def runs(shapes: Mapping[str, Shapes]) -> Sequence[Run]:
    """LoRA and fine-tuning in the sizes of the table, one image at a time, with all outputs cached."""
    matrices = [shape for name, shape in shapes[DENOISER].items() if "blocks" in name and len(shape) == 2]
    common = Setup(
        full=False,
        trained_elements=RANK * sum(map(sum, matrices)),
        rank=RANK,
        cached_text=True,
        cached_latents=True,
        token_limits=(("clip_l", 77), ("t5xxl", 512)),
    )
    elements = sum(map(math.prod, shapes[DENOISER].values()))
    whole = replace(common, full=True, rank=0, trained_elements=elements)
    return [
        Run(f"{name}, {side} x {side}", replace(setup, size=Size(side, side)))
        for name, setup in ((f"LoRA, rank {RANK}", common), ("fine-tuning", whole))
        for side in SIDES
    ]


@lru_cache
def flux_shapes() -> Mapping[str, Shapes]:
    """Shapes of the tensors of FLUX.1-dev and its text encoders; nothing is loaded."""
    import torch

    from library.models.flux import Flux, FluxConfig

    with torch.device("meta"):
        denoiser = {name: tuple(value.shape) for name, value in Flux(FluxConfig()).named_parameters()}
    return {DENOISER: denoiser, "clip_l": _clip(), "t5xxl": _t5()}


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


def planner(setup: Setup, card: float) -> Planner:
    """The plan of a run of FLUX.1-dev on a card with so many GiB."""
    return Planner(flux_shapes(), _model(), setup, memory=round(FREE * card * GIB))


@lru_cache
def _model() -> FluxActivations:
    """Kept, because it remembers what it has reckoned."""
    from library.models.flux import FluxConfig

    return FluxActivations(FluxConfig())


def main() -> None:
    """Renews the table in all documents."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := renew(text)) != text:
            path.write_text(new, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
