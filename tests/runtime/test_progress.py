"""Progress in plain lines: count, rate and time left."""

import types

import pytest

from siglit.runtime import progress
from siglit.runtime.progress import Meter


class Clock:
    """Time that passes only when a test advances it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return clock


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_has_count_rate_and_time_left(clock, capsys):
    with Meter("precompute val", 10_000, "images") as meter:
        clock.now += 20
        meter.advance(2_500, "loss 0.5")
        assert lines(capsys) == ["precompute val: 2,500 of 10,000 images, 125/s, 1:00 left  loss 0.5"]
        clock.now += 60
        meter.advance(7_500)
        assert lines(capsys) == ["precompute val: 10,000 of 10,000 images, 125/s"]


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(clock, capsys):
    with Meter("work", 100, "steps") as meter:
        for _ in range(50):
            clock.now += 1
            meter.advance(2)
    assert [line.split()[1] for line in lines(capsys)] == ["20", "40", "60", "80", "100"]


def test_a_total_that_was_too_large_ends_with_what_was_done(clock, capsys):
    """A fold of a set, whose other images are counted in the total."""
    with Meter("work", 100, "steps") as meter:
        clock.now += 20
        meter.advance(80)
    assert lines(capsys) == ["work: 80 of 100 steps, 4/s, 0:05 left", "work: 80 of 80 steps, 4/s"]


def test_work_done_before_counts_to_the_total_and_not_to_the_rate(clock, capsys):
    with Meter("training", 1_000, "examples", start=600) as meter:
        clock.now += 10
        meter.advance(100)
        assert meter.rate == pytest.approx(10)
    assert lines(capsys)[0] == "training: 700 of 1,000 examples, 10/s, 0:30 left"


def test_time_before_the_start_does_not_count(clock):
    meter = Meter("work", 10, "steps", quiet=True)
    clock.now += 100
    with meter:
        clock.now += 5
        meter.advance(10)
    assert meter.rate == pytest.approx(2)


def test_an_unknown_total_has_no_time_left(clock, capsys):
    with Meter("reading", None, "captions") as meter:
        clock.now += 10
        meter.advance(30)
    assert lines(capsys)[-1] == "reading: 30 captions, 3/s"


def test_long_times_have_hours(clock, capsys):
    with Meter("work", 36_610, "steps") as meter:
        clock.now += 10
        meter.advance(10)
    assert lines(capsys)[0].endswith("10:10:00 left")


def test_quiet_prints_nothing(clock, capsys):
    with Meter("work", 10, "steps", quiet=True) as meter:
        clock.now += 100
        meter.advance(5)
    assert lines(capsys) == []


def test_failed_work_has_no_last_line(clock, capsys):
    with pytest.raises(RuntimeError), Meter("work", 10, "steps"):
        raise RuntimeError
    assert lines(capsys) == []


def test_no_work_does_not_divide_by_zero(clock, capsys):
    with Meter("work", 0, "steps"):
        pass
    assert lines(capsys) == ["work: 0 of 0 steps, 0/s"]


def test_a_terminal_gets_a_bar_with_the_same_words(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with Meter("training", 100, "examples") as meter:
        meter.advance(40, "loss 0.5")
        meter._bar.refresh()
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "40 of 100" in shown
    assert "left" in shown
    assert "loss 0.5" in shown
