"""LoRA for FLUX.1: transformer, CLIP-L and T5-XXL (`--network_module networks.lora_flux`).

Its `--network_args` besides those of all networks (`networks/creating.py`, `networks/rules.py`):

* `img_attn_dim`, `txt_attn_dim`, `img_mlp_dim`, `txt_mlp_dim`, `img_mod_dim`, `txt_mod_dim`: ranks in the double
  blocks; `single_dim` (linear1 and linear2) and `single_mod_dim`: in the single blocks. 0: no adapter there. Alpha
  stays that of the network.
* `in_dims`: five ranks for img_in, time_in, vector_in, guidance_in, txt_in, which have none otherwise.
* `train_blocks`: all, double or single; `train_double_block_indices`, `train_single_block_indices`: all, none, or
  numbers and ranges such as 0,3-5.
* `split_qkv`: queries, keys, values and the MLP in a fused layer get matrices of their own.
* `train_t5xxl`: adapters for T5-XXL, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from networks.arguments import Arguments
from networks.base import encoder_component
from networks.creating import Parts
from networks.plugin import Plugin
from networks.reading import Rank
from networks.targets import FLUX
from networks.transformer_layers import TransformerLayers

LATER = ("ggpo_sigma", "ggpo_beta")
"""Arguments whose feature isn't there yet."""

LAYER_DIMS = {
    "img_attn_dim": r"double_blocks\.\d+\.img_attn\..+",
    "txt_attn_dim": r"double_blocks\.\d+\.txt_attn\..+",
    "img_mlp_dim": r"double_blocks\.\d+\.img_mlp\..+",
    "txt_mlp_dim": r"double_blocks\.\d+\.txt_mlp\..+",
    "img_mod_dim": r"double_blocks\.\d+\.img_mod\..+",
    "txt_mod_dim": r"double_blocks\.\d+\.txt_mod\..+",
    "single_dim": r"single_blocks\.\d+\.linear[12]",
    "single_mod_dim": r"single_blocks\.\d+\.modulation\..+",
}
"""Arguments with a rank, and the paths of the modules that get it."""

INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""Layers, each of one linear or two, in the order of `in_dims`."""

KINDS = ("double", "single")
"""Of blocks."""


class Layers(TransformerLayers):
    """Which modules get adapters of which rank, as far as the arguments of FLUX say."""

    dims = LAYER_DIMS
    block = re.compile(r"(double|single)_blocks\.(\d+)\.")
    outside = "in_dims", INPUTS
    choices = ("train_blocks", *(f"train_{kind}_block_indices" for kind in KINDS))
    t5_component = encoder_component(1)
    no_convolutions = "FLUX has no convolutions"

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        super().__init__(arguments, default)
        self._blocks = arguments.choice("train_blocks", ("all", *KINDS)) or "all"
        self._indices = {kind: arguments.indices(f"train_{kind}_block_indices") for kind in KINDS}

    def trains(self, path: str) -> bool:
        """See `TransformerLayers.trains`."""
        match = self.block.match(path)
        assert match, path
        return self._blocks in ("all", match[1]) and int(match[2]) in self._indices[match[1]]

    def check_blocks(self, paths: Sequence[str]) -> None:
        """See `TransformerLayers.check_blocks`."""
        blocks = {match.groups() for match in map(self.block.match, paths) if match}
        for kind, indices in self._indices.items():
            indices.check(sum(kind == of_kind for of_kind, _ in blocks))


PLUGIN = Plugin(partial(Parts.of, FLUX), Layers, later=LATER, denoiser=FLUX.denoiser)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
