"""The plan: its numbers are those that a run then executes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from library.log import UserError
from library.train.plan import epochs_between_saves, make_plan, readable_bytes


@dataclass(frozen=True)
class Length:
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True)
class Save:
    save_every_n_epochs: int | None = None
    save_every_n_steps: int | None = None
    save_n_epoch_ratio: int | None = None
    save_last_n_epochs: int | None = None
    save_last_n_steps: int | None = None


@dataclass(frozen=True)
class State:
    save_state: bool = False
    save_state_on_train_end: bool = False
    save_last_n_epochs_state: int | None = None
    save_last_n_steps_state: int | None = None


@dataclass(frozen=True)
class Sample:
    sample_prompts: str | None = "prompts.txt"
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    sample_at_first: bool = False


@dataclass(frozen=True)
class Schedule:
    lr_warmup_steps: float = 0
    lr_decay_steps: float = 0


def plan(batches=10, **more):
    more.setdefault("length", Length())
    return make_plan(images=10, repeated=batches, batches_per_epoch=batches, **more)


@pytest.mark.parametrize("batches", [1, 2, 7, 10])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_a_loop_that_counts(batches, processes, accumulation):
    length = Length(max_train_epochs=3, gradient_accumulation_steps=accumulation)
    found = plan(batches, length=length, processes=processes)
    steps = 0
    for _ in range(3):
        micro_batches = len(range(0, batches, processes))
        for index in range(micro_batches):
            if (index + 1) % accumulation == 0 or index + 1 == micro_batches:
                steps += 1
    assert found.total_steps == steps
    assert found.steps_per_epoch * 3 == steps
    assert found.epochs == 3


def test_epochs_alone_ignore_the_default_of_the_steps():
    assert plan(100, length=Length(max_train_epochs=40)).total_steps == 4000


def test_the_smaller_of_two_limits_wins_and_the_plan_says_so():
    found = plan(10, length=Length(50, 40), steps_given=True)
    assert (found.total_steps, found.epochs) == (50, 5)
    assert any("smaller one counts" in line for line in found.lines())
    assert plan(10, length=Length(5000, 40), steps_given=True).total_steps == 400


def test_the_default_length_says_that_it_is_the_default():
    assert any("the default" in line for line in plan().lines())
    assert not any("the default" in line for line in plan(steps_given=True).lines())


@pytest.mark.parametrize(
    ("batches", "length"), [(0, Length()), (10, Length(0)), (10, Length(max_train_epochs=0)), (10, Length(-3))]
)
def test_nothing_to_train_is_an_error(batches, length):
    with pytest.raises(UserError, match=r"0 (steps|batches)"):
        plan(batches, length=length)


def test_accumulation_below_one_is_an_error():
    with pytest.raises(UserError, match="accumulation"):
        plan(length=Length(gradient_accumulation_steps=0))


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.1, 100), (50, 50), (50.0, 50), (0.0, 0), (1.0, 1000)])
def test_counts_and_fractions(value, steps):
    assert plan(length=Length(1000), schedule=Schedule(value, value)).warmup_steps == steps


@pytest.mark.parametrize("value", [1.5, -1, -0.1])
def test_counts_that_mean_nothing(value):
    with pytest.raises(UserError, match="--lr_decay_steps"):
        plan(length=Length(1000), schedule=Schedule(0, value))


def simulate(every_epochs, every_steps, keep_epochs, keep_steps, total, per_epoch):
    """Files written, and the most that lie there at one time, by doing it."""
    from library.train.checkpoints import epoch_to_remove, step_to_remove

    epochs, steps, most = set(), set(), 0
    written = [0, 0]
    for step in range(1, total + 1):
        if every_steps and step % every_steps == 0:
            steps.add(step)
            written[1] += 1
            most = max(most, len(epochs) + len(steps))
            steps.discard(step_to_remove(step, every_steps, keep_steps))
        epoch, rest = divmod(step, per_epoch)
        if every_epochs and rest == 0 and epoch % every_epochs == 0 and step < total:
            epochs.add(epoch)
            written[0] += 1
            most = max(most, len(epochs) + len(steps))
            epochs.discard(epoch_to_remove(epoch, every_epochs, keep_epochs))
    return written, most + 1


@pytest.mark.parametrize("keep_epochs", [None, 1, 2, 5])
@pytest.mark.parametrize("keep_steps", [None, 0, 10, 25])
@pytest.mark.parametrize(("every_epochs", "every_steps"), [(1, None), (2, None), (None, 10), (3, 7), (None, None)])
def test_saves_are_those_that_happen(every_epochs, every_steps, keep_epochs, keep_steps):
    save = Save(every_epochs, every_steps, None, keep_epochs, keep_steps)
    found = plan(10, length=Length(100), save=save, state=State(save_state=True), model_bytes=100, state_bytes=300)
    (epoch_saves, step_saves), most = simulate(every_epochs, every_steps, keep_epochs, keep_steps, 100, 10)
    assert (found.epoch_saves, found.step_saves) == (epoch_saves, step_saves)
    assert found.saves == epoch_saves + step_saves + 1
    assert most <= found.models_kept <= most + 2
    assert found.save_bytes == found.models_kept * 100 + found.states_kept * 300


def test_epoch_ratio():
    assert epochs_between_saves(Save(save_n_epoch_ratio=3), 10) == 3
    assert epochs_between_saves(Save(save_n_epoch_ratio=30), 10) == 1
    assert epochs_between_saves(Save(save_n_epoch_ratio=0, save_every_n_epochs=4), 10) == 4
    assert epochs_between_saves(Save(save_every_n_epochs=0), 10) is None


def test_samples():
    assert plan(10, length=Length(100), sample=Sample(), prompts=2).samples == 0
    by_step = Sample(sample_every_n_steps=25, sample_at_first=True)
    assert plan(10, length=Length(100), sample=by_step, prompts=2).samples == 2 * 5
    assert plan(10, length=Length(100), sample=replace(by_step, sample_every_n_epochs=5), prompts=2).samples == 2 * 3
    assert plan(10, length=Length(100), sample=by_step, prompts=0).samples == 0


def test_position_points_at_the_next_batch():
    found = plan(10, length=Length(100, None, 3))
    assert found.steps_per_epoch == 4
    assert [found.position(step) for step in (0, 1, 3, 4, 6)] == [(1, 0), (1, 3), (1, 9), (2, 0), (2, 6)]


def test_lines_name_every_number():
    found = plan(
        7,
        length=Length(20, None, 2),
        processes=2,
        batch_sizes=(3, 4),
        regularization_images=5,
        model_bytes=2_300_000_000,
        cache_bytes=1000,
        save=Save(save_every_n_steps=5),
    )
    text = "\n".join(found.lines())
    for piece in ("10 + 5 regularization", "3 / 4 per process x 2", "x 2 accumulated = 12 / 16", "20 steps", "11.5 GB"):
        assert piece in text
    assert "1.0 kB" in text


def test_bytes_for_people():
    assert [readable_bytes(n) for n in (5, 1500, 2_000_000_000_000)] == ["5 B", "1.5 kB", "2.0 TB"]


def test_planning_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, library.train.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
