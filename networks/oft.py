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
from functools import partial

from torch import Tensor, nn

from library.log import DataError, get_logger
from library.types import DENOISER
from networks import creating, plugin, rotation
from networks.arguments import Arguments
from networks.base import ModuleAdapter
from networks.creating import Encoders, Parts, Selection, Settings
from networks.factored import Dropouts, weight_shape
from networks.groups import LrRatios
from networks.kinds import Kind
from networks.plugin import Plugin
from networks.reading import Rank
from networks.rotation import KEY, RotationAdapter
from networks.rules import Rules
from networks.targets import SD, UNET_BLOCKS, Target
from networks.unet import family

logger = get_logger(__name__)

PREFIX = "oft_unet"
ATTENTION = rf"{UNET_BLOCKS}\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d\.to_(q|k|v|out\.0)"
AROUND_ATTENTION = rf"{UNET_BLOCKS}\.attentions\..+"
MORE = {"enable_all_linear": AROUND_ATTENTION, "enable_conv": rf"(?!{AROUND_ATTENTION}).+"}
NO_DROPOUT = "--network_dropout has no effect: OFT has nothing to leave out"
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


WHOLE_OFT: Kind = WholeOft()


class Layers(plugin.Layers):
    """The layers of a denoiser at some paths, with one number of blocks for all."""

    def __init__(self, arguments: Arguments, size: Rank, always: str, more: Mapping[str, str]) -> None:
        """Reads the arguments that the patterns in `more` belong to: flags. Errors: UserError."""
        self._size = size
        self._paths = re.compile("|".join([always, *(more[name] for name in more if arguments.flag(name))]))
        self.given = [name for name in more if arguments.given(name)]

    def selection(self, parts: Parts) -> Selection:
        """See `plugin.Layers.selection`. Errors: UserError when the number of blocks doesn't divide the outputs."""
        chosen = [target for target, component in parts.targets() if self._select(target, component)]
        rotation.check_blocks(chosen, self._size.rank)
        return self._select

    def _select(self, target: Target, component: str) -> Rank | None:
        return self._size if component == DENOISER and self._paths.fullmatch(target.path) else None

    def encoders(self, names: Sequence[str]) -> list[str]:
        """None."""
        return []


def size_of(network_dim: int | None, network_alpha: float | None) -> Rank:
    """The number of blocks, default 4, and alpha: what makes the rotation of n outputs gets a norm of n times that.

    Alpha is 1e-3 by default, and 0 means that, too.
    """
    alpha = network_alpha or rotation.DEFAULT_ALPHA
    if alpha >= 1:
        logger.warning("--network_alpha %g hardly limits the rotations; usual is %g", alpha, rotation.DEFAULT_ALPHA)
    return Rank(creating.DEFAULT_RANK if network_dim is None else int(network_dim), alpha)


def settings(arguments: Arguments, neuron_dropout: float | None, kind: Kind) -> Settings:
    """See `Plugin.settings`: there are none but rules."""
    dropout = arguments.number("dropout")
    found = Settings(
        kind=kind,
        kind_settings=None,
        dropouts=Dropouts(),
        lr_ratios=LrRatios(),
        rules=Rules.from_arguments(arguments),
        split=False,
        verbose=arguments.flag("verbose"),
    )
    return found.noting(NO_DROPOUT) if neuron_dropout or dropout else found


def _parts(text_encoders: Encoders | nn.Module | None, unet: nn.Module | None) -> Parts:
    return Parts(replace(family(unet, prefix=PREFIX), encoders=()), [], unet)


PLUGIN = Plugin(
    _parts,
    partial(Layers, always=ATTENTION, more=MORE),
    partial(settings, kind=WHOLE_OFT),
    size_of,
    denoiser=SD.denoiser,
)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
