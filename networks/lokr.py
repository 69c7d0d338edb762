"""LoKr for FLUX.1: `networks.lora_flux` with `algo=lokr`, see `kronecker.py` (`--network_module networks.lokr`)."""

from __future__ import annotations

from dataclasses import replace

from networks import lora_flux

PLUGIN = replace(lora_flux.PLUGIN, defaults={"algo": "lokr"})
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
