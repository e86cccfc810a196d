from __future__ import annotations

import io

import pytest

from invdyn import progress
from invdyn.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_lines_come_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(40, "collect", "episodes", stream=stream) as bar:
        for _ in range(40):
            clock[0] += 1.0
            bar.update(1, "7 steps/s")
    assert stream.getvalue().splitlines() == [
        "collect: 10/40 episodes (25%), 30.0 s left, 7 steps/s",
        "collect: 20/40 episodes (50%), 20.0 s left, 7 steps/s",
        "collect: 30/40 episodes (75%), 10.0 s left, 7 steps/s",
        "collect: 40/40 episodes (100%), 40.0 s, 7 steps/s",
    ]


def test_terminal_has_one_line(clock: list[float]) -> None:
    stream = Terminal()
    with Progress(4, "collect", "episodes", stream=stream) as bar:
        for _ in range(4):
            clock[0] += 1.0
            bar.update()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r") == 4
    assert "[############............] 2/4 episodes (50%), 2.0 s left" in text


def test_narrow_terminals_do_not_wrap(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    with Progress(1, "collect", "episodes", stream=stream) as bar:
        bar.update()
    assert max(len(line) for line in stream.getvalue().replace("\r", "\n").splitlines()) == 29


def test_time_left_ignores_what_was_done_before(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(100, "collect", "shards", done=50, stream=stream) as bar:
        clock[0] += 10.0
        bar.update(10)
    assert stream.getvalue() == "collect: 60/100 shards (60%), 40.0 s left\n"


def test_an_interrupted_job_shows_where_it_stopped(clock: list[float]) -> None:
    stream = io.StringIO()

    def work() -> None:
        with Progress(3, "collect", "shards", stream=stream) as bar:
            bar.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stream.getvalue().startswith("collect: 1/3 shards (33%)")


def test_nothing_to_do(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(0, "collect", "shards", stream=stream):
        pass
    assert stream.getvalue() == "collect: 0/0 shards (100%), 0.0 s\n"
