"""OFT for SD 1.x, SD 2.x and SDXL: the outputs of attention are rotated (`--network_module networks.oft`).

`--network_dim` is the number of blocks that the outputs of each layer are divided into, and must divide them.
`--network_alpha` limits the rotations, such as 1e-3. Its `--network_args` besides rules (`networks/rules.py`):

* `enable_all_linear`: all linear layers and 1x1 convolutions around attention.
* `enable_conv`: the residual blocks and the changes of resolution.
* `verbose`: lists the modules.

Text encoders are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from library.log import DataError, get_logger
from library.types import DENOISER
from networks import creating, kinds, rotation
from networks.arguments import Arguments
from networks.base import ModuleAdapter, Network
from networks.creating import Encoders, Parts, Settings
from networks.factored import Dropouts, weight_shape
from networks.groups import LrRatios
from networks.reading import Rank
from networks.rotation import KEY, RotationAdapter
from networks.rules import Rules
from networks.targets import UNET_BLOCKS, Target
from networks.unet import family

logger = get_logger(__name__)

PREFIX = "oft_unet"
ATTENTION = re.compile(rf"{UNET_BLOCKS}\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d\.to_(q|k|v|out\.0)")
AROUND_ATTENTION = re.compile(rf"{UNET_BLOCKS}\.attentions\..+")
_PART = f"{KEY}.0"


class WholeRotationAdapter(RotationAdapter):
    """A rotation of all outputs of a module, whose blocks are one tensor in files."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether the blocks are there."""
        return KEY in names

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `RotationAdapter.load`."""
        super().load({**tensors, _PART: tensors[KEY]})

    def file_tensors(self) -> dict[str, Tensor]:
        """See `ModuleAdapter.file_tensors`."""
        return {KEY if key == _PART else key: tensor for key, tensor in super().file_tensors().items()}


class WholeOft:
    """See `networks.kinds.Kind`. Instead of a rank it has a number of blocks, and alpha limits the rotations."""

    name = "oft"

    def settings(self, arguments: Arguments) -> object:
        """It has none."""
        return None

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`. Errors: UserError when the number of blocks doesn't divide the outputs."""
        rotation.check_blocks([target], size.rank)
        return WholeRotationAdapter(
            target.name,
            target.module,
            component,
            blocks=[size.rank],
            sizes=weight_shape(target.module)[:1],
            alpha=size.alpha,
            multiplier=multiplier,
        )

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`. Errors: DataError when the sizes aren't the module's."""
        blocks = tensors.get(KEY)
        if blocks is None or blocks.ndim != 3:
            return None
        rotated, outputs = blocks.shape[0] * blocks.shape[1], weight_shape(target.module)[0]
        if rotated != outputs:
            what = f"{target.name}: the file rotates {rotated} outputs, of {outputs}"
            raise DataError(what, "network weights", "use it with the model it was made for", code="E-NETWORK-SHAPE")
        alpha = float(tensors.get("alpha", rotation.DEFAULT_ALPHA))
        return self.create(target, component, Rank(blocks.shape[0], alpha), multiplier, dropouts, None)


def trained_encoders(encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
    """None of the text encoders. Errors: UserError for an argument that doesn't exist or has a wrong value."""
    _read(Arguments(network_args))
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
        unet: the U-Net.
        neuron_dropout: not used.
        kwargs: `--network_args`.

    Errors: UserError for an argument that doesn't exist or has a wrong value, and a number of blocks that doesn't fit.
    """
    arguments = Arguments(kwargs)
    settings, everywhere, convolutions = _read(arguments)
    if neuron_dropout or arguments.number("dropout"):
        logger.warning("--network_dropout has no effect: OFT has nothing to leave out")
    alpha = network_alpha or rotation.DEFAULT_ALPHA
    if alpha >= 1:
        logger.warning("--network_alpha %g hardly limits the rotations; usual is %g", alpha, rotation.DEFAULT_ALPHA)
    size = Rank(creating.DEFAULT_RANK if network_dim is None else int(network_dim), alpha)
    parts = _parts(unet)

    def select(target: Target, component: str) -> Rank | None:
        around = AROUND_ATTENTION.fullmatch(target.path)
        wanted = ATTENTION.fullmatch(target.path) or (everywhere if around else convolutions)
        return size if component == DENOISER and wanted else None

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
    settings, *_ = _read(arguments)
    for name in ("enable_all_linear", "enable_conv"):
        if arguments.given(name):
            logger.warning("%s has no effect: the file says which modules there are", name)
    return creating.create_from_weights(_parts(unet), settings, multiplier, file, weights_sd, for_inference)


def weights_for(
    weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
) -> dict[str, Tensor]:
    """Those tensors of a file that belong to the U-Net, if it is there; empty when none does."""
    return creating.weights_for(_parts(unet), weights_sd)


def _parts(unet: nn.Module | None) -> Parts:
    return Parts(replace(family(unet, prefix=PREFIX), encoders=()), [], unet)


def _read(arguments: Arguments) -> tuple[Settings, bool, bool]:
    """All arguments: the settings, `enable_all_linear`, `enable_conv`. Errors: UserError."""
    everywhere, convolutions = arguments.flag("enable_all_linear"), arguments.flag("enable_conv")
    arguments.given("dropout")
    settings = Settings(
        kind=WHOLE_OFT,
        kind_settings=None,
        dropouts=Dropouts(),
        lr_ratios=LrRatios(),
        rules=Rules.from_arguments(arguments),
        split=False,
        verbose=arguments.flag("verbose"),
    )
    arguments.finish()
    return settings, everywhere, convolutions


WHOLE_OFT: kinds.Kind = WholeOft()
