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
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from library.log import get_logger
from library.types import DENOISER
from networks import creating
from networks.arguments import Arguments
from networks.base import Network, encoder_component
from networks.creating import Encoders, Parts, Settings
from networks.reading import Rank
from networks.targets import FLUX, Target

logger = get_logger(__name__)

LATER = ("ggpo_sigma", "ggpo_beta")
"""Arguments whose feature isn't there yet."""

ON_REQUEST = {"t5xxl": "train_t5xxl"}
"""Text encoders that get adapters only with an argument."""

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

BLOCKS = re.compile(r"(double|single)_blocks\.(\d+)\.")


def trained_encoders(encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
    """Names of the text encoders that get adapters, of all those of the family; asked before anything is loaded.

    Errors: UserError for an argument that doesn't exist or has a wrong value.
    """
    arguments = Arguments(network_args, LATER)
    _read(arguments, None, creating.size_of(None, None))
    return [name for name in encoder_names if name not in ON_REQUEST or arguments.flag(ON_REQUEST[name])]


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
    """A new network that changes nothing yet, for the parts of the model that are there.

    Args:
        multiplier: strength of the network.
        network_dim: rank, default 4.
        network_alpha: scale times rank, default 1; 0 means the rank.
        vae: not used.
        text_encoders: CLIP-L, T5-XXL; None where one isn't loaded.
        unet: the transformer.
        neuron_dropout: probability of dropping an element between the two matrices.
        kwargs: `--network_args`.

    Errors: UserError for an argument that doesn't exist, has a wrong value or does nothing.
    """
    default = creating.size_of(network_dim, network_alpha)
    settings, layers = _read(Arguments(kwargs, LATER), neuron_dropout, default)
    parts = Parts.of(FLUX, text_encoders, unet)
    layers.check(parts)
    return creating.create(parts, settings, layers.size, default, multiplier)


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
    """A network with the modules, kinds and ranks of a file, and the file's tensors; they aren't loaded into it yet.

    Errors: DataError when nothing in the file fits the model.
    """
    settings, layers = _read(Arguments(kwargs, LATER), None, creating.size_of(None, None))
    for name in layers.given:
        logger.warning("%s has no effect: the file says which modules there are, and of which rank", name)
    parts = Parts.of(FLUX, text_encoders, unet)
    return creating.create_from_weights(parts, settings, multiplier, file, weights_sd, for_inference)


def weights_for(
    weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
) -> dict[str, Tensor]:
    """Those tensors of a file that belong to these parts of the model; empty when none does."""
    return creating.weights_for(Parts.of(FLUX, text_encoders, unet), weights_sd)


def _read(arguments: Arguments, neuron_dropout: float | None, default: Rank) -> tuple[Settings, Layers]:
    """All arguments. Errors: UserError."""
    settings, layers = Settings.from_arguments(arguments, neuron_dropout), Layers(arguments, default)
    arguments.finish()
    return settings, layers


class Layers:
    """Which modules get adapters of which rank, as far as the arguments of FLUX say."""

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        self._idle = [name for name in ("conv_dim", "conv_alpha") if arguments.given(name)]
        self._default = default
        self._blocks = arguments.choice("train_blocks", ("all", "double", "single")) or "all"
        self._indices = {kind: arguments.indices(f"train_{kind}_block_indices") for kind in ("double", "single")}
        self._dims = {name: arguments.integer(name) for name in LAYER_DIMS}
        self._inputs = dict(zip(INPUTS, arguments.integers("in_dims", len(INPUTS)) or [0] * len(INPUTS), strict=True))
        self._trains_t5xxl = arguments.flag("train_t5xxl")
        names = ("train_blocks", *(f"train_{kind}_block_indices" for kind in self._indices), *LAYER_DIMS, "in_dims")
        self.given = [name for name in names if arguments.given(name)]
        """Those of the arguments that were given and have no meaning where a file says what there is."""

    def check(self, parts: Parts) -> None:
        """Complains about what the model hasn't got, and warns of ranks for what isn't trained. Errors: UserError."""
        for name in self._idle:
            logger.warning("%s has no effect: FLUX has no convolutions", name)
        paths = [target.path for target, component in parts.targets() if component == DENOISER]
        if not paths:
            return
        blocks = {match.groups() for match in map(BLOCKS.match, paths) if match}
        for kind, indices in self._indices.items():
            indices.check(sum(kind == of_kind for of_kind, _ in blocks))
        for name, pattern in LAYER_DIMS.items():
            if self._dims[name] and not any(re.fullmatch(pattern, path) and self._trains(path) for path in paths):
                logger.warning("%s has no effect: none of these blocks is trained", name)
        for name, rank in self._inputs.items():
            if rank and not any(path.split(".")[0] == name for path in paths):
                logger.warning("the rank %d of in_dims has no effect: this model has no %s", rank, name)

    def size(self, target: Target, component: str) -> Rank | None:
        """See `creating.Selection`."""
        if component != DENOISER:
            return self._default if component == encoder_component(0) or self._trains_t5xxl else None
        rank = self._rank(target.path) if self._trains(target.path) else 0
        return Rank(rank, self._default.alpha) if rank else None

    def _trains(self, path: str) -> bool:
        """Whether a module of the transformer is in one of the chosen blocks, or in none."""
        block = BLOCKS.match(path)
        return block is None or (self._blocks in ("all", block[1]) and int(block[2]) in self._indices[block[1]])

    def _rank(self, path: str) -> int:
        if not BLOCKS.match(path):
            return self._inputs[path.split(".")[0]]
        own = next((self._dims[name] for name, pattern in LAYER_DIMS.items() if re.fullmatch(pattern, path)), None)
        return self._default.rank if own is None else own
