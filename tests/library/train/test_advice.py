"""Which options are proposed for which card, and what is said when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.log import ResourceError
from library.train import card_table
from library.train.advice import Planner, advise, flags
from library.train.forecast import GIB, gib
from library.train.setups import Setup
from library.types import Size

FLUX = card_table.SUBJECTS["flux"]
LORA, LORA_LARGE, WHOLE, WHOLE_LARGE = (run.setup for run in FLUX.runs())


def plan(setup: Setup, memory: float) -> Planner:
    """For FLUX.1-dev on a device with so many GiB, all of them free."""
    return FLUX.planner(setup, memory / card_table.FREE)


def test_a_card_that_is_large_enough_needs_nothing() -> None:
    planner = plan(LORA, 80)
    assert planner.fits
    assert planner.findings() == []
    assert planner.advice.flags == []
    assert planner.lines()[-1].startswith(f"needs about {gib(planner.forecast.needed)} of 80.0 GiB")


def test_a_lora_on_a_common_card_computes_again_and_is_stored_in_eight_bits() -> None:
    found = plan(LORA_LARGE, 24).advice
    assert found.flags == ["--gradient_checkpointing", "--fp8_scaled"]
    assert found.fits
    assert found.forecast.needed < 24 * GIB


def test_a_small_card_swaps_as_few_blocks_as_will_do() -> None:
    planner = plan(LORA_LARGE, 12)
    found = planner.advice
    assert found.flags[-1] == f"--blocks_to_swap {found.setup.swap}"
    assert found.fits
    assert planner.foresee(replace(found.setup, swap=found.setup.swap - 1)).needed > 12 * GIB


def test_fine_tuning_steps_in_the_backward_pass() -> None:
    found = plan(WHOLE_LARGE, 24).advice
    assert {"--full_bf16", "--fused_backward_pass", "--optimizer_type Adafactor"} <= {*found.flags}
    assert found.fits


def test_encoders_that_are_too_large_come_in_eight_bits() -> None:
    assert "--fp8_base" in plan(LORA, 8).advice.flags
    assert "--fp8_base" not in plan(LORA, 12).advice.flags


def test_options_that_are_there_are_not_proposed_again() -> None:
    begun = replace(LORA_LARGE, checkpoint_every=1, storage="int8", swap=2)
    found = plan(begun, 12).advice
    assert not {"--gradient_checkpointing", "--fp8_scaled"} & {*found.flags}
    assert found.setup.storage == "int8"
    assert found.setup.swap > 2


def test_where_nothing_helps_it_is_said() -> None:
    planner = plan(replace(WHOLE_LARGE, accumulates=True), 3)
    assert not planner.advice.fits
    (finding,) = planner.findings()
    assert "a larger GPU is needed" in finding.hint
    assert "--blocks_to_swap" in finding.hint


def test_one_is_warned_before_a_weight_is_loaded() -> None:
    planner = plan(replace(LORA_LARGE, checkpoint_every=1), 24)
    (finding,) = planner.findings()
    assert not finding.error
    assert finding.what == f"training needs about {gib(planner.forecast.needed)} of 24.0 GiB"
    assert finding.hint.startswith("add --fp8_scaled (then about ")
    assert planner.lines()[-1] == finding.hint


def test_main_memory_counts_too() -> None:
    model, shapes = FLUX.model, FLUX.shapes
    planner = Planner(shapes, model, replace(WHOLE, swap=38), memory=None, main_memory=64 * GIB)
    (finding,) = planner.findings()
    assert finding.where == "main memory"
    assert "optimizer state" in finding.what


def test_without_a_known_device_there_is_a_forecast_only() -> None:
    planner = Planner(FLUX.shapes, FLUX.model, LORA, memory=None)
    assert planner.fits
    assert planner.findings() == []
    assert planner.lines() == planner.forecast.lines()


def test_memory_that_runs_out_is_explained() -> None:
    planner = plan(LORA_LARGE, 24)
    with pytest.raises(ResourceError) as caught, planner.during("training"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    said = str(caught.value)
    assert caught.value.code == "E-MEMORY"
    assert "GPU memory of 24.0 GiB ran out while training" in said
    assert said.index("activations") < said.index("denoiser") < said.index("optimizer"), "the largest first"
    assert "--gradient_checkpointing saves " in said
    assert "\n" not in said


def test_other_errors_go_through() -> None:
    with pytest.raises(ZeroDivisionError), plan(LORA, 24).during("training"):
        _ = 1 / 0


def test_without_a_forecast_of_the_phase_one_is_told_what_ran_out() -> None:
    error = plan(LORA, 24).out_of_memory("sampling")
    assert str(error).startswith("GPU memory of 24.0 GiB ran out while making samples")


def test_flags_are_what_differs() -> None:
    assert flags(LORA, LORA) == []
    assert flags(LORA, replace(LORA, checkpoint_every=2)) == [
        "--gradient_checkpointing",
        "--checkpoint_every_n_blocks 2",
    ]
    assert flags(LORA, replace(LORA, size=Size(512, 256))) == ["--resolution 512,256"]


@settings(max_examples=15, deadline=None)
@given(
    full=st.booleans(),
    size=st.sampled_from([512, 768, 1024]),
    batch=st.integers(1, 4),
    memory=st.integers(6, 90),
    cached=st.booleans(),
)
def test_what_is_proposed_fits_and_is_needed(full: bool, size: int, batch: int, memory: int, cached: bool) -> None:
    setup = replace(WHOLE if full else LORA, size=Size(size, size), batch=batch, cached_text=cached)
    planner = plan(setup, memory)
    found = planner.advice
    assert found.fits == (planner.foresee(found.setup).needed <= memory * GIB)
    assert bool(found.flags) == (not planner.fits)
    if found.fits and found.setup.swap:
        assert planner.foresee(replace(found.setup, swap=0)).needed > memory * GIB
    again = advise(found.setup, planner.foresee, memory * GIB, 38)
    assert not found.fits or again.flags == []


@settings(max_examples=15, deadline=None)
@given(memory=st.integers(6, 80), more=st.integers(1, 20), full=st.booleans())
def test_a_larger_card_swaps_no_more(memory: int, more: int, full: bool) -> None:
    setup = WHOLE_LARGE if full else LORA_LARGE
    small, large = plan(setup, memory).advice, plan(setup, memory + more).advice
    assert large.fits or not small.fits
    assert not small.fits or large.setup.swap <= small.setup.swap


@pytest.mark.parametrize("path", sorted(card_table.DOCS.glob("*.md")), ids=lambda path: path.name)
def test_tables_of_cards_in_the_documents_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert card_table.renew(text) == text, "run python -m library.train.card_table"


def test_the_table_goes_between_its_marks() -> None:
    begin, end = "<!-- cards:flux:begin -->", "<!-- cards:flux:end -->"
    text = card_table.renew(f"a\n{begin}\nold\n{end}\nb\n")
    assert text.startswith(f"a\n{begin}\n\n| card |")
    assert text.endswith(f"|\n\n{end}\nb\n")
    assert "old" not in text
    assert text.count("| 24 GB |") == 4
    assert card_table.renew(text) == text
