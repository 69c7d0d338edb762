"""The U-Nets of SD 1.x, SD 2.x and SDXL on a ledger: what a step, or a look, takes beside the weights. See `ledger.py`.

Follows Diffusers' modules, with blocks as in `unet_blocks.py`, so that what is held at a time is nearly the same. What
convolutions take for themselves while they compute isn't in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from library.models.activations import Amount, Numerics, Step, Training
from library.models.ledger import Ledger, Value
from library.models.ledger_layers import (
    Conv,
    Linear,
    addition,
    attention,
    cat,
    contiguous,
    conv,
    gelu,
    layer_norm,
    linear,
    product,
    split,
    upsample,
)
from library.models.unet_blocks import block_paths

Shapes = Mapping[str, tuple[int, ...]]

CELL = 8
"""Pixels per side of a latent cell."""
NARROWING = 2
"""As in `memory.py`."""
HEAD = 64


class UnetActivations:
    """See `library.models.activations.ActivationModel`."""

    def __init__(self, shapes: Shapes) -> None:
        """Of the U-Net with tensors of these shapes, Diffusers names."""
        self.shapes = shapes
        self.block_lists: Sequence[str] = block_paths(shapes)
        self._steps: dict[tuple[Amount, Numerics, Training], Step] = {}

    @property
    def swap_units(self) -> int:
        """See `ActivationModel`: every block counts."""
        return len(self.block_lists)

    def amount(self, images: int, width: int, height: int, text_tokens: int) -> Amount:
        """See `ActivationModel`; tokens of an image are latent cells."""
        return Amount(images=images, image_tokens=(width // CELL) * (height // CELL), text_tokens=text_tokens)

    def step(self, amount: Amount, numerics: Numerics, training: Training) -> Step:
        """See `ActivationModel`."""
        key = amount, numerics, training
        if key not in self._steps:
            self._steps[key] = UnetLedger(self.shapes, self.block_lists, amount, numerics, training).step()
        return self._steps[key]

    def look(self, amount: Amount, numerics: Numerics) -> int:
        """See `ActivationModel`."""
        return UnetLedger(self.shapes, self.block_lists, amount, numerics, None).look()


class UnetLedger:
    """The U-Net with these tensors."""

    def __init__(
        self, shapes: Shapes, paths: Sequence[str], amount: Amount, numerics: Numerics, training: Training | None
    ) -> None:
        """`paths` are those of its blocks; `training` None: nothing is trained."""
        self.shapes, self.paths, self.amount, self.training = shapes, paths, amount, training or Training()
        self.ledger = Ledger(numerics, self.training.gradients, self.training.update)
        self.pixels = amount.images * amount.image_tokens
        """Of all images, at the level that is computed."""
        self._held: list[Value] = []

    def step(self) -> Step:
        """Forward and backward."""
        ledger = self.ledger
        answer = self._forward()
        ledger.casts.clear()
        loss = ledger.fresh(answer.elements, 4)
        gradient = ledger.new(answer.elements * answer.size)
        sources, gradients = [answer.source], [gradient]
        del answer, loss, gradient
        ledger.backward(sources, gradients)  # type: ignore[arg-type]
        if self.training.gradients == "block":
            ledger.step_block(self.training.size)
        return Step(ledger.peak, ledger.gradients_at_peak, ledger.gradients, ledger.offloaded)

    def look(self) -> int:
        """Peak of a forward pass without gradients."""
        with self.ledger.without_gradients():
            self._forward()
        return self.ledger.peak

    def _forward(self) -> Value:
        ledger, shapes, amount = self.ledger, self.shapes, self.amount
        outputs, inputs = shapes["conv_in.weight"][:2]
        sample = ledger.fresh(self.pixels * inputs)
        context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
        text = ledger.fresh(amount.images * amount.text_tokens * context)
        if not self.training.inside:  # text encoders are trained
            text = Value(text.elements, text.size, text.storage, ledger.wanted())
        self._held = [sample, text]
        time = self._time()
        x = self._conv("conv_in", sample, self.pixels)
        skips = [x]
        for number, path in enumerate(self.paths):
            side, _, rest = path.partition(".")
            parts = rest.split(".")
            if side == "up_blocks" and parts[1] == "resnets":
                x = cat(ledger, [x, skips.pop()])
            if "transformer_blocks" in path:
                x = self._transformer(path, number, x, text)
            elif "samplers" in path:
                x = self._block(number, self._sampler(path), [x])
            else:
                x = self._block(number, self._resnet(path), [x, time])
            if side == "down_blocks" and not self._goes_on(path):
                skips.append(x)
        del skips, time
        normed = gelu(ledger, layer_norm(ledger, x, outputs))
        return self._conv("conv_out", normed, self.pixels)

    def _goes_on(self, path: str) -> bool:
        """Whether a transformer comes behind this block before the way down is remembered."""
        following = self.paths[self.paths.index(path) + 1] if path != self.paths[-1] else ""
        level = path.split(".")[1]
        return following.startswith(f"down_blocks.{level}.") and "transformer_blocks" in following

    def _time(self) -> Value:
        """The embedding of the timestep, and of sizes."""
        ledger, images = self.ledger, self.amount.images
        parts = []
        for name in ("time_embedding", "add_embedding"):
            if f"{name}.linear_1.weight" in self.shapes:
                first = self._linear(f"{name}.linear_1", ledger.fresh(images * self._sides(f"{name}.linear_1")[1]))
                parts.append(self._linear(f"{name}.linear_2", gelu(ledger, first)))
        return addition(ledger, parts)

    # blocks

    def _block(self, number: int, run: Callable[..., Value], inputs: list[Value]) -> Value:
        self.ledger.block = number
        training = self.training
        adapted = training.rank > 0 and ".transformer_blocks." in self.paths[number]
        needed = training.whole or adapted or any(value.source is not None for value in inputs)
        if needed and training.checkpoint_every and number % training.checkpoint_every == 0:
            return self.ledger.checkpoint(lambda given: [run(*given)], inputs, offload=self.training.offload)[0]
        return run(*inputs)

    def _resnet(self, path: str) -> Callable[..., Value]:
        ledger, pixels = self.ledger, self.pixels

        def run(x: Value, time: Value) -> Value:
            outputs, inputs = self.shapes[f"{path}.conv1.weight"][:2]
            hidden = self._conv(f"{path}.conv1", gelu(ledger, layer_norm(ledger, x, inputs)), pixels)
            moment = self._linear(f"{path}.time_emb_proj", gelu(ledger, time))
            hidden = addition(ledger, [hidden, moment])
            normed = gelu(ledger, layer_norm(ledger, hidden, outputs))
            del hidden
            hidden = self._conv(f"{path}.conv2", normed, pixels)
            if f"{path}.conv_shortcut.weight" in self.shapes:
                x = self._conv(f"{path}.conv_shortcut", x, pixels)
            return contiguous(ledger, addition(ledger, [x, hidden]), is_so=False)  # divided by 1

        return run

    def _sampler(self, path: str) -> Callable[..., Value]:
        down = ".downsamplers." in path
        pixels = self.pixels = self.pixels // 4 if down else self.pixels * 4

        def run(x: Value) -> Value:
            return self._conv(f"{path}.conv", x if down else upsample(self.ledger, x), pixels)

        return run

    def _transformer(self, path: str, number: int, x: Value, text: Value) -> Value:
        """A layer; the first of a transformer with what comes before it, the last with what comes behind."""
        owner, _, place = path.partition(".transformer_blocks.")
        ledger, first = self.ledger, place == "0"
        last = f"{owner}.transformer_blocks.{int(place) + 1}" not in self.paths
        if first:
            self._residual = x
            inner = self._sides(f"{owner}.proj_in")[1]
            x = self._linear(f"{owner}.proj_in", contiguous(ledger, layer_norm(ledger, x, inner), is_so=False))
        x = self._block(number, self._layer(path), [x, text])
        if last:
            x = contiguous(ledger, self._linear(f"{owner}.proj_out", x), is_so=False)
            x = addition(ledger, [x, self._residual])
            del self._residual
        return x

    def _layer(self, path: str) -> Callable[..., Value]:
        def run(x: Value, text: Value) -> Value:
            ledger = self.ledger
            width = self._sides(f"{path}.attn1.to_q")[1]
            for name in ("attn1", "attn2"):
                normed = layer_norm(ledger, x, width)
                seen = normed if name == "attn1" else text
                q = self._linear(f"{path}.{name}.to_q", normed)
                k, v = (self._linear(f"{path}.{name}.to_{part}", seen) for part in "kv")
                del normed, seen
                attended = attention(ledger, q, k, v, HEAD)
                del q, k, v
                x = addition(ledger, [self._linear(f"{path}.{name}.to_out.0", attended), x])
                del attended
            both = self._linear(f"{path}.ff.net.0.proj", layer_norm(ledger, x, width))
            hidden, gate = split(ledger, both, [both.elements // 2] * 2)
            del both
            hidden = product(ledger, hidden, gelu(ledger, gate))
            del gate
            return addition(ledger, [self._linear(f"{path}.ff.net.2", hidden), x])

        return run

    # layers

    def _sides(self, name: str) -> tuple[int, int]:
        outputs, inputs = self.shapes[f"{name}.weight"][:2]
        return outputs, inputs

    def _linear(self, name: str, x: Value) -> Value:
        training = self.training
        outputs, inputs = self._sides(name)
        in_transformer = ".attentions." in name
        return linear(
            self.ledger,
            x,
            Linear(
                inputs=inputs,
                outputs=outputs,
                rank=training.rank if in_transformer else 0,
                trained=training.whole,
                size=training.size,
                dense=training.dense and "_blocks." in name,
                kept=inputs >= NARROWING * outputs and ".transformer_blocks." in name,
            ),
        )

    def _conv(self, name: str, x: Value, pixels: int) -> Value:
        outputs, inputs, kernel, _ = self.shapes[f"{name}.weight"]
        layer = Conv(
            inputs=inputs, outputs=outputs, kernel=kernel, trained=self.training.whole, size=self.training.size
        )
        return conv(self.ledger, x, layer, pixels)
