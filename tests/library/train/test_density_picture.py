"""The picture of the timesteps: right numbers, and no harm when it can't be made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from library.objectives import Flow, FlowSettings
from library.randomness import Draws
from library.train import density_picture
from library.types import Size


def flow(**settings: object) -> Flow:
    return Flow(FlowSettings(**{"timestep_sampling": "flux_shift", **settings}))  # type: ignore[arg-type]


class Data:
    """Two datasets of three sizes."""

    traits = SimpleNamespace(latent_stride=8)
    config = SimpleNamespace(datasets=(None, None))

    def bucket_counts(self, number: int) -> dict[Size, int]:
        return [{Size(512, 512): 30, Size(1024, 1024): 60}, {Size(512, 512): 10}][number]


def test_tokens_are_counted_as_the_objective_counts_them() -> None:
    assert density_picture.token_counts(Data()) == Counter({1024: 40, 4096: 60})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
        {"timestep_sampling": "uniform", "min_timestep": 200, "max_timestep": 300},
    ],
)
def test_what_is_drawn_is_what_a_run_draws(settings: dict[str, object]) -> None:
    """Quantiles agree with those of numbers drawn as samples draw them."""
    objective, tokens = flow(**settings), Counter({1024: 40, 4096: 60})
    found = density_picture.drawn_timesteps(objective, tokens)
    assert len(found) == density_picture.DRAWS
    one_by_one = [1000 * objective.sigmas(Draws(range(30 * count)), size) for size, count in tokens.items()]
    at = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    assert torch.allclose(found.quantile(at), torch.cat(one_by_one).quantile(at), atol=25)
    state = torch.get_rng_state()
    assert torch.equal(found, density_picture.drawn_timesteps(objective, tokens))
    assert torch.equal(state, torch.get_rng_state())


def test_the_picture_goes_to_a_file_and_to_the_trackers(tmp_path: Path) -> None:
    shown: list[tuple[str, str, int]] = []
    trackers = SimpleNamespace(picture=lambda tag, picture, caption, step: shown.append((tag, caption, step)))
    path = tmp_path / "sample" / "my_timesteps.png"
    density_picture.show(flow(sigmoid_scale=2.0), Data(), path, trackers=trackers, step=7)  # type: ignore[arg-type]
    with Image.open(path) as image:
        assert image.size == density_picture.SIZE
    assert shown == [("timesteps", "timestep_sampling flux_shift, sigmoid_scale 2", 7)]


def test_bars_stand_where_the_timesteps_are() -> None:
    picture = density_picture.histogram(torch.linspace(410, 590, 1000), "title")
    pixels = np.asarray(picture)
    blue = (pixels == np.array([0x2F, 0x6F, 0xB3])).all(-1)
    left, right = (density_picture.LEFT, density_picture.SIZE[0] - density_picture.RIGHT)
    columns = np.flatnonzero(blue.any(0))
    width = right - left
    assert abs(columns.min() - (left + 0.40 * width)) <= 2
    assert abs(columns.max() - (left + 0.60 * width)) <= 2


@pytest.mark.parametrize("timesteps", [torch.full((5,), 1000.0), torch.zeros(1)])
def test_the_ends_can_be_drawn(timesteps: torch.Tensor) -> None:
    assert density_picture.histogram(timesteps, "title").size == density_picture.SIZE


def test_failing_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sample").write_text("a file", encoding="utf-8")
    density_picture.show(flow(), Data(), tmp_path / "sample" / "x.png")  # type: ignore[arg-type]
    assert "no picture of the timesteps" in caplog.text
    density_picture.show(flow(), SimpleNamespace(), tmp_path / "x.png")  # type: ignore[arg-type]
    assert not (tmp_path / "x.png").exists()
