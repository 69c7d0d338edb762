"""LoHa for FLUX.1: `networks.lora_flux` with `algo=loha`, see `hadamard.py` (`--network_module networks.loha`)."""

from functools import partial

from networks.lora_flux import create_network as _create_network
from networks.lora_flux import create_network_from_weights, trained_encoders, weights_for

__all__ = ["create_network", "create_network_from_weights", "trained_encoders", "weights_for"]

create_network = partial(_create_network, algo="loha")
"""As that of `lora_flux`."""
