"""OFT for FLUX.1: the outputs of the attention of the double blocks are rotated (`networks.oft_flux`).

`--network_dim` is the number of blocks that the outputs of each layer are divided into, and must divide them.
`--network_alpha` limits the rotations, such as 1e-3. Its `--network_args` besides rules (`networks/rules.py`):

* `enable_all_linear`: all linear layers of the transformer blocks.
* `verbose`: lists the modules.

Text encoders are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from library.log import get_logger
from library.types import DENOISER
from networks import creating, kinds, rotation
from networks.arguments import Arguments
from networks.base import Network
from networks.creating import Encoders, Parts, Settings
from networks.factored import Dropouts
from networks.groups import LrRatios
from networks.reading import Rank
from networks.rules import Rules
from networks.targets import FLUX, FamilyTargets, Target

logger = get_logger(__name__)

TARGETS = FamilyTargets(denoiser=replace(FLUX.denoiser, prefix="oft_unet"), extras=None, encoders=())
ATTENTION = re.compile(r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)")


def trained_encoders(encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
    """None of the text encoders."""
    return []


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: Encoders | nn.Module | None,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> Network:
    """A new network that changes nothing yet.

    Args:
        multiplier: strength of the network.
        network_dim: number of blocks, default 4.
        network_alpha: the norm of what makes the rotation of n outputs is limited to this times n; default 1e-3, and
            0 means that, too.
        vae: not used.
        text_encoders: not used.
        unet: the transformer.
        neuron_dropout: not used.
        kwargs: `--network_args`.

    Errors: UserError for an argument that doesn't exist or has a wrong value, and a number of blocks that doesn't fit.
    """
    arguments = Arguments(kwargs)
    everywhere = arguments.flag("enable_all_linear")
    settings = _settings(arguments)
    if neuron_dropout or arguments.given("dropout"):
        logger.warning("--network_dropout has no effect: OFT has nothing to leave out")
    arguments.finish()
    alpha = network_alpha or rotation.DEFAULT_ALPHA
    if alpha >= 1:
        logger.warning("--network_alpha %g hardly limits the rotations; usual is %g", alpha, rotation.DEFAULT_ALPHA)
    size = Rank(creating.DEFAULT_RANK if network_dim is None else int(network_dim), alpha)
    parts = Parts.of(TARGETS, [], unet)

    def select(target: Target, component: str) -> Rank | None:
        return size if component == DENOISER and (everywhere or ATTENTION.fullmatch(target.path)) else None

    rotation.check_blocks([target for target, component in parts.targets() if select(target, component)], size.rank)
    return creating.create(parts, settings, select, size, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: nn.Module | None,
    text_encoders: Encoders | nn.Module | None,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network with the modules and blocks of a file, and the file's tensors; they aren't loaded into it yet.

    Errors: DataError when nothing in the file fits the model.
    """
    arguments = Arguments(kwargs)
    arguments.given("dropout")
    if arguments.given("enable_all_linear"):
        logger.warning("enable_all_linear has no effect: the file says which modules there are")
    settings = _settings(arguments)
    arguments.finish()
    parts = Parts.of(TARGETS, [], unet)
    return creating.create_from_weights(parts, settings, multiplier, file, weights_sd, for_inference)


def weights_for(
    weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
) -> dict[str, Tensor]:
    """Those tensors of a file that belong to the transformer, if it is there; empty when none does."""
    return creating.weights_for(Parts.of(TARGETS, [], unet), weights_sd)


def _settings(arguments: Arguments) -> Settings:
    return Settings(
        kind=kinds.OFT,
        kind_settings=None,
        dropouts=Dropouts(),
        lr_ratios=LrRatios(),
        rules=Rules.from_arguments(arguments),
        split=False,
        verbose=arguments.flag("verbose"),
    )
