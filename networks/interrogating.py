"""Which tokens the adapters of a text encoder change most."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from library import devices
from library.log import DataError
from library.models.checkpoints_sd import find_checkpoint
from library.models.loading_sd import load_encoders
from library.models.text_chunks import hidden_state
from library.option_groups import LoraInterrogatorOptions
from library.progress import Progress
from networks import lora, reading
from networks.adapter_file import AdapterFile


@torch.no_grad()
def interrogate(options: LoraInterrogatorOptions, count: int, special: Collection[int]) -> list[tuple[int, float]]:
    """Tokens of a vocabulary and by how much the text encoder's answer to each changes, the most changed first.

    The change is the mean absolute difference of the states of the token and of the mark behind it.

    Args:
        count: of the tokens.
        special: those that are marks; the last two of the vocabulary begin and end texts.

    Errors: DataError when the network has nothing for the text encoder, or changes nothing.
    """
    assert options.sd_model
    assert options.model
    device = devices.device_of(options.device, "--device")
    checkpoint = find_checkpoint(options.sd_model, "sd", "--sd_model")
    if options.v2 and checkpoint.version != "2":
        raise DataError(
            "this is no SD 2.x model", f"--sd_model {options.sd_model}", "leave --v2 out", code="E-MODEL-KIND"
        )
    file = AdapterFile.open(options.model)
    tensors = {key: tensor for key, tensor in reading.read_weights(options.model).items() if key.startswith("lora_te_")}
    if not tensors:
        what = f"it has nothing for the text encoder of SD 1.x or 2.x; it is for {file.family}"
        raise DataError(what, options.model, "use a network that trained it", code="E-NETWORK-FILE")
    for module in file:
        _ = file[module]  # complains of values that aren't finite
    encoder: Any = load_encoders(options.sd_model, torch.float32, device, role="sd", option="--sd_model")[
        "text_encoder"
    ]
    network, tensors = _network(encoder, tensors, options.model)
    size = int(encoder.config.vocab_size)
    begin, end = size - 2, size - 1
    tokens = [token for token in range(min(count, size)) if token not in {begin, end, *special}]
    changes = []
    with Progress("tokens", len(tokens), "tokens") as bar:
        for start in range(0, len(tokens), options.batch_size):
            batch = tokens[start : start + options.batch_size]
            rows = torch.tensor([[begin, token, end] for token in batch], device=device)
            network.set_multiplier(0.0)
            before = _states(encoder, rows, options.clip_skip)
            network.set_multiplier(1.0)
            changes.append((_states(encoder, rows, options.clip_skip) - before).abs().mean((1, 2)).cpu())
            bar.advance(len(batch))
    found = torch.cat(changes)
    if not bool(found.any()):
        raise DataError("it changes no token", options.model, "use a trained network", code="E-MERGE-NOTHING")
    order = found.argsort(descending=True, stable=True).tolist()
    return [(tokens[index], float(found[index])) for index in order]


def _network(encoder: Any, tensors: dict[str, Tensor], path: str) -> tuple[Any, Any]:
    network, translated = lora.create_network_from_weights(
        1.0, path, None, [encoder], None, weights_sd=tensors, for_inference=True
    )
    network.apply_to([encoder], None, True, False)
    network.load_tensors(translated, path)
    return network.to(next(encoder.parameters()).device), translated


def _states(encoder: Any, rows: Tensor, skip: int | None) -> Tensor:
    """Of the token and the mark behind it, (B, 2, D)."""
    layers = int(encoder.config.num_hidden_layers)
    if skip is not None and skip > layers:
        raise DataError(f"it has {layers} layers", f"--clip_skip {skip}", "give a smaller number", code="E-MODEL-PART")
    return hidden_state(encoder, rows, skip)[:, 1:]
