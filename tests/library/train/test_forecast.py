"""What a run is said to take, against what it takes; and what the options mean for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from library.models.activations import Amount
from library.models.flux import Flux
from library.models.ledger_flux import FluxActivations
from library.models.quantized import SCHEMES, store_linears
from library.models.streaming import stream, swapped_blocks
from library.option_groups import FLUX_TRAIN, FLUX_TRAIN_NETWORK
from library.option_types import Script
from library.options import parse
from library.train import activations
from library.train.forecast import Forecast, blocks_of, forecast, gib, stored_bytes
from library.train.setups import Setup, largest_batch, setup_of
from library.types import DENOISER, Size
from tests.allocations import Allocations
from tests.flux_steps import Case, Trained, shapes_of

CLOSE = 0.1
"""What the forecast promises."""

AMOUNT = Amount(images=1, image_tokens=256, text_tokens=64)
LORA = Case(width=128, head=32, amount=AMOUNT, rank=4)
WHOLE = replace(LORA, rank=0)


def setup(case: Case, **changes: object) -> Setup:
    """What a case is to the forecast."""
    shapes = shapes_of(_empty(case))
    blocks = [shape for name, shape in shapes.items() if "_blocks." in name and len(shape) == 2]
    base = Setup(
        full=not case.rank,
        trained_elements=case.rank * sum(map(sum, blocks)) if case.rank else activations.elements(shapes),
        rank=case.rank,
        compute=4,
        cached_text=True,
        cached_latents=True,
        checkpoint_every=case.every,
        offload=case.offload,
        batch=case.amount.images,
        size=Size(16 * case.amount.image_tokens // 16, 16 * 16),
        token_limits=(("t5xxl", case.amount.text_tokens),),
        device="cpu",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def of(case: Case, wanted: Setup) -> Forecast:
    return forecast({DENOISER: shapes_of(_empty(case))}, FluxActivations(case.config), wanted)


def measured(trained: Trained, optimizer: torch.optim.Optimizer | None) -> int:
    """Peak of the second step, from when on all moments are there; the batch doesn't count."""
    counter = Allocations(trained.held)
    batch = sum(one.nbytes for one in (trained.tokens, trained.text, trained.pooled, trained.strength))
    with counter:
        for _ in range(2):
            counter.reset()
            trained.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return counter.peak - batch


@pytest.mark.parametrize(
    "case",
    [LORA, replace(LORA, every=1), replace(LORA, every=2), WHOLE, replace(WHOLE, every=1)],
    ids=["LoRA", "LoRA, recomputing", "LoRA, some recomputing", "whole", "whole, recomputing"],
)
def test_training_takes_what_was_foreseen(case: Case) -> None:
    trained = Trained(case)
    trained.recompute()
    found = measured(trained, torch.optim.AdamW(trained.params, foreach=False))
    assert of(case, setup(case)).total("training") == pytest.approx(found, rel=CLOSE)


