"""Network plug-ins, ours and other people's: found by name, and what the older ones expect."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from library.log import UserError

ON_REQUEST = {"t5xxl": "train_t5xxl"}
"""Text encoders that foreign plug-ins train only with this argument."""


def load(name: str | None) -> ModuleType:
    """The plug-in. Errors: UserError when there is none of that name, or it isn't one."""
    if not name:
        raise UserError("no network type", "--network_module", "such as --network_module networks.lora_flux")
    where = f"--network_module {name}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        is_it = name == missing or name.startswith(f"{missing}.")
        what = "there is no such module" if is_it else f"it needs {missing}, which isn't installed"
        hint = f"pip install the package of {missing}, or check the spelling"
        raise UserError(what, where, hint, code="E-NETWORK-MODULE") from error
    if not hasattr(module, "create_network"):
        raise UserError("it isn't a network module: it has no create_network", where, code="E-NETWORK-MODULE")
    return module


def pairs(items: Sequence[str]) -> dict[str, str]:
    """`key=value` items; values may hold further `=`. Errors: UserError for an item without one, or given twice."""
    found: dict[str, str] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"{item!r} isn't key=value", "--network_args", "such as --network_args verbose=True")
        if key in found:
            raise UserError(f"{key} is given twice", "--network_args", "give it once")
        found[key] = value
    return found


def trained_encoders(names: Sequence[str], arguments: Mapping[str, str]) -> list[str]:
    """The encoders that a plug-in trains which can't be asked."""
    on = [argument for argument, value in arguments.items() if value.lower() in ("true", "1")]
    return [name for name in names if name not in ON_REQUEST or ON_REQUEST[name] in on]


def with_file_paths(encoder: nn.Module) -> nn.Module:
    """An encoder whose module paths are those that files are named after.

    Transformers 5 has dropped the level `text_model` of CLIP; plug-ins that make names of paths need it.
    """
    is_clip = hasattr(getattr(encoder, "encoder", None), "layers")
    if not is_clip or "text_model" in dict(encoder.named_children()):
        return encoder
    outer = nn.Module()
    outer.text_model = encoder
    return outer


def group_names(count: int) -> list[str]:
    """Names of parameter groups that a plug-in gave none."""
    return ["textencoder", "unet"] if count == 2 else ["unet"] if count == 1 else [f"group{i}" for i in range(count)]


def positional_limit(function: Any, most: int) -> int:
    """How many of `most` positional arguments a function takes."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return most
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(most, sum(kind in positional for kind in kinds))


def idle_parameters(
    network: Any, encoders: Mapping[str, nn.Module], unused: Mapping[str, Sequence[str]]
) -> frozenset[int]:
    """Ids of the parameters of adapters on layers of text encoders on which nothing depends.

    They get no gradients, and an optimizer would do to them whatever it does to weights without any, which differs
    with the number of processes. `unused`: see `Models.unused`. Foreign networks don't tell what their adapters are on.
    """
    layers = {
        id(layer)
        for name, encoder in encoders.items()
        for path, layer in encoder.named_modules()
        if f"{path}.".startswith(tuple(unused.get(name, ())))
    }
    adapters = (adapter for adapter in getattr(network, "created", ()) if id(adapter.module) in layers)
    return frozenset(id(parameter) for adapter in adapters for parameter in adapter.parameters())
