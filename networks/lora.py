"""LoRA for SD 1.x, SD 2.x and SDXL: U-Net and text encoders (`--network_module networks.lora`).

By default the linear layers and 1x1 convolutions around attention get adapters. Its `--network_args` besides those of
all networks (`networks/creating.py`, `networks/rules.py`):

* `conv_dim`, `conv_alpha` (default 1): rank and alpha of convolutions with larger kernels. The residual blocks and
  the changes of resolution get adapters only with it; their other layers have the rank of the network.
* `block_dims`, `block_alphas`, `conv_block_dims`, `conv_block_alphas`: a number for each block, see
  `networks/block_weights.py`. A rank of 0: no adapter there.
* `down_lr_weight`, `mid_lr_weight`, `up_lr_weight`: what the learning rate of each block is multiplied by: numbers, or
  sine, cosine, linear, reverse_linear or zeros, with a number added, such as sine+0.25. Blocks with 0 get no adapter;
  `block_lr_zero_threshold` says up to where a weight counts as 0.

`networks.lora_fa`, `networks.dylora` are made of the same parts, with other adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from library.log import get_logger
from library.types import DENOISER
from networks import plugin
from networks.arguments import Arguments
from networks.block_weights import BlockArguments, BlockSizes
from networks.creating import Parts, Selection, Settings
from networks.factored import weight_shape
from networks.groups import BlockRate
from networks.kinds import Kind
from networks.plugin import Plugin
from networks.reading import Rank
from networks.targets import SD, Target
from networks.unet import UnetLayout, parts_of

logger = get_logger(__name__)


class Layers(plugin.Layers):
    """Which modules get adapters of which size, as far as the arguments for U-Nets say."""

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        self._default = default
        dim, alpha = arguments.integer("conv_dim"), arguments.number("conv_alpha")
        conv_alpha = 1.0 if alpha is None else alpha
        self._conv = None if dim is None else Rank(dim, conv_alpha)
        self.blocks = BlockArguments(arguments, default, self._conv, conv_alpha)
        self._idle_alpha = alpha is not None and dim is None and not arguments.given("conv_block_dims")
        self.given = [name for name in ("conv_dim", "conv_alpha") if arguments.given(name)] + self.blocks.given

    def selection(self, parts: Parts) -> Selection:
        """See `plugin.Layers.selection`. Errors: UserError for lists of another length than the model."""
        if self._idle_alpha:
            logger.warning("conv_alpha has no effect without conv_dim")
        layout = None if parts.denoiser is None else UnetLayout.of(parts.denoiser)
        sizes = None if layout is None else self.blocks.sizes(layout)

        def select(target: Target, component: str) -> Rank | None:
            if component != DENOISER:
                return self._default
            assert layout is not None
            linear, conv = self._sizes(sizes, layout.block(target.path)) if sizes else (self._default, self._conv)
            if conv is None and _is_extra(target):
                return None
            size = linear if is_pointwise(target.module) else conv
            return size if size and size.rank else None

        return select

    @staticmethod
    def _sizes(sizes: BlockSizes, block: int) -> tuple[Rank, Rank | None]:
        return sizes.linear[block], None if sizes.conv is None else sizes.conv[block]

    def rates(self, parts: Parts, *, new: bool) -> Mapping[str, BlockRate]:
        """Those of the blocks; a `new` adapter in a block without one is there by a rule."""
        if parts.denoiser is None or not self.blocks.weighted:
            return {}
        layout = UnetLayout.of(parts.denoiser)
        weights = self.blocks.weights(layout)
        assert weights is not None
        blocks = {target.name: layout.block(target.path) for target, part in parts.targets() if part == DENOISER}
        return {name: BlockRate(block, weights[block]) for name, block in blocks.items() if weights[block] or not new}


def settings(arguments: Arguments, neuron_dropout: float | None, kind: Kind | None = None) -> Settings:
    """See `Plugin.settings`; `kind` is that of a plug-in that has only one, None: the arguments choose."""
    found = Settings.from_arguments(arguments, neuron_dropout, kind)
    return found.noting("split_qkv has no effect: U-Nets have no fused layers") if found.split else found


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a linear layer or a 1x1 convolution."""
    return all(side == 1 for side in weight_shape(module)[2:])


def _is_extra(target: Target) -> bool:
    """Whether it lies in a residual block or a change of resolution."""
    assert SD.extras is not None
    return SD.extras.target(target.path, target.module) is not None


PLUGIN = Plugin(parts_of, Layers, settings, denoiser=SD.denoiser)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
