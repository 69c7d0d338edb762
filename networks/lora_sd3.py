"""LoRA for SD3 and SD3.5: transformer, CLIP-L, CLIP-G and T5-XXL (`--network_module networks.lora_sd3`).

Its `--network_args` besides those of all networks (`networks/creating.py`, `networks/rules.py`):

* `context_attn_dim`, `context_mlp_dim`, `context_mod_dim`, `x_attn_dim`, `x_mlp_dim`, `x_mod_dim`: ranks of the text
  and of the image stream. 0: no adapter there. Alpha stays that of the network.
* `emb_dims`: six ranks for context_embedder, t_embedder, x_embedder, y_embedder and the modulation and the linear layer
  of final_layer, which have none otherwise.
* `train_block_indices`: all, none, or numbers and ranges such as 0,3-5.
* `split_qkv`: queries, keys and values get matrices of their own.
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
from networks.targets import SD3
from networks.transformer_layers import TransformerLayers

LAYER_DIMS = {
    f"{stream}_{kind}_dim": rf"joint_blocks\.\d+\.{stream}_block\.{layers}\..+"
    for stream in ("context", "x")
    for kind, layers in (("attn", "attn2?"), ("mlp", "mlp"), ("mod", "adaLN_modulation"))
}
"""Arguments with a rank, and the paths of the modules that get it."""

EDGES = (
    "context_embedder",
    "t_embedder",
    "x_embedder",
    "y_embedder",
    "final_layer.adaLN_modulation",
    "final_layer.linear",
)
"""Beginnings of the paths of layers outside the blocks, in the order of `emb_dims`."""


class Layers(TransformerLayers):
    """Which modules get adapters of which rank, as far as the arguments of SD3 say."""

    dims = LAYER_DIMS
    block = re.compile(r"joint_blocks\.(\d+)\.")
    outside = "emb_dims", EDGES
    choices = ("train_block_indices",)
    t5_component = encoder_component(2)
    no_convolutions = "SD3 has no convolutions in its blocks"

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        super().__init__(arguments, default)
        self._blocks = arguments.indices("train_block_indices")

    def trains(self, path: str) -> bool:
        """See `TransformerLayers.trains`."""
        match = self.block.match(path)
        assert match, path
        return int(match[1]) in self._blocks

    def check_blocks(self, paths: Sequence[str]) -> None:
        """See `TransformerLayers.check_blocks`."""
        self._blocks.check(len({match[1] for match in map(self.block.match, paths) if match}))


PLUGIN = Plugin(partial(Parts.of, SD3), Layers, denoiser=SD3.denoiser)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
