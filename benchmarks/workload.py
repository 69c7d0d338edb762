"""What the benchmarks run: a FLUX.1 transformer of any size with random weights, a batch, the arithmetic it needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from library import devices
from library.models.flux import Flux, FluxConfig, image_ids, patchify, text_ids, unpatchify
from library.objectives import Flow, FlowSettings
from library.randomness import Draws
from library.recording import Recorder
from library.train.graphs import Recorded
from library.train.loop import Task, learn
from library.types import Cond, Noised
from networks.base import Network
from networks.lora_flux import create_network

LATENT_STRIDE, LATENT_CHANNELS, CELLS_PER_TOKEN = 8, 16, 4
SMALL = 0.01
"""Standard deviation of what a new LoRA has as zeros, so that no gradient is zero."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much is computed in a step."""

    width: int = 3072
    head_width: int = 128
    double_blocks: int = 1
    single_blocks: int = 2
    resolution: int = 512
    text_tokens: int = 512
    batch: int = 1
    rank: int = 16

    @property
    def cells(self) -> int:
        """Latent cells per side."""
        return self.resolution // LATENT_STRIDE

    @property
    def image_tokens(self) -> int:
        """Per image."""
        return self.cells**2 // CELLS_PER_TOKEN

    @property
    def tokens(self) -> int:
        """Text and image together, per image."""
        return self.image_tokens + self.text_tokens

    @property
    def config(self) -> FluxConfig:
        """The transformer's sizes; what isn't named is that of FLUX.1-dev."""
        return FluxConfig(
            width=self.width,
            head_width=self.head_width,
            mlp_width=4 * self.width,
            double_blocks=self.double_blocks,
            single_blocks=self.single_blocks,
        )


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Flux:
    """A transformer with frozen random weights."""
    with torch.device("meta"):
        model = Flux(shape.config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            nn.init.ones_(parameter)
        else:
            nn.init.uniform_(parameter, -(bound := parameter.shape[-1] ** -0.5), bound)
    return model.train()


def adapt(model: Flux, rank: int, device: torch.device, kind: str = "lora") -> Network:
    """Adapters on all linear layers of the blocks, as `--network_module networks.lora_flux` makes them.

    `kind` is what `algo=` says: lora, dora, loha or lokr.
    """
    network = create_network(1.0, rank, rank, None, None, model, algo=kind)
    for adapter in network.created:
        for parameter in adapter.parameters():
            if not parameter.any():  # what makes a new network change nothing
                nn.init.normal_(parameter, std=SMALL)
    network.apply_to(None, model, False, True)
    network.prepare_grad_etc(None, model)
    return network.to(device).train()


class Batch:
    """One batch, and the loss that the model has on it."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, mixed: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(shape.batch, *sizes, generator=generator).to(device, dtype)

        config = shape.config
        self.latents = random(LATENT_CHANNELS, shape.cells, shape.cells)
        self.text = random(shape.text_tokens, config.context_width)
        self.pooled = random(config.pooled_width)
        self.guidance = torch.ones(shape.batch, device=device)
        self.objective = Flow(FlowSettings(timestep_sampling="sigmoid", model_prediction_type="raw"))
        self.draws = Draws(range(shape.batch), device)
        self.autocast = torch.autocast(device.type, torch.bfloat16 if dtype == torch.float32 else dtype, enabled=mixed)

    def noised(self) -> Noised:
        """With noise, the same each time."""
        with self.autocast:
            return self.objective.noise(self.latents, self.draws)

    def predict(self, model: Flux, x: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        """The model's answer for noisy latents."""
        prediction = model(
            img=patchify(x),
            img_ids=image_ids(x),
            txt=cond["text"],
            txt_ids=text_ids(cond["text"]),
            timesteps=timesteps / 1000,
            pooled=cond["pooled"],
            guidance=self.guidance,
        )
        return unpatchify(prediction, *x.shape[-2:])

    @property
    def cond(self) -> Cond:
        """What the model is told."""
        return {"text": self.text, "pooled": self.pooled}

    def loss(self, model: Flux, inputs_need_gradients: bool = False) -> Tensor:
        """Mean loss; `inputs_need_gradients` makes the backward pass run through the model although it is frozen."""
        noised, cond = self.noised(), self.cond
        x = noised.input
        if inputs_need_gradients:
            x, cond["text"] = x.detach().requires_grad_(), cond["text"].detach().requires_grad_()
        with self.autocast:
            prediction = self.predict(model, x, noised.timesteps, cond)
        return self.objective.loss(prediction.float(), noised).mean()


def stepping(
    device: torch.device, model: nn.Module, network: Network, batch: Any, *, recorded: bool = False
) -> Callable[[], None]:
    """Noise, forward, backward, clipping and AdamW, by the functions of the training; `recorded`: `--cuda_graphs`."""
    params, count = list(network.parameters()), len(batch.latents)
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    learns = Recorded(Recorder(device)) if recorded else learn
    weights = torch.full((count,), 1 / count, device=device)
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=lambda: batch.autocast, backward=Tensor.backward),
        family=SimpleNamespace(predict=batch.predict),
        objective=batch.objective,
        method=SimpleNamespace(parameters=lambda: params),
        denoiser=model,
    )

    def step() -> None:
        learns(run, Task(noised=batch.noised(), cond=batch.cond, weights=weights, mask=None, multiplier=1.0))
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training step; what is computed twice to save memory counts once."""

    forward: float
    input_gradients: float
    adapters: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.forward + self.input_gradients + self.adapters


def work(model: Flux, shape: Shape) -> Work:
    """Counts a LoRA step from the shapes: two operations per multiply-add, small element-wise work left out.

    Of the frozen layers only the gradient of the inputs is needed, which costs as much as the forward pass, and only
    from the first adapter on. Attention costs twice its forward in the backward pass. An adapter costs its forward
    three times.
    """
    linear = behind = adapters = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = shape.batch * _rows(name, shape)
            macs = rows * module.in_features * module.out_features
            linear += macs
            if not name.startswith(("img_in", "txt_in", "time_in", "vector_in", "guidance_in")):
                behind += macs
            if "_blocks." in name:
                adapters += rows * shape.rank * (module.in_features + module.out_features)
    blocks = shape.double_blocks + shape.single_blocks
    attention = 2.0 * shape.batch * blocks * shape.tokens**2 * shape.width
    return Work(2 * (linear + attention), 2 * (behind + 2 * attention), 2 * 3 * adapters)


def _rows(name: str, shape: Shape) -> int:
    """How many vectors of one image go through a linear layer."""
    if "mod.lin" in name or "modulation" in name or name.startswith(("time_in", "vector_in", "guidance_in")):
        return 1
    if name.startswith("single_blocks."):
        return shape.tokens
    if name.startswith("txt_in") or ".txt_" in name:
        return shape.text_tokens
    return shape.image_tokens


class Clock:
    """Seconds that something takes: by the wall clock, or of the processor for machines that others use, too."""

    def __init__(self, device: torch.device, cpu_time: bool) -> None:
        self.device = device
        self._now = time.process_time if cpu_time else time.perf_counter

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, until the device has finished it."""
        devices.synchronize(self.device)
        start = self._now()
        run()
        devices.synchronize(self.device)
        return self._now() - start


