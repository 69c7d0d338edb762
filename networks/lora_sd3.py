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
from networks.targets import SD3, Target

logger = get_logger(__name__)

T5 = "t5xxl"
"""The text encoder that gets adapters only with `train_t5xxl`, and its number among the encoders."""
T5_COMPONENT = encoder_component(2)

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

BLOCK = re.compile(r"joint_blocks\.(\d+)\.")


def trained_encoders(encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
    """Names of the text encoders that get adapters, of all those of the family; asked before anything is loaded.

    Errors: UserError for an argument that doesn't exist or has a wrong value.
    """
    _, layers = _read(Arguments(network_args), None, creating.size_of(None, None))
    return [name for name in encoder_names if name != T5 or layers.trains_t5xxl]


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
        text_encoders: CLIP-L, CLIP-G, T5-XXL; None where one isn't loaded.
        unet: the transformer.
        neuron_dropout: probability of dropping an element between the two matrices.
        kwargs: `--network_args`.

    Errors: UserError for an argument that doesn't exist, has a wrong value or does nothing.
    """
    default = creating.size_of(network_dim, network_alpha)
    settings, layers = _read(Arguments(kwargs), neuron_dropout, default)
    parts = Parts.of(SD3, text_encoders, unet)
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
    settings, layers = _read(Arguments(kwargs), None, creating.size_of(None, None))
    for name in layers.given:
        logger.warning("%s has no effect: the file says which modules there are, and of which rank", name)
    parts = Parts.of(SD3, text_encoders, unet)
    return creating.create_from_weights(parts, settings, multiplier, file, weights_sd, for_inference)


def weights_for(
    weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
) -> dict[str, Tensor]:
    """Those tensors of a file that belong to these parts of the model; empty when none does."""
    return creating.weights_for(Parts.of(SD3, text_encoders, unet), weights_sd)


def _read(arguments: Arguments, neuron_dropout: float | None, default: Rank) -> tuple[Settings, Layers]:
    """All arguments. Errors: UserError."""
    settings, layers = Settings.from_arguments(arguments, neuron_dropout), Layers(arguments, default)
    arguments.finish()
    return settings, layers


class Layers:
    """Which modules get adapters of which rank, as far as the arguments of SD3 say."""

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments. Errors: UserError."""
        self._idle = [name for name in ("conv_dim", "conv_alpha") if arguments.given(name)]
        self._default = default
        self._blocks = arguments.indices("train_block_indices")
        self._dims = {name: arguments.integer(name) for name in LAYER_DIMS}
        self._edges = dict(zip(EDGES, arguments.integers("emb_dims", len(EDGES)) or [0] * len(EDGES), strict=True))
        self.trains_t5xxl = arguments.flag("train_t5xxl")
        self.given = [name for name in ("train_block_indices", *LAYER_DIMS, "emb_dims") if arguments.given(name)]
        """Those of the arguments that were given and have no meaning where a file says what there is."""

    def check(self, parts: Parts) -> None:
        """Complains about blocks that the model hasn't got, and warns of ranks for what isn't trained.

        Errors: UserError.
        """
        for name in self._idle:
            logger.warning("%s has no effect: SD3 has no convolutions in its blocks", name)
        paths = [target.path for target, component in parts.targets() if component == DENOISER]
        blocks = {int(match[1]) for match in map(BLOCK.match, paths) if match}
        if not blocks:
            return
        self._blocks.check(len(blocks))
        for name, pattern in LAYER_DIMS.items():
            if self._dims[name] and not any(re.fullmatch(pattern, path) and self._trains(path) for path in paths):
                logger.warning("%s has no effect: none of these blocks is trained", name)

    def size(self, target: Target, component: str) -> Rank | None:
        """See `creating.Selection`."""
        if component != DENOISER:
            return self._default if component != T5_COMPONENT or self.trains_t5xxl else None
        rank = self._rank(target.path)
        return Rank(rank, self._default.alpha) if rank else None

    def _trains(self, path: str) -> bool:
        match = BLOCK.match(path)
        return match is not None and int(match[1]) in self._blocks

    def _rank(self, path: str) -> int:
        if not BLOCK.match(path):
            return next(rank for start, rank in self._edges.items() if path.startswith(f"{start}.") or path == start)
        own = next((self._dims[name] for name, pattern in LAYER_DIMS.items() if re.fullmatch(pattern, path)), None)
        return 0 if not self._trains(path) else self._default.rank if own is None else own
