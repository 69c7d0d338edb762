"""How much memory a run will take in each of its phases, known from the headers of its files. Pure arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from library.models.activations import ActivationModel, Gradients, Step, Training
from library.train import activations
from library.train.setups import Setup
from library.types import DENOISER

GIB = 2**30
CONTEXT = GIB // 2
"""What the driver and its libraries take of the device for themselves."""
FRAGMENTS = 1.03
"""What the allocator takes, of what is asked for: gaps between tensors."""
PROCESS = 3 * GIB
"""Main memory of a process with torch and its libraries."""

STATE_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("adamw", "pagedadamw", "pagedadamw32bit", "adamwschedulefree"), 8),
    **dict.fromkeys(("adamw8bit", "pagedadamw8bit"), 2),
    **dict.fromkeys(("lion", "pagedlion", "sgdnesterov", "sgdschedulefree"), 4),
    **dict.fromkeys(("lion8bit", "pagedlion8bit", "sgdnesterov8bit"), 1),
    **dict.fromkeys(("prodigy", "dadaptadam", "dadaptation", "dadaptadampreprint", "dadaptadanip", "dadaptadan"), 16),
    "adafactor": 0.01,
}
"""What an optimizer remembers of each trained element, in bytes, also of bfloat16; others are taken for AdamW."""
UPDATE_BYTES = 16
"""What an optimizer takes for itself while it moves a weight, for each element; torch's AdamW on a GPU takes none."""
LOWERING_BYTES = 12
"""What storing a weight in fewer bits takes meanwhile, for each element: it in float32, and two products of it."""

_IN_A_BLOCK = re.compile(r"(?:^|[._])(?:blocks?|layers?)\.\d+\.")
"""Names of the tensors that are stored in fewer bits, see `library.models.quantized`."""

Phase = Literal["text encoding", "image encoding", "loading the denoiser", "training", "sampling"]


@dataclass(frozen=True)
class Forecast:
    """Bytes by phase and by what takes them; without what the driver takes."""

    phases: Mapping[Phase, Mapping[str, int]]
    main_memory: Mapping[str, int]
    overhead: bool = True
    """Whether the device is one whose driver takes memory, too."""

    def total(self, phase: Phase) -> int:
        """Of a phase, as the program itself counts it."""
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def needed(self) -> int:
        """What the device must have, with what driver and allocator take."""
        return self.needed_in(self.worst)

    def needed_in(self, phase: Phase) -> int:
        """As `needed`, of a phase."""
        return round(self.total(phase) * FRAGMENTS) + CONTEXT if self.overhead else self.total(phase)

    def lines(self) -> list[str]:
        """The forecast for people, one line a phase."""
        rows: dict[str, tuple[int, Mapping[str, int]]] = {
            phase: (self.needed_in(phase), parts) for phase, parts in self.phases.items()
        }
        rows["main memory"] = sum(self.main_memory.values()), self.main_memory
        width = max(map(len, rows))
        return [f"{name:<{width}}  {gib(total):>9}: {listed(parts)}" for name, (total, parts) in rows.items()]


def forecast(
    shapes: Mapping[str, activations.Shapes],
    model: ActivationModel,
    setup: Setup,
    autoencoder: activations.Shapes | None = None,
) -> Forecast:
    """What a run needs, from the shapes of the denoiser and of each text encoder (`Family.part_shapes`).

    The weights of `autoencoder` None are taken for those of FLUX.
    """
    weights = _Weights.of(shapes, model, setup)
    vae = (activations.AUTOENCODER if autoencoder is None else activations.elements(autoencoder)) * setup.vae_size
    lasting = {"text encoders": weights.kept_encoders}
    phases: dict[Phase, Mapping[str, int]] = {}
    if weights.encoders:
        reading = sum(
            activations.encoding(shapes[name], setup.text_batch, setup.tokens(name), setup.compute)
            for name in weights.encoder_names
        )
        phases["text encoding"] = {"text encoders": weights.encoders, "activations": reading}
    pixels = setup.size.area * (setup.vae_batch if setup.cached_latents else setup.batch)
    looking = activations.autoencoder(pixels, setup.vae_size, decoding=False)
    phases["image encoding"] = {**lasting, "autoencoder": vae, "activations": looking}
    if not setup.cached_latents:
        lasting = {**lasting, "autoencoder": vae}
    phases["loading the denoiser"] = {**lasting, "denoiser": weights.denoiser, "one weight": weights.on_the_way}
    step = _step(model, setup, weights)
    lasting |= {"denoiser": weights.denoiser, **weights.beside()}
    learning = sum(
        activations.encoder_training(
            shapes[name],
            setup.batch,
            setup.tokens(name),
            setup.compute,
            checkpointed=setup.checkpoint_every > 0,
        )
        for name in setup.trained_encoders
    )
    phases["training"] = {**lasting, **_working(setup, weights, step), "text encoders at work": learning}
    if setup.sample is not None:
        phases["sampling"] = {**lasting, **_sampling(model, setup, 0 if "autoencoder" in lasting else vae)}
    main = {
        "program": PROCESS,
        "streamed blocks": weights.streamed,
        "their gradients and optimizer state": weights.moved,
        "activations": step.offloaded,
        "average": weights.elements * (4 + setup.trained_size) if setup.ema == "main memory" else 0,
        "autoencoder": vae if setup.sample is not None and setup.cached_latents else 0,
    }
    kept = {phase: {name: size for name, size in parts.items() if size} for phase, parts in phases.items()}
    return Forecast(kept, {name: size for name, size in main.items() if size}, setup.device != "cpu")