class Ceiling:
    """How fast the device multiplies large square matrices of a type: what no step can beat."""

    def __init__(self, clock: Clock, dtype: torch.dtype, side: int) -> None:
        self.clock, self.side = clock, side
        self._a, self._b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self.rate()

    def rate(self) -> float:
        """Operations per second, measured now."""
        seconds = self.clock.seconds(lambda: torch.mm(self._a, self._b, out=self._out))
        return 2 * self.side**3 / seconds


@dataclass(frozen=True)
class Timing:
    """What several runs of one thing took."""

    seconds: Sequence[float]
    rates: Sequence[float]
    """Matrix product rate around each run."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    @property
    def rate(self) -> float:
        """Median operations per second of the matrix product."""
        return median(self.rates)

    def utilisation(self, operations: float) -> float:
        """Median share of the matrix product rate that was reached."""
        return median(operations / seconds / rate for seconds, rate in zip(self.seconds, self.rates, strict=True))


def measure(
    clock: Clock, ceiling: Ceiling, runs: Sequence[Callable[[], object]], steps: int, warmup: int
) -> list[Timing]:
    """Timings of several things, taken in turns with each other and with the matrix product."""
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    rates: list[list[float]] = [[] for _ in runs]
    before = ceiling.rate()
    for _ in range(steps):
        for index, run in enumerate(runs):
            seconds[index].append(clock.seconds(run))
            after = ceiling.rate()
            rates[index].append((before + after) / 2)
            before = after
    return [Timing(*pair) for pair in zip(seconds, rates, strict=True)]


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use since `reset_peak_memory`: of the device, or of this process; None where it can't be read."""
    if device.type != "cpu":
        return devices.peak_memory(device) or None
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_peak_memory(device: torch.device) -> None:
    """Starts counting anew, where that is possible."""
    devices.reset_peak_memory(device)
    counter = Path("/proc/self/clear_refs")
    if device.type == "cpu" and counter.exists():
        counter.write_text("5", encoding="ascii")
