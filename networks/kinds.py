"""The algorithms that an adapter can follow, by name: `--network_args algo=...`, or what a file's tensors say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

from torch import Tensor

from library.log import DataError
from networks import hadamard, kronecker, rotation
from networks.arguments import Arguments
from networks.base import ModuleAdapter
from networks.dora import DoraAdapter
from networks.factored import Dropouts, weight_shape
from networks.hadamard import HadamardAdapter
from networks.kronecker import KroneckerAdapter, Splitting
from networks.low_rank import LoraAdapter
from networks.reading import LENGTHS, Rank, lora_size, low_rank, with_alpha
from networks.rotation import RotationAdapter
from networks.targets import Target


class Kind(Protocol):
    """How the change of one weight is made of small matrices."""

    name: str
    """As in `--network_args algo=`."""

    def settings(self, arguments: Arguments) -> object:
        """What its own `--network_args` say, for `create`. Errors: UserError for a wrong value."""

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """A new adapter that changes nothing yet; `settings` are those that the method of this name gave."""

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """An adapter of the sizes of a module's tensors in a file, named without the module's name; not loaded yet.

        None: these tensors are of another kind.
        """


class Lora:
    """Two low-rank matrices."""

    name = "lora"

    def settings(self, arguments: Arguments) -> object:
        """It has none."""
        return None

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`."""
        return LoraAdapter(target.name, target.module, component, **_shared(size, multiplier, dropouts))

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`."""
        size = lora_size(tensors)
        return size and self.create(target, component, size, multiplier, dropouts, None)


@dataclass(frozen=True)
class DoraSettings:
    """Which norms of the weight are kept apart."""

    by_rows: bool = True


class Dora:
    """Two low-rank matrices for the direction of the weight's rows, and their lengths."""

    name = "dora"

    def settings(self, arguments: Arguments) -> object:
        """`wd_on_output=False`: the lengths are those of the columns."""
        return DoraSettings(by_rows=not arguments.given("wd_on_output") or arguments.flag("wd_on_output"))

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`."""
        assert isinstance(settings, DoraSettings)
        shared = _shared(size, multiplier, dropouts)
        return DoraAdapter(target.name, target.module, component, by_rows=settings.by_rows, **shared)

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`."""
        size = low_rank(tensors)
        if size is None or LENGTHS not in tensors:
            return None
        settings = DoraSettings(by_rows=len(tensors[LENGTHS]) == weight_shape(target.module)[0])
        return self.create(target, component, size, multiplier, dropouts, settings)


class Loha:
    """The elementwise product of two low-rank matrices."""

    name = "loha"

    def settings(self, arguments: Arguments) -> object:
        """`use_tucker=True`: kernels of convolutions are divided, too."""
        return arguments.flag("use_tucker")

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`."""
        _, _, *kernel = weight_shape(target.module)
        tucker = bool(settings) and math.prod(kernel) > 1
        shared = _shared(size, multiplier, dropouts)
        return HadamardAdapter(target.name, target.module, component, tucker=tucker, **shared)

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`. Errors: DataError when the file has lengths, too."""
        if not tensors.keys() >= set(hadamard.NAMES):
            return None
        _refuse_lengths(tensors, target, self.name)
        size = with_alpha(tensors["hada_w1_b"].shape[0], tensors)
        return self.create(target, component, size, multiplier, dropouts, hadamard.CORES[0] in tensors)


class Lokr:
    """The Kronecker product of two matrices, low-rank products themselves or not."""

    name = "lokr"

    def settings(self, arguments: Arguments) -> object:
        """How weights are divided: `factor`, `decompose_both`, `full_matrix`, `use_tucker`, and the LyCORIS name of
        the other way round, `unbalanced_factorization`.
        """
        factor = arguments.integer("factor", low=1, special=(-1,))
        return Splitting(
            factor=-1 if factor is None else factor,
            decompose_both=arguments.flag("decompose_both"),
            full_matrix=arguments.flag("full_matrix"),
            tucker=arguments.flag("use_tucker"),
            unbalanced=arguments.flag("unbalanced_factorization"),
        )

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`."""
        assert isinstance(settings, Splitting)
        shapes = settings.shapes(target.module, size.rank)
        shared = _shared(size, multiplier, dropouts)
        return KroneckerAdapter(target.name, target.module, component, shapes=shapes, **shared)

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`. Errors: DataError when the sizes aren't the module's, or the file has lengths, too."""
        shapes = kronecker.shapes_of(tensors)
        if shapes is None:
            return None
        _refuse_lengths(tensors, target, self.name)
        shared = _shared(with_alpha(kronecker.rank_of(shapes), tensors), multiplier, dropouts)
        return KroneckerAdapter(target.name, target.module, component, shapes=shapes, **shared)


class Oft:
    """Blocks of outputs rotated. Instead of a rank it has a number of blocks, and alpha limits the rotations."""

    name = "oft"

    def settings(self, arguments: Arguments) -> object:
        """It has none."""
        return None

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`. Errors: UserError when the number of blocks doesn't divide the outputs."""
        sizes = rotation.parts_of(target)
        rotation.check_blocks([target], size.rank)
        blocks = [size.rank] * len(sizes)
        return RotationAdapter(
            target.name, target.module, component, blocks=blocks, sizes=sizes, alpha=size.alpha, multiplier=multiplier
        )

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`. Errors: DataError when the sizes aren't the module's."""
        shapes = rotation.shapes_of(tensors)
        if not shapes:
            return None
        sizes = [count * size for count, size, _ in shapes]
        if sum(sizes) != weight_shape(target.module)[0]:
            what = f"{target.name}: the file rotates {sum(sizes)} outputs, of {weight_shape(target.module)[0]}"
            raise DataError(what, "network weights", "use it with the model it was made for", code="E-NETWORK-SHAPE")
        blocks = [count for count, *_ in shapes]
        alpha = float(tensors.get("alpha", rotation.DEFAULT_ALPHA))
        return RotationAdapter(
            target.name, target.module, component, blocks=blocks, sizes=sizes, alpha=alpha, multiplier=multiplier
        )


KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (Lora(), Dora(), Loha(), Lokr())}
"""By value of `--network_args algo=`."""

OFT: Kind = Oft()
"""Has modules and names of its own, see `oft_flux.py`."""


def of_file(
    target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
) -> ModuleAdapter | None:
    """An adapter for a module's tensors in a file, of the first kind that knows them; None: none does."""
    for kind in (*KINDS.values(), OFT):
        adapter = kind.of_file(target, component, tensors, multiplier, dropouts)
        if adapter is not None:
            return adapter
    return None


class _Shared(TypedDict):
    """What all adapters are told."""

    rank: int
    alpha: float
    multiplier: float
    dropouts: Dropouts


def _shared(size: Rank, multiplier: float, dropouts: Dropouts) -> _Shared:
    return {"rank": size.rank, "alpha": size.alpha, "multiplier": multiplier, "dropouts": dropouts}


def _refuse_lengths(tensors: Mapping[str, Tensor], target: Target, kind: str) -> None:
    if LENGTHS in tensors:
        what = f"{target.name} is {kind} with DoRA's lengths, which is only known for low-rank matrices"
        raise DataError(what, "network weights", "use LyCORIS: --network_module lycoris.kohya", code="E-NETWORK-FILE")
