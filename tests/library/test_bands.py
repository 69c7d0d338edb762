"""Losses by noise level."""

from __future__ import annotations

import json

import pytest
import torch

from library import bands
from library.train.state import LossWindow


def test_each_loss_counts_in_the_band_of_its_timestep():
    timesteps = torch.tensor([0.0, 249.9, 250.0, 999.0, 1000.0])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    found = bands.means(bands.sums(losses, timesteps, torch.ones(5)).tolist())
    assert found == {"loss/timesteps 0-250": 2.0, "loss/timesteps 250-500": 5.0, "loss/timesteps 750-1000": 8.0}


def test_copies_that_fill_a_batch_do_not_count_whatever_their_loss():
    numbers = bands.sums(torch.tensor([1.0, torch.nan]), torch.tensor([10.0, 10.0]), torch.tensor([0.5, 0.0]))
    assert bands.means(numbers.tolist()) == {"loss/timesteps 0-250": 1.0}


def test_the_mean_is_over_the_samples_of_all_micro_batches_and_processes():
    """Sums and counts are averaged over processes alike, so their ratio is the mean over all samples."""
    one = bands.sums(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.ones(2))
    other = bands.sums(torch.tensor([6.0]), torch.tensor([30.0]), torch.ones(1))
    window = LossWindow(4)
    window.add(torch.tensor(0.0), by_band=one)
    window.add(torch.tensor(0.0), by_band=other)
    window.close(1)
    (reading,) = window.drain()
    assert reading.by_band == {"loss/timesteps 0-250": 3.0}
    assert bands.means(((one + other) / 2).tolist()) == {"loss/timesteps 0-250": 3.0}


def test_the_smoothed_loss_is_the_closed_form_and_survives_a_resume():
    losses = [4.0, 1.0, float("nan"), 2.0, 8.0]
    window = LossWindow(2)
    for step, loss in enumerate(losses, start=1):
        window.add(torch.tensor(loss))
        window.close(step)
        saved = json.loads(json.dumps(window.state_dict()))
        window = LossWindow(2)
        window.load_state_dict(saved)
    window.drain()
    finite = [4.0, 1.0, 2.0, 8.0]
    weights = [0.99 ** (len(finite) - 1 - place) for place in range(len(finite))]
    expected = sum(weight * loss for weight, loss in zip(weights, finite, strict=True)) / sum(weights)
    assert window.smoothed == pytest.approx(expected, rel=1e-12)
