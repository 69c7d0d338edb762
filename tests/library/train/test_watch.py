"""The watchdog says where the program is, once."""

from __future__ import annotations

import time

from library.train import watch
from library.train.watch import Watchdog


def sleep_in_a_named_place(seconds: float) -> None:
    time.sleep(seconds)


def test_silence_is_told_once_with_the_place(caplog):
    with Watchdog(patience=0.05) as dog:
        dog.heartbeat("caching latents")
        sleep_in_a_named_place(0.4)
        assert caplog.text.count("no progress for") == 1
        assert "caching latents" in caplog.text
        assert "sleep_in_a_named_place" in caplog.text
        dog.heartbeat()
        sleep_in_a_named_place(0.3)
        assert caplog.text.count("no progress for") == 2


def test_progress_keeps_it_quiet(caplog):
    with Watchdog(patience=0.5) as dog:
        for _ in range(6):
            dog.heartbeat("training")
            time.sleep(0.02)
    assert "no progress" not in caplog.text


def test_the_watchdog_of_the_program():
    watch.heartbeat("nothing runs yet")
    watch.start(patience=100)
    try:
        watch.start(patience=100)
        watch.heartbeat("training")
        assert watch._current is not None
        assert watch._current.phase == "training"
    finally:
        watch.stop()
    assert watch._current is None
    watch.stop()