def test_gradients_that_are_used_in_the_backward_pass_are_not_kept() -> None:
    case = replace(WHOLE, every=1, single=8)
    trained = Trained(case)
    trained.recompute()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in trained.params}

    def move(parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in trained.params:
        parameter.register_post_accumulate_grad_hook(move)
    found = measured(trained, None)
    wanted = setup(case, gradients="none", optimizer="Adafactor")
    assert of(case, wanted).total("training") == pytest.approx(found, rel=CLOSE)
    assert found < of(case, replace(wanted, gradients="all")).total("training") - 4 * wanted.trained_elements // 2


@pytest.mark.parametrize("case", [replace(LORA, single=12), replace(LORA, single=12, every=1)], ids=["", "recomputing"])
def test_streamed_blocks_take_room_in_main_memory(case: Case) -> None:
    trained = Trained(case)
    trained.recompute()
    model = FluxActivations(case.config)
    swap = 5
    count = swapped_blocks(case.double + case.single, swap, model.swap_units)
    streaming = stream(trained.model, count, torch.device("cpu"))
    ring = [slot.memory for slot in streaming._slots]
    batch = sum(one.nbytes for one in (trained.tokens, trained.text, trained.pooled, trained.strength))
    counter = Allocations([*trained.held, *ring])
    with counter:
        trained.backward()
    there = of(case, setup(case, swap=swap, optimizer="none of them"))
    assert there.main_memory["streamed blocks"] == pytest.approx(streaming.host_bytes, rel=0.01)
    on_the_device = counter.peak - streaming.host_bytes - batch
    assert there.total("training") - there.phases["training"]["optimizer"] == pytest.approx(on_the_device, rel=CLOSE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_weights_take_what_was_foreseen(scheme: str) -> None:
    case = LORA
    model = store_linears(Flux(case.config).requires_grad_(False), scheme)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    there = of(case, setup(case, storage=scheme))
    assert there.phases["training"]["denoiser"] == pytest.approx(held, rel=0.02)
    for rows, columns in ((128, 128), (384, 128), (96, 512)):
        assert stored_bytes(rows, columns, scheme) == SCHEMES[scheme].bytes_of(rows, columns)


def test_each_phase_names_what_takes_the_memory() -> None:
    shapes = {DENOISER: shapes_of(_empty(LORA)), "t5xxl": {"encoder.block.0.wi.weight": (4096, 1024)}}
    wanted = setup(LORA, cached_text=False, cached_latents=False, sample=Size(512, 512))
    found = forecast(shapes, FluxActivations(LORA.config), wanted)
    phases = {phase: set(parts) for phase, parts in found.phases.items()}
    assert phases["text encoding"] == {"text encoders", "activations"}
    assert phases["image encoding"] == {"text encoders", "autoencoder", "activations"}
    assert phases["training"] >= {"text encoders", "autoencoder", "denoiser", "trained weights", "optimizer"}
    assert "decoding" in phases["sampling"], "which takes more than the small denoiser"
    cached = forecast(shapes, FluxActivations(LORA.config), replace(wanted, cached_text=True, cached_latents=True))
    assert {"text encoders", "autoencoder"}.isdisjoint(cached.phases["training"])
    assert cached.phases["text encoding"] == found.phases["text encoding"]
    assert cached.main_memory["autoencoder"] == cached.phases["sampling"]["autoencoder"]
    assert len(found.lines()) == len(found.phases) + 1
    assert all(gib(sum(parts.values())) in "\n".join(found.lines()) for parts in found.phases.values())


def test_gradients_of_several_batches_are_there_from_the_start() -> None:
    case = replace(WHOLE, every=0, amount=replace(AMOUNT, images=4))
    once, added = of(case, setup(case)), of(case, setup(case, accumulates=True))
    gradients = 4 * setup(case).trained_elements
    assert added.total("training") > once.total("training")
    assert added.phases["training"]["gradients"] == pytest.approx(gradients, rel=0.02)


def test_an_average_is_where_it_was_asked_for() -> None:
    without, here, there = (of(LORA, setup(LORA, ema=ema)) for ema in (None, "device", "main memory"))
    elements = setup(LORA).trained_elements
    assert here.total("training") - without.total("training") == 4 * elements
    assert there.total("training") == without.total("training")
    assert there.main_memory["average"] == 8 * elements


def test_blocks_come_in_the_order_of_the_model() -> None:
    shapes = {"single_blocks.10.x": (1,), "single_blocks.2.x": (2,), "double_blocks.0.x": (3,), "img_in.weight": (4,)}
    assert [sum(map(sum, block.values())) for block in blocks_of(shapes, ("double_blocks", "single_blocks"))] == [
        3,
        2,
        1,
    ]


def test_the_largest_batch_is_the_one_with_most_pixels() -> None:
    class Where:
        def __init__(self, dataset: int, bucket: Size) -> None:
            self.dataset, self.assignment, self.bucket = dataset, self, bucket

    items = [Where(0, Size(512, 512)), Where(1, Size(640, 448)), Where(1, Size(512, 512))]
    assert largest_batch(items, (1, 4)) == (4, Size(640, 448))  # type: ignore[arg-type]


def understood(script: Script, **values: object) -> Setup:
    options = parse(script, []).with_values(**values)
    shapes = {DENOISER: shapes_of(_empty(LORA))}
    return setup_of(
        options,
        shapes,
        trained_elements=1000,
        batch=2,
        size=Size(512, 768),
        token_limits={"clip_l": 77, "t5xxl": 512},
        units=38,
    )


def test_options_of_a_network_are_understood() -> None:
    found = understood(
        FLUX_TRAIN_NETWORK,
        network_dim=8,
        mixed_precision="bf16",
        fp8_base=True,
        fp8_scaled=True,
        gradient_checkpointing=True,
        checkpoint_every_n_blocks=2,
        blocks_to_swap=7,
        cache_text_encoder_outputs_to_disk=True,
        ema_decay=0.9,
        ema_on_cpu=True,
        use_8bit_adam=True,
    )
    assert (found.rank, found.full, found.compute, found.trained_size) == (8, False, 2, 4)
    assert (found.storage, found.encoder_storage, found.ema) == ("fp8_scaled", "fp8_scaled", "main memory")
    assert (found.checkpoint_every, found.swap, found.offload, found.optimizer) == (2, 7, False, "AdamW8bit")
    assert (found.cached_text, found.cached_latents, found.text_tokens, found.text_batch) == (True, False, 512, 2)


def test_options_of_a_fine_tuning_are_understood() -> None:
    found = understood(
        FLUX_TRAIN,
        mixed_precision="bf16",
        full_bf16=True,
        gradient_checkpointing=True,
        cpu_offload_checkpointing=True,
        blockwise_fused_optimizers=True,
        double_blocks_to_swap=3,
        single_blocks_to_swap=4,
    )
    assert (found.full, found.rank, found.trained_size, found.gradients) == (True, 0, 2, "block")
    assert (found.offload, found.swap, found.storage) == (True, 5, None)
    assert understood(FLUX_TRAIN_NETWORK, split_mode=True).swap == 19
    fused = understood(FLUX_TRAIN, optimizer_type="Adafactor", fused_backward_pass=True)
    assert (fused.gradients, fused.optimizer, fused.compute) == ("none", "Adafactor", 4)


def _empty(case: Case) -> Flux:
    with torch.device("meta"):
        return Flux(case.config)
