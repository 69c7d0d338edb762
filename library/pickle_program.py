"""The pickle in a PyTorch file, done instruction by instruction; nothing that it names is ever called.

A pickle is a small program that makes an object. The few functions that make tensors and dictionaries are recognised by
name and done by hand, some harmless classes are stood for by a dummy, and whatever else it asks for is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from library.files import DTYPES

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
"""Classes of storages in torch -> element types as safetensors names them."""
_ELEMENTS = {torch_name: name for name, torch_name in DTYPES.items()}
ITEM_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of an element, where not one."""
_INERT = {
    *("argparse", "collections", "ldm", "lightning", "lightning_fabric", "numpy", "omegaconf", "pathlib"),
    *("pytorch_lightning", "torch", "typing"),
}
"""Packages whose classes training programs leave in their files; a dummy stands for whatever they would make."""
_INERT_NAMES = {
    *("_codecs.encode", "copy_reg._reconstructor", "copyreg._reconstructor"),
    *("__builtin__.object", "__builtin__.set", "builtins.object", "builtins.set"),
}
"""Functions and classes of Python itself for which a dummy stands, too."""


class RefusalError(Exception):
    """What is wrong with a program, in a few words."""


@dataclass(frozen=True)
class GlobalName:
    """A function or class that the program names."""

    module: str
    name: str


@dataclass(frozen=True)
class StoragePlan:
    """A storage that the program refers to."""

    dtype: str
    """As safetensors names it."""
    key: str
    """Its name in the archive."""
    elements: int


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that the program makes; offset and strides count elements."""

    dtype: str
    storage: StoragePlan
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Dummy:
    """Stands for an object of no interest."""


def span_of(tensor: TensorPlan) -> int:
    """Elements from its first to its last."""
    if not all(tensor.shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def _rebuild_tensor(storage: StoragePlan, offset: int, shape: Any, strides: Any, *rest: Any) -> TensorPlan:
    """What `torch._utils._rebuild_tensor`, `_v2` and `_v3` say; the type is the third of `rest` in `_v3`."""
    dtype = next((_ELEMENTS[value.name] for value in rest[2:3] if isinstance(value, GlobalName)), storage.dtype)
    if not isinstance(storage, StoragePlan):
        raise RefusalError("a tensor has no storage")
    tensor = TensorPlan(dtype, storage, offset, tuple(shape), tuple(strides))
    numbers = (offset, *tensor.shape, *tensor.strides)
    room = storage.elements * ITEM_SIZES.get(storage.dtype, 1) // ITEM_SIZES.get(dtype, 1)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise RefusalError("the shape of a tensor makes no sense")
    if offset + max(span_of(tensor), math.prod(tensor.shape)) > room:  # more elements than data: an expanded one
        raise RefusalError("a tensor reaches beyond its data")
    return tensor


def _rebuild_parameter(data: TensorPlan, *_: Any) -> TensorPlan:
    return data


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor with attributes, or of a class of its own."""
    return _called(function, arguments)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> Any:
    """A key of a table. Nested tuples could take for ever to hash."""
    if isinstance(key, tuple) and any(isinstance(value, tuple) for value in key):
        raise RefusalError("the keys of its tables make no sense")
    return key


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): tuple,
}


def _global(module: str, name: str) -> GlobalName:
    """A name that the program may say. Errors: RefusalError for all others."""
    if module.partition(".")[0] not in _INERT and f"{module}.{name}" not in _INERT_NAMES:
        raise RefusalError(f"it wants to run {module}.{name}, as no model needs to")
    return GlobalName(module, name)


def _called(function: Any, arguments: Any) -> Any:
    if isinstance(function, GlobalName) and isinstance(arguments, tuple):
        made = _FUNCTIONS.get((function.module, function.name))
        return made(*arguments) if made else Dummy()
    if isinstance(function, Dummy):
        return function
    raise RefusalError("it calls what can't be called")


def _storage(key: Any) -> StoragePlan:
    """The storage that a program refers to by ("storage", class, name, device, elements)."""
    word, kind, name, _, elements = key
    if word != "storage" or type(elements) is not int or elements < 0 or not isinstance(name, str):
        raise RefusalError("it refers to something that isn't data")
    return StoragePlan(_STORAGES[kind.name], name, elements)


_MARK = Dummy()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}
_ARGUMENTS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
"""Instructions that put their argument on the stack."""
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class Machine:
    """Does what a pickle says, as far as `_FUNCTIONS` go."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, program: bytes) -> Any:
        """What the program makes."""
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _ARGUMENTS:
                self.stack.append(argument)
            elif name in _TUPLES:
                self.stack.append(self._last(_TUPLES[name]))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self.memo[len(self.memo) if name == "MEMOIZE" else int(str(argument))] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[int(str(argument))])
            elif name not in ("PROTO", "FRAME"):
                self._act(name, argument)
        raise RefusalError("its table of tensors ends early")

    def _act(self, name: str, argument: Any) -> None:
        match name:
            case "TUPLE":
                self.stack.append(tuple(self._marked()))
            case "GLOBAL":
                self.stack.append(_global(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_global(*self._last(2)))
            case "REDUCE" | "NEWOBJ":
                self.stack.append(_called(*self._last(2)))
            case "BUILD":  # the state of an object; tables of tensors need none
                self._last(1)
            case "BINPERSID":
                self.stack.append(_storage(self.stack.pop()))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = list(self._last(1)) if name == "APPEND" else self._marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                pairs = list(self._last(2)) if name == "SETITEM" else self._marked()
                self._top(dict).update(_dictionary(zip(pairs[::2], pairs[1::2], strict=True)))
            case _:
                raise RefusalError(f"its table of tensors has the instruction {name}, as no model needs")

    def _last(self, count: int) -> tuple[Any, ...]:
        """The last values, taken from the stack."""
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """The values since the last mark, taken from the stack with it."""
        start = next(index for index in range(len(self.stack) - 1, -2, -1) if self.stack[index] is _MARK)
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        """What is filled next; what is put into a dummy goes nowhere."""
        top = self.stack[-1]
        if isinstance(top, kind):
            return top
        if isinstance(top, Dummy) and top is not _MARK:
            return kind()
        raise RefusalError("it fills what can't be filled")
