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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from library.log import get_logger
from library.types import DENOISER
from networks import creating
from networks.arguments import Arguments
from networks.base import Network
from networks.block_weights import BlockArguments, BlockSizes
from networks.creating import Encoders, Parts, Settings
from networks.factored import weight_shape
from networks.groups import BlockRate
from networks.kinds import Kind
from networks.reading import Rank
from networks.targets import SD, Target
from networks.unet import UnetLayout, parts_of

logger = get_logger(__name__)


class Layers:
    """Which modules get adapters of which size, as far as the arguments for U-Nets say."""

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        self._default = default
        dim, alpha = arguments.integer("conv_dim"), arguments.number("conv_alpha")
        conv_alpha = 1.0 if alpha is None else alpha
        self._conv = None if dim is None else Rank(dim, conv_alpha)
        self.blocks = BlockArguments(arguments, default, self._conv, conv_alpha)
        if alpha is not None and dim is None and not arguments.given("conv_block_dims"):
            logger.warning("conv_alpha has no effect without conv_dim")
        self.given = [name for name in ("conv_dim", "conv_alpha") if arguments.given(name)] + self.blocks.given
        """Those of the arguments that were given and have no meaning where a file says what there is."""

    def selection(self, parts: Parts) -> creating.Selection:
        """See `creating.Selection`. Errors: UserError for lists of another length than the model."""
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

    def give_rates(self, network: Network, parts: Parts, *, new: bool) -> None:
        """Gives the adapters the learning rates of their blocks; a `new` one in a block without is there by a rule."""
        if parts.denoiser is None or not self.blocks.weighted:
            return
        layout = UnetLayout.of(parts.denoiser)
        weights = self.blocks.weights(layout)
        assert weights is not None
        blocks = {target.name: layout.block(target.path) for target, part in parts.targets() if part == DENOISER}
        for adapter in network.created:
            block = blocks.get(adapter.name)
            if block is not None and (weights[block] or not new):
                adapter.block = BlockRate(block, weights[block])


@dataclass(frozen=True)
class Plugin:
    """The functions of a plug-in for U-Nets."""

    kind: Callable[[Arguments], Kind] | None = None
    """Reads the arguments of the only kind of adapters that it has; None: any kind, `algo` says which."""
    adjust: Callable[[Settings], Settings] = lambda settings: settings
    """Leaves out what the kind can't do."""

    def trained_encoders(self, encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
        """Names of the text encoders that get adapters: all. Errors: UserError for a wrong argument."""
        self._read(Arguments(network_args), None, creating.size_of(None, None))
        return list(encoder_names)

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoders: Encoders | nn.Module | None,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> Network:
        """A new network that changes nothing yet, for the parts of the model that are there.

        Args:
            multiplier: strength of the network.
            network_dim: rank, default 4.
            network_alpha: scale times rank, default 1; 0 means the rank.
            vae: not used.
            text_encoders: one for SD, CLIP-L and CLIP-G for SDXL; None where one isn't loaded.
            unet: the U-Net.
            neuron_dropout: probability of dropping an element between the two matrices.
            kwargs: `--network_args`.

        Errors: UserError for an argument that doesn't exist, has a wrong value or does nothing.
        """
        default = creating.size_of(network_dim, network_alpha)
        settings, layers = self._read(Arguments(kwargs), neuron_dropout, default)
        parts = parts_of(text_encoders, unet)
        network = creating.create(parts, settings, layers.selection(parts), default, multiplier)
        layers.give_rates(network, parts, new=True)
        return network

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | Path | None,
        vae: nn.Module | None,
        text_encoders: Encoders | nn.Module | None,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: object,
    ) -> tuple[Network, Mapping[str, Tensor]]:
        """A network with the modules, kinds and ranks of a file, and the file's tensors, not loaded into it yet.

        Errors: DataError when nothing in the file fits the model.
        """
        settings, layers = self._read(Arguments(kwargs), None, creating.size_of(None, None))
        for name in layers.given:
            logger.warning("%s has no effect: the file says which modules there are, and of which rank", name)
        parts = parts_of(text_encoders, unet)
        network, tensors = creating.create_from_weights(parts, settings, multiplier, file, weights_sd, for_inference)
        layers.give_rates(network, parts, new=False)
        return network, tensors

    def weights_for(
        self, weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
    ) -> dict[str, Tensor]:
        """Those tensors of a file that belong to these parts of the model; empty when none does."""
        return creating.weights_for(parts_of(text_encoders, unet), weights_sd)

    def _read(self, arguments: Arguments, neuron_dropout: float | None, default: Rank) -> tuple[Settings, Layers]:
        kind = self.kind(arguments) if self.kind else None
        settings = self.adjust(Settings.from_arguments(arguments, neuron_dropout, kind))
        layers = Layers(arguments, default)
        if settings.split:
            logger.warning("split_qkv has no effect: U-Nets have no fused layers")
        arguments.finish()
        return settings, layers


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a linear layer or a 1x1 convolution."""
    return all(side == 1 for side in weight_shape(module)[2:])


def _is_extra(target: Target) -> bool:
    """Whether it lies in a residual block or a change of resolution."""
    assert SD.extras is not None
    return SD.extras.target(target.path, target.module) is not None


_PLUGIN = Plugin()
create_network = _PLUGIN.create_network
create_network_from_weights = _PLUGIN.create_network_from_weights
trained_encoders = _PLUGIN.trained_encoders
weights_for = _PLUGIN.weights_for
