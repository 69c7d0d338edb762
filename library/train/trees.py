"""Nested state dicts as plain data: a JSON tree, and a safetensors file for the tensors in it. No pickle anywhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library import files
from library.log import DataError, UserError

Tree = Any
"""What JSON can hold. Objects are used only as tags: `{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, …"""


def write_tree(value: object, folder: Path, stem: str) -> None:
    """Writes any nesting of dicts, lists, tuples, numbers, strings and tensors.

    It goes to `<stem>.json`, the tensors, if any, to `<stem>.safetensors`.
    Errors: UserError for a value that isn't plain data.
    """
    tensors: dict[str, Tensor] = {}
    tree = encode(value, tensors, "")
    if tensors:
        files.save_safetensors(tensors, folder / f"{stem}.safetensors", {})
    text = json.dumps(tree, ensure_ascii=False, allow_nan=False)
    with files.atomic_write(folder / f"{stem}.json") as path:
        path.write_text(text, encoding="utf-8")


def read_tree(folder: Path, stem: str, device: torch.device | str = "cpu") -> Any:
    """What `write_tree` wrote; tensors that lay on an accelerator come back to `device`, the others to the CPU.

    Errors: DataError when a file is missing or damaged.
    """
    path = folder / f"{stem}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't read a part of the state: {error}", str(path), "use an older state", code="E-STATE-BAD"
        ) from error
    tensor_file = folder / f"{stem}.safetensors"
    try:
        if not tensor_file.exists():
            return decode(tree, {}, torch.device(device))
        with files.LazyTensors(tensor_file) as tensors:
            return decode(tree, tensors, torch.device(device))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"a part of the state is damaged: {error!r}", str(path), "use an older state", code="E-STATE-BAD"
        ) from error


def encode(value: object, tensors: dict[str, Tensor], name: str) -> Tree:
    """The JSON tree of a value; its tensors are added to `tensors` under names made from their place."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, name)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_tensor(value, tensors, name)
    if isinstance(value, Mapping):
        pairs = [
            [encode(key, tensors, f"{name}.key"), encode(item, tensors, f"{name}/{key}" if name else str(key))]
            for key, item in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if isinstance(value, (list, tuple, set)):
        items = [encode(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple" if isinstance(value, tuple) else "set": items}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise UserError(
        f"a value of type {type(value).__name__} can't be stored in a state",
        name,
        "states hold only numbers, strings and tensors; another optimizer or scheduler can be saved",
        code="E-STATE-VALUE",
    )


def decode(tree: Tree, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value of a JSON tree made by `encode`. Errors: KeyError, TypeError, ValueError for anything else."""
    if isinstance(tree, list):
        return [decode(item, tensors, device) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree or "array" in tree:
        return _decode_tensor(tree, tensors, device)
    (tag, content), *rest = tree.items()
    if rest:
        raise ValueError(f"several tags: {sorted(tree)}")
    return _DECODERS[tag](content, tensors, device)


def _pairs(content: Any, tensors: Mapping[str, Tensor], device: torch.device) -> dict[Any, Any]:
    return {decode(key, tensors, device): decode(item, tensors, device) for key, item in content}


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor], torch.device], Any]] = {
    "dict": _pairs,
    "counter": lambda content, tensors, device: Counter(_pairs(content, tensors, device)),
    "tuple": lambda content, tensors, device: tuple(decode(item, tensors, device) for item in content),
    "set": lambda content, tensors, device: {decode(item, tensors, device) for item in content},
    "float": lambda content, tensors, device: float(content),
    "bytes": lambda content, tensors, device: bytes.fromhex(content),
    "dtype": lambda content, tensors, device: _dtype(content),
    "device": lambda content, tensors, device: torch.device(content),
}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a dtype: {name}")
    return dtype


def _encode_tensor(value: Tensor | np.ndarray[Any, Any], tensors: dict[str, Tensor], name: str) -> Tree:
    while name in tensors or not name:
        name += "_"
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    complex_numbers = value.is_complex()
    tensors[name] = torch.view_as_real(value.detach()) if complex_numbers else value.detach()
    tree = {"tensor": name, "on": "cpu" if value.device.type == "cpu" else "device"}
    return tree | {"complex": True} if complex_numbers else tree


def _decode_tensor(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if "array" in tree:
        return tensors[tree["array"]].numpy().copy()
    tensor = tensors[tree["tensor"]].clone()
    if tree.get("complex"):
        tensor = torch.view_as_complex(tensor)
    return tensor.to(device) if tree["on"] == "device" else tensor