def stored_bytes(rows: int, columns: int, scheme: str) -> float:
    """Of a weight; as `library.models.quantized.SCHEMES` say, without torch."""
    if scheme == "nf4":
        block = math.gcd(columns, 64)
        return rows * (columns / 2 + 4 * columns / block) if block >= 16 else 2 * rows * columns
    return rows * columns + (0 if scheme == "fp8" else 4 * rows)


def gib(count: float) -> str:
    """A number of bytes for people, as graphics cards are counted: `11.3 GiB`."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"


def listed(parts: Mapping[str, int]) -> str:
    """Parts with their sizes, the largest first."""
    return ", ".join(f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))


# the parts


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Bytes that stay for longer."""

    encoder_names: Sequence[str]
    encoders: int
    kept_encoders: int
    """Of the text encoders, those that stay while training."""
    denoiser: int
    """On the device, with the room for streamed blocks."""
    streamed: int
    """In main memory."""
    on_the_way: int
    """What the largest weight takes while it is loaded."""
    elements: int
    """That are trained, in all."""
    trained: int
    """Beside the denoiser."""
    share: float
    """Of what is trained, how much stays on the device while it isn't used."""
    optimizer: int
    average: int
    scratch: int
    """While the optimizer works."""
    moved: int
    """Gradients and state of the optimizer in main memory."""

    @classmethod
    def of(cls, shapes: Mapping[str, activations.Shapes], model: ActivationModel, setup: Setup) -> _Weights:
        encoders = {name: part for name, part in shapes.items() if name != DENOISER}
        sizes = {name: _part(part, setup.compute, setup.encoder_storage) for name, part in encoders.items()}
        kept = [name for name in sizes if not setup.cached_text or name in setup.trained_encoders]
        denoiser = shapes[DENOISER]
        size, scheme = (setup.trained_size, None) if setup.full else (setup.compute, setup.storage)
        blocks = [_part(block, size, scheme) for block in blocks_of(denoiser, model.block_lists)]
        resident, streamed = _streamed(blocks, _part(denoiser, size, scheme), setup.swap, model.swap_units)
        whole = setup.full and setup.gradients == "all"
        share = 1 - streamed / max(1, sum(blocks)) if whole else 1.0
        state = STATE_BYTES.get(setup.optimizer.lower(), 8)
        largest = max(map(math.prod, denoiser.values()))
        return cls(
            encoder_names=tuple(sizes),
            encoders=sum(sizes.values()),
            kept_encoders=sum(sizes[name] for name in kept),
            denoiser=resident,
            streamed=streamed,
            on_the_way=largest * (setup.compute + (LOWERING_BYTES if scheme else 0)),
            elements=setup.trained_elements,
            trained=0 if setup.full else setup.trained_elements * setup.trained_size,
            share=share,
            optimizer=round(setup.trained_elements * state * share),
            average=setup.trained_elements * 4 if setup.ema == "device" else 0,
            scratch=_scratch(setup, largest),
            moved=round(setup.trained_elements * (state + setup.trained_size) * (1 - share)),
        )

    def beside(self) -> dict[str, int]:
        """What lasts from the first step on."""
        return {"trained weights": self.trained, "optimizer": self.optimizer, "average": self.average}


