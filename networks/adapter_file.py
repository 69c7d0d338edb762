"""Adapter files as the tools see them: modules one at a time, checked, in whatever container."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.files import DTYPES, LazyTensors
from library.log import DataError
from library.models import detect
from library.models.locations import open_tensors
from library.pickles import PickledTensors
from networks import hadamard, kronecker, reading
from networks.reading import Rank

OWN_KINDS = ("lora", "oft", "lycoris")
"""Of `detect`, files in these names."""
UNKNOWN_FAMILY = "a model that isn't known here"
NEUTRAL = ("text encoders only", UNKNOWN_FAMILY)
"""Families that go with every other one."""
DOWN, UP, ALPHA, LENGTHS = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"


@dataclass(frozen=True)
class Info:
    """A tensor as the header has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class AdapterFile(Mapping[str, Mapping[str, Tensor]]):
    """The modules of an adapter in kohya's names: module -> its tensors by what follows the first dot.

    Tensors are read when they are asked for, in the type they are stored in, and refused if they aren't finite.
    Iteration is in the order of the file. `oft_unet_x` with `oft_blocks` is seen as `lora_unet_x` with `oft_blocks.0`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: str, metadata: Mapping[str, str] | None = None) -> None:
        """`tensors` may be lazy, or names converted before; `path` is for messages.

        Errors: DataError when it is no adapter file: it has no module, or is a whole model.
        """
        self.path, self.metadata = path, dict(metadata or {})
        self._tensors = tensors
        infos = _infos(tensors)
        _check_kind({key: info.shape for key, info in infos.items()}, path)
        self._keys: dict[str, dict[str, str]] = {}
        """Module -> name of a tensor in it -> key in the file."""
        self.keys_left: Sequence[str] = [key for key in tensors if "." not in key]
        """Keys that belong to no module: those without a dot."""
        for key in tensors:
            module, dot, rest = key.partition(".")
            if dot:
                rest = "oft_blocks.0" if rest == "oft_blocks" else rest
                self._keys.setdefault(_seen(module), {})[rest] = key
        self._infos = infos
        self.family = family_of(self._keys)
        """As `reading.LORA_FAMILIES` calls it: FLUX, SDXL, "SD 1.x or 2.x", SD3, "text encoders only", or unknown."""

    @classmethod
    def open(cls, path: Path | str) -> AdapterFile:
        """A file, lazily if it is safetensors. Errors: DataError when it is none, or no adapter."""
        if not Path(path).is_file():
            raise DataError("the network file isn't there", str(path), code="E-NETWORK-FILE")
        tensors = open_tensors([Path(path)], mmap=False)
        return cls(tensors, str(path), tensors.metadata)

    def __getitem__(self, module: str) -> Mapping[str, Tensor]:
        """Errors: DataError for values that aren't finite."""
        return {name: self._checked(key) for name, key in self._keys[module].items()}

    def _checked(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        check_finite(tensor, key, self.path)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, module: object) -> bool:
        return module in self._keys

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return Path(self.path).name

    def key(self, module: str) -> str:
        """The first key of a module, for messages."""
        return next(iter(self._keys[module].values()))

    def infos(self, module: str) -> dict[str, Info]:
        """Shapes and types of a module's tensors, without reading them."""
        return {name: self._infos[key] for name, key in self._keys[module].items()}

    def renamed(self, names: Mapping[str, str]) -> AdapterFile:
        """The same file with other names of modules, where `names` has one."""
        new = AdapterFile.__new__(AdapterFile)
        new.__dict__.update(self.__dict__)
        new._keys = {names.get(module, module): keys for module, keys in self._keys.items()}
        new.family = family_of(new._keys)
        return new

    def only(self, modules: Collection[str]) -> AdapterFile:
        """The same file with some of its modules."""
        new = self.renamed({})
        new._keys = {module: keys for module, keys in self._keys.items() if module in modules}
        return new

    def kind(self, module: str) -> str | None:
        """lora, dora, loha, lokr, oft; None: unknown. From names alone."""
        return kind_of(self._keys[module])

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """Of the weight that a module changes, from the header; (out,) for OFT, None where it can't be told.

        That of LoHa and LoKr without a core is a matrix, whatever the weight is.
        """
        return weight_shape({name: info.shape for name, info in self.infos(module).items()})

    def sizes(self) -> dict[str, Rank]:
        """Rank and alpha of each LoRA or DoRA module, without reading its matrices."""
        found = {}
        for module, keys in self._keys.items():
            if DOWN in keys and UP in keys:
                rank = self._infos[keys[DOWN]].shape[0]
                alpha = float(self._checked(keys[ALPHA])) if ALPHA in keys else rank
                found[module] = Rank(rank, float(alpha))
        return found

    def dtype(self) -> torch.dtype:
        """The type of most of its matrices."""
        types = Counter(info.dtype for info in self._infos.values() if math.prod(info.shape) > 1)
        return types.most_common(1)[0][0] if types else torch.float32

    def require(self, kinds: Sequence[str], tool: str) -> None:
        """Errors: DataError, naming three modules, when the file has modules of other kinds than the tool works on."""
        others = [module for module in self if self.kind(module) not in kinds]
        if others:
            named = ", ".join(self.key(module) for module in others[:3])
            what = f"{len(others)} of {len(self)} modules are no {' or '.join(kinds)}, which {tool} is for: {named}"
            raise DataError(what, self.path, "networks/convert_lora.py may help", code="E-ADAPTER-KIND")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; by the smallest and the largest, which is many times quicker than one by one."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensor: Tensor, key: str, path: str) -> None:
    """Errors: DataError when some value isn't finite."""
    if not is_finite(tensor):
        raise DataError(f"{key} has values that aren't finite", path, "the file is broken", code="E-TENSOR-FINITE")


