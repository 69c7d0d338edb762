"""Small adapters of every kind in every layout, with names of real models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from networks.layout_files import Adapter, written
from networks.layouts import BLOCKS, COMPONENTS, DENOISER, ROWS, Module, Row
from networks.scaling import Tensors

WIDTH = 12
MLP = 48
RANK = 3


def places(family: str) -> Iterator[tuple[str, Module]]:
    """Some modules of each component; of FLUX and SD3 all kinds of layers."""
    for component, modules in COMPONENTS[family].items():
        found = modules(2)
        if component != DENOISER:
            found = [module for module in found if ".1." in module.own]
        elif family in ("flux", "sd3"):
            found = [m for m in found if ".1." in m.own or "blocks" not in m.own]
        else:
            found = [m for m in found if ".1.transformer_blocks.0.attn1." in m.own or "1.0.in_layers.2" in m.own][:10]
        for module in found:
            yield component, module


def outputs(module: Module, layer: int | None = None) -> int:
    """The outputs of a layer, or of all that are one."""
    sizes = [WIDTH] * 3 + [MLP] if len(module.diffusers) > 1 else [2 * WIDTH if module.swapped else WIDTH]
    sizes = sizes[: len(module.diffusers)]
    return sum(sizes) if layer is None else sizes[layer]


def unit(kind: str, rows: int, *, seed: str, dtype: torch.dtype, alpha: float | None, conv: bool = False) -> Tensors:
    """A random adapter of a layer."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tail, ones = ((3, 3), (1, 1)) if conv else ((), ())
    if kind in ("lora", "dora"):
        made = {"lora_down.weight": random(RANK, WIDTH, *tail), "lora_up.weight": random(rows, RANK, *ones)}
        if kind == "dora":
            made["dora_scale"] = random(rows, *[1] * (3 if conv else 1))
    elif kind == "loha":
        made = {f"hada_w{n}_a": random(rows, RANK) for n in (1, 2)}
        made |= {f"hada_w{n}_b": random(RANK, WIDTH * (9 if conv else 1)) for n in (1, 2)}
    elif kind == "lokr":
        made = {"lokr_w1": random(rows // 2, 2), "lokr_w2_a": random(2, RANK), "lokr_w2_b": random(RANK, WIDTH // 2)}
    else:
        return {BLOCKS[0]: random(3, rows // 3, rows // 3) / 100, "alpha": torch.tensor(alpha or 0.0).to(dtype)}
    if alpha is not None:
        made["alpha"] = torch.tensor(alpha).to(dtype)
    return made


def sample(
    row: Row, kind: str, *, dtype: torch.dtype = torch.float32, alpha: float | None = 2.0, diagonal: bool = False
) -> dict[str, Tensor]:
    """A file of one kind; `diagonal`: fused layers learned apart."""
    adapter = Adapter(row)
    for component, module in places(row.family):
        if kind == "lokr" and len(module.diffusers) > 1 and not row.fused:
            continue  # such a file can't be fused
        conv = ".in_layers.2" in module.own and kind != "lokr"
        if kind == "oft" and component != DENOISER:
            continue
        if kind == "oft" and module.swapped:
            continue
        units: list[Tensors | None] = []
        for index, path in enumerate(row.paths(module)):
            rows = outputs(module, None if row.fused else index)
            seed = f"{component} {path}"
            if kind == "oft" and row.layout == "kohya" and len(module.diffusers) > 1:
                units.append(_rotations(module, seed, dtype, alpha))
                continue
            if kind == "oft" and row.fused and len(module.diffusers) > 1:
                units.append({BLOCKS[0]: torch.randn(rows // 4, 4, 4).to(dtype), "alpha": torch.tensor(0.0)})
                continue
            made = unit(kind, rows, seed=seed, dtype=dtype, alpha=alpha, conv=conv)
            if diagonal and row.fused and len(module.diffusers) > 1:
                made = _diagonal(module, made)
            units.append(made)
        adapter.modules[component, module] = units
    return written(adapter)


def _rotations(module: Module, seed: str, dtype: torch.dtype, alpha: float | None) -> Tensors:
    made: Tensors = {}
    for index in range(len(module.diffusers)):
        own = unit("oft", outputs(module, index), seed=f"{seed} {index}", dtype=dtype, alpha=alpha)
        made |= {BLOCKS[index]: own[BLOCKS[0]], "alpha": own["alpha"]}
    return made


def _diagonal(module: Module, tensors: Tensors) -> Tensors:
    up = tensors["lora_up.weight"]
    sizes = [outputs(module, index) for index in range(len(module.diffusers))]
    rank = RANK * len(sizes)
    whole = torch.zeros(len(up), rank, dtype=up.dtype)
    row = 0
    for index, size in enumerate(sizes):
        whole[row : row + size, index * RANK : (index + 1) * RANK] = up[row : row + size]
        row += size
    down = tensors["lora_down.weight"]
    downs = torch.cat([down * (index + 1) for index in range(len(sizes))])
    return {**tensors, "lora_down.weight": downs, "lora_up.weight": whole}


def pairs(family: str) -> Iterator[tuple[Row, Row]]:
    """All pairs of layouts."""
    rows = [row for (_, of), row in ROWS.items() if of == family]
    yield from ((one, other) for one in rows for other in rows if one is not other)