def blocks_of(shapes: activations.Shapes, lists: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each repeated block, in the order of the model."""
    return list(named_blocks(shapes, lists).values())


def named_blocks(shapes: activations.Shapes, lists: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The same by the path of the block; `lists` as `ActivationModel.block_lists`."""
    places = {name: number for number, name in enumerate(lists)}
    found: dict[tuple[int, int], tuple[str, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        head, last = _beginning(name, places)
        if head is None:
            continue
        index = last.partition(".")[0]
        key, path = ((places[head], int(index)), f"{head}.{index}") if index.isdecimal() else ((places[head], 0), head)
        found.setdefault(key, (path, {}))[1][name] = shape
    return dict(found[place] for place in sorted(found))


def _beginning(name: str, places: Mapping[str, int]) -> tuple[str | None, str]:
    """Which of the places a name begins with, and the rest of the name; None: none."""
    head = name
    while "." in head:
        head = head.rpartition(".")[0]
        if head in places:
            return head, name[len(head) + 1 :]
    return None, ""


def _part(shapes: activations.Shapes, size: int, scheme: str | None) -> int:
    """Bytes of a model's tensors; linear layers of repeated blocks are stored in the scheme's way."""
    total = activations.elements(shapes) * size
    if scheme is not None:
        for name, (rows, columns) in activations.matrices(shapes).items():
            if _IN_A_BLOCK.search(name):
                total += round(min(0, stored_bytes(rows, columns, scheme) - rows * columns * size))
    return total


def _streamed(blocks: Sequence[int], whole: int, swap: int, units: int) -> tuple[int, int]:
    """Bytes on the device and bytes in main memory, with so many blocks streamed."""
    if not swap:
        return whole, 0
    from library.models.streaming import SLOTS, spread, swapped_blocks

    chosen = [blocks[index] for index in spread(len(blocks), swapped_blocks(len(blocks), swap, units))]
    return whole - sum(chosen) + min(SLOTS, len(chosen)) * max(chosen, default=0), sum(chosen)


def _update(setup: Setup) -> int:
    """Bytes for each element while the optimizer moves it."""
    on_the_device_itself = setup.device != "cpu" and setup.trained_size == 4
    return 0 if on_the_device_itself and setup.optimizer.lower() == "adamw" else UPDATE_BYTES


def _scratch(setup: Setup, largest: int) -> int:
    if setup.steps_in_backward:
        return 0  # it is in the step
    if not setup.full:
        largest = min(setup.trained_elements, 1 << 24)
    return largest * _update(setup)


def _step(model: ActivationModel, setup: Setup, weights: _Weights) -> Step:
    """Of the denoiser, with what has to be there for the optimizer."""
    amount = model.amount(setup.batch, setup.size.width, setup.size.height, setup.text_tokens)

    def step(gradients: Gradients, update: int) -> Step:
        training = Training(
            rank=setup.rank,
            whole=setup.full,
            size=setup.trained_size,
            dense=setup.storage is not None and not setup.full,
            checkpoint_every=setup.checkpoint_every,
            offload=setup.offload,
            gradients=gradients,
            update=update,
        )
        return model.step(amount, setup.numerics, training)

    if setup.steps_in_backward:
        return step(setup.gradients, _update(setup))
    found = step("all", 0)
    if setup.accumulates or weights.share < 1:
        alone = step("none", 0).peak
        gradients = round(found.gradients * weights.share)
        gone = found.gradients_at_peak - round(found.gradients_at_peak * weights.share)
        peak = alone + gradients if setup.accumulates else max(alone, found.peak - gone)
        return Step(peak, min(gradients, peak), gradients, found.offloaded)
    return found


def _working(setup: Setup, weights: _Weights, step: Step) -> dict[str, int]:
    """What comes and goes in a step: in the backward pass, or when the optimizer works, whichever takes more."""
    afterwards = step.gradients + weights.scratch
    if afterwards > step.peak:
        return {"gradients": step.gradients, "optimizer at work": weights.scratch}
    return {"activations": step.peak - step.gradients_at_peak, "gradients": step.gradients_at_peak}


def _sampling(model: ActivationModel, setup: Setup, vae: int) -> dict[str, int]:
    """Of the denoiser's passes, or of the decoding after them, whichever takes more."""
    assert setup.sample is not None
    amount = model.amount(1, setup.sample.width, setup.sample.height, setup.text_tokens)
    decoding = activations.autoencoder(setup.sample.area, setup.vae_size, decoding=True)
    denoising = model.look(amount, setup.numerics)
    if decoding + vae > denoising:
        return {"autoencoder": vae, "decoding": decoding}
    return {"activations": denoising}
