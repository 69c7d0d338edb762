"""Stopping and asking from outside."""

from __future__ import annotations

import signal

import pytest

from library.train.control import Control
from library.train.state import LossWindow, Requests, RunState


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def state() -> RunState:
    return RunState(seed=1, total_steps=10, batches_per_epoch=5, loss=LossWindow(5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    with Control(output_dir=tmp_path) as control:
        run = state()
        control.after_step(run)
        assert not run.finished
        signal.raise_signal(number)
        control.after_step(run)
        assert run.requests == Requests(stop=True)
        assert run.finished
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once_but_an_echo_does_not(tmp_path):
    clock = Clock()
    with Control(output_dir=tmp_path, clock=clock):
        signal.raise_signal(signal.SIGINT)
        clock.now = 0.5
        signal.raise_signal(signal.SIGINT)
        clock.now = 3.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_launcher_that_terminates_after_an_interrupt_does_not_end_at_once(tmp_path):
    clock = Clock()
    with Control(output_dir=tmp_path, clock=clock) as control:
        signal.raise_signal(signal.SIGINT)
        clock.now = 5.0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert control.poll().stop


@pytest.mark.parametrize("name", ["control", "my.control"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("save", Requests(save=True)),
        ("\ufeffSTOP\r\n", Requests(stop=True)),
        ("sample save\n", Requests(save=True, sample=True)),
        ("dance", Requests()),
    ],
)
def test_the_control_file(tmp_path, name, text, wanted):
    clock = Clock()
    with Control(output_dir=tmp_path, output_name="my", clock=clock) as control:
        assert control.poll() == Requests()
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert control.poll() == Requests()  # looked at a moment ago
        clock.now = 1.5
        assert control.poll() == wanted
        assert not (tmp_path / name).exists()
        clock.now = 3.0
        assert control.poll() == Requests()


def test_a_file_that_is_still_being_written_stays(tmp_path):
    clock = Clock()
    with Control(output_dir=tmp_path, clock=clock) as control:
        (tmp_path / "control").write_text("")
        assert control.poll() == Requests()
        (tmp_path / "control").write_text("stop")
        clock.now = 2.0
        assert control.poll() == Requests(stop=True)


def test_a_file_from_before_the_run_is_not_obeyed(tmp_path, caplog):
    (tmp_path / "control").write_text("stop")
    with Control(output_dir=tmp_path) as control:
        assert control.poll() == Requests()
    assert not (tmp_path / "control").exists()
    assert "not obeyed" in caplog.text


def test_an_unreadable_file_disturbs_nothing(tmp_path):
    with Control(output_dir=tmp_path) as control:
        (tmp_path / "control").mkdir()
        assert control.poll() == Requests()


def test_with_several_processes_all_obey_at_the_same_step(tmp_path):
    class TwoRanks:
        """The votes of both processes are joined when both have voted, as a collective does it."""

        world = 2

        def __init__(self, rank: int, votes: list[list[list[float]]]) -> None:
            self.is_main, self.mine, self.votes = rank == 0, votes[rank], votes

        def numbers_later(self, numbers: list[float]) -> Joined:
            self.mine.append(numbers)
            return Joined(self.votes, len(self.mine) - 1)

    class Joined:
        def __init__(self, votes: list[list[list[float]]], index: int) -> None:
            self.votes, self.index = votes, index

        def read(self) -> list[float]:
            return [sum(numbers) / 2 for numbers in zip(*(votes[self.index] for votes in self.votes), strict=True)]

    votes: list[list[list[float]]] = [[], []]
    first, second = (Control(output_dir=tmp_path, ranks=TwoRanks(rank, votes)) for rank in range(2))
    second.ask("stop")
    seen = [(first.poll().stop, second.poll().stop) for _ in range(3)]
    assert seen == [(False, False), (True, True), (False, False)]