def family_of(names: Collection[str]) -> str:
    """The family that modules of these names are for, as `reading.LORA_FAMILIES` calls it."""
    for beginnings, family in reading.LORA_FAMILIES:
        if any(name.startswith(beginnings) for name in names):
            return family
    return UNKNOWN_FAMILY


def same_family(files: Sequence[AdapterFile]) -> str:
    """The family of all. Errors: DataError when they are for different models, or a module's shapes differ."""
    families = {file.family: file for file in reversed(files)}
    known = [family for family in families if family not in NEUTRAL]
    if len(known) > 1:
        named = " and ".join(f"{families[family].name} is for {family}" for family in reversed(known))
        raise DataError(f"different models: {named}", files[0].path, "merge files for one", code="E-ADAPTER-FAMILY")
    first: dict[str, tuple[AdapterFile, tuple[int, ...] | None]] = {}
    for file in files:
        for module in file:
            shape = file.weight_shape(module)
            other, known_shape = first.setdefault(module, (file, shape))
            if not _compatible(shape, known_shape):
                what = f"{file.key(module)} is for a weight {shape}, in {other.name} {known_shape}"
                raise DataError(what, file.path, "merge files for the same model", code="E-ADAPTER-SHAPE")
    return known[0] if known else files[0].family


def _compatible(shape: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    if shape is None or other is None:
        return True
    if 1 in (len(shape), len(other)):
        return shape[0] == other[0]
    return shape[0] == other[0] and math.prod(shape) == math.prod(other)


def kind_of(names: Collection[str]) -> str | None:
    """The kind of a module whose tensors have these names: lora, dora, loha, lokr, oft; None: unknown."""
    if DOWN in names and UP in names:
        return "dora" if LENGTHS in names else "lora"
    if set(hadamard.NAMES) <= set(names):
        return "loha"
    if any(name.startswith("lokr_w1") for name in names) and any(name.startswith("lokr_w2") for name in names):
        return "lokr"
    return "oft" if "oft_blocks.0" in names else None


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """See `AdapterFile.weight_shape`."""
    kind = kind_of(shapes)
    if kind in ("lora", "dora"):
        return (shapes[UP][0], *shapes[DOWN][1:])
    if kind == "loha":
        if hadamard.CORES[0] in shapes:
            return (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes[hadamard.CORES[0]][2:])
        return (shapes["hada_w1_a"][0], math.prod(shapes["hada_w1_b"][1:]))
    if kind == "lokr":
        return _kronecker_shape(shapes)
    if kind == "oft":
        return (sum(shape[0] * shape[1] for name, shape in shapes.items() if name.startswith("oft_blocks.")),)
    return None


def _kronecker_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    if not kronecker.shapes_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}):
        return None
    a, c = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        b, d, *kernel = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        b, d, kernel = shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], list(shapes["lokr_t2"][2:])
    else:
        b, d, kernel = shapes["lokr_w2_a"][0], math.prod(shapes["lokr_w2_b"][1:]), []
    return (a * b, c * d, *kernel)


def _seen(module: str) -> str:
    return f"lora_unet_{module.removeprefix('oft_unet_')}" if module.startswith("oft_unet_") else module


def _infos(tensors: Mapping[str, Tensor]) -> dict[str, Info]:
    if isinstance(tensors, LazyTensors | PickledTensors):
        return {
            key: Info(info.shape, getattr(torch, DTYPES.get(info.dtype, "float32")))
            for key, info in tensors.infos.items()
        }
    return {key: Info(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def _check_kind(shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    if not shapes:
        raise DataError("the file is empty", path, code="E-NETWORK-FILE")
    kind = detect.detect(shapes)
    if kind.name == "lora_diffusers":
        hint = "convert it first: networks/convert_lora.py"
        raise DataError(f"it is {kind.description}: {', '.join(list(shapes)[:3])}", path, hint, code="E-NETWORK-FILE")
    if kind.name not in OWN_KINDS:
        named = ", ".join(list(shapes)[:3])
        raise DataError(f"no LoRA but {kind.description}: {named}", path, code="E-NETWORK-FILE")
