"""The functions that a network module must have, made of what is its own: see `lora_flux.py` for one of a family.

A plug-in says which parts of a model there are, how its `--network_args` are read, and which module gets which size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from library.log import get_logger
from networks import creating
from networks.arguments import Arguments
from networks.base import Network
from networks.creating import Encoders, Parts, Selection, Settings
from networks.groups import BlockRate
from networks.reading import Rank
from networks.targets import Part, another_family

logger = get_logger(__name__)


class Layers(ABC):
    """Which modules get adapters of which size, as far as the arguments of one plug-in say."""

    given: Sequence[str] = ()
    """Those of the arguments that were given and have no meaning where a file says what there is."""

    @abstractmethod
    def selection(self, parts: Parts) -> Selection:
        """The choice for a new network; warns of arguments without effect.

        Errors: UserError for arguments that don't fit the model.
        """

    def encoders(self, names: Sequence[str]) -> list[str]:
        """Those of the text encoders that get adapters: all."""
        return list(names)

    def rates(self, parts: Parts, *, new: bool) -> Mapping[str, BlockRate]:
        """Learning rates of blocks, by the names of the adapters that have them: none. `new`: they are of no file."""
        return {}


@dataclass(frozen=True)
class Plugin:
    """A network module: `create_network` and the others are its methods."""

    parts: Callable[[Encoders | nn.Module | None, nn.Module | None], Parts]
    """Text encoders, in the order of the family and None where one isn't loaded, and the denoiser."""
    layers: Callable[[Arguments, Rank], Layers]
    """Reads the arguments of its own, with the size of the network. Errors: UserError."""
    settings: Callable[[Arguments, float | None], Settings] = Settings.from_arguments
    """Reads the others, with `--network_dropout`. Errors: UserError."""
    size: Callable[[int | None, float | None], Rank] = creating.size_of
    """What `--network_dim` and `--network_alpha` mean. Errors: UserError."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Arguments that needn't be given."""
    later: tuple[str, ...] = ()
    """Arguments whose feature isn't there yet."""
    denoiser: Part = field(kw_only=True)
    """What gets adapters by default."""

    def require_fit(self, tensors: Iterable[str]) -> None:
        """Asked before anything is loaded. Errors: UserError where these tensors of a denoiser are another family's."""
        names = list(tensors)
        if not self.denoiser.is_in(names):
            raise another_family(names)

    def trained_encoders(self, encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
        """Names of the text encoders that get adapters, of all those of the family; asked before anything is loaded.

        Errors: UserError for an argument that doesn't exist or has a wrong value.
        """
        _, layers = self._read(network_args, None, self.size(None, None))
        return layers.encoders(encoder_names)

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
            network_dim: rank, default 4; of OFT the number of blocks.
            network_alpha: scale times rank, default 1; 0 means the rank. Of OFT a limit, see `networks/oft.py`.
            vae: not used.
            text_encoders: those of the family; None where one isn't loaded.
            unet: the denoiser.
            neuron_dropout: probability of dropping an element between the two matrices.
            kwargs: `--network_args`.

        Errors: UserError for an argument that doesn't exist, has a wrong value or does nothing.
        """
        default = self.size(network_dim, network_alpha)
        settings, layers = self._read(kwargs, neuron_dropout, default)
        parts = self.parts(text_encoders, unet)
        network = creating.create(parts, settings, layers.selection(parts), default, multiplier)
        return _with_rates(network, layers.rates(parts, new=True))

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
        """A network with the modules, kinds and sizes of a file, and the file's tensors, not loaded into it yet.

        Errors: DataError when nothing in the file fits the model.
        """
        settings, layers = self._read(kwargs, None, self.size(None, None))
        for name in layers.given:
            logger.warning("%s has no effect: the file says which modules there are, and of which size", name)
        parts = self.parts(text_encoders, unet)
        network, tensors = creating.create_from_weights(parts, settings, multiplier, file, weights_sd, for_inference)
        return _with_rates(network, layers.rates(parts, new=False)), tensors

    def weights_for(
        self, weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
    ) -> dict[str, Tensor]:
        """Those tensors of a file that belong to these parts of the model; empty when none does."""
        return creating.weights_for(self.parts(text_encoders, unet), weights_sd)

    def _read(
        self, given: Mapping[str, object], neuron_dropout: float | None, default: Rank
    ) -> tuple[Settings, Layers]:
        arguments = Arguments({**self.defaults, **given}, self.later)
        settings, layers = self.settings(arguments, neuron_dropout), self.layers(arguments, default)
        arguments.finish()
        return settings, layers


def _with_rates(network: Network, rates: Mapping[str, BlockRate]) -> Network:
    for adapter in network.created:
        adapter.block = rates.get(adapter.name, adapter.block)
    return network
