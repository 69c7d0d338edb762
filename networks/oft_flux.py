"""OFT for FLUX.1: the outputs of the attention of the double blocks are rotated (`networks.oft_flux`).

`--network_dim` is the number of blocks that the outputs of each layer are divided into, and must divide them.
`--network_alpha` limits the rotations, such as 1e-3. Its `--network_args` besides rules (`networks/rules.py`):

* `enable_all_linear`: all linear layers of the transformer blocks.
* `verbose`: lists the modules.

Text encoders are never changed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from networks import kinds, oft
from networks.creating import Encoders, Parts
from networks.plugin import Plugin
from networks.targets import FLUX, FamilyTargets

TARGETS = FamilyTargets(denoiser=replace(FLUX.denoiser, prefix=oft.PREFIX), extras=None, encoders=())
ATTENTION = r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)"
MORE = {"enable_all_linear": ".+"}


def _parts(text_encoders: Encoders | nn.Module | None, unet: nn.Module | None) -> Parts:
    return Parts(TARGETS, [], unet)


PLUGIN = Plugin(
    _parts,
    partial(oft.Layers, always=ATTENTION, more=MORE),
    partial(oft.settings, kind=kinds.OFT),
    oft.size_of,
    denoiser=TARGETS.denoiser,
)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
