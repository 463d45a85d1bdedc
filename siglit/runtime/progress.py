"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Knows nothing of what is being done.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Counts units of work up to a total and shows how fast it goes and when it ends; a context manager."""

    def __init__(self, title: str, total: int | None, unit: str, *, start: int = 0, quiet: bool = False):
        """Prepare a meter.

        Args:
            title: what is being done.
            total: units to do in all, or at most, or None where it is not known.
            unit: plural noun of what is counted, such as "images".
            start: units already done before; they count to the total, not to the rate.
            quiet: show nothing (the other ranks of a group).
        """
        self._title, self._total, self._unit, self._quiet = title, total, unit, quiet
        self._begun, self._start, self.done = time.monotonic(), start, start
        self._note, self._last_line = "", time.monotonic()
        self._said: tuple[int, str] | None = None
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, told="")

    def __enter__(self) -> Self:
        """Start showing."""
        self._begun = self._last_line = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def advance(self, units: int, note: str = "") -> None:
        """Count more units; `note` is shown behind the rate."""
        self.done += units
        self._note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, told=self._told())
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._start) / max(time.monotonic() - self._begun, 1e-9)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing; say the end, unless the work failed. The total may have been too large: what is done is all."""
        told = self._said == (self.done, self._note) and self.done == self._total
        if kind is None and self._total is not None:
            self._total = self.done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self._total, told=self._told())
            self._bar.stop()
        elif kind is None and not told:
            self._line()

    def _told(self) -> str:
        of = f"{self.done:,}" + (f" of {self._total:,}" if self._total is not None else "")
        parts = [f"{of} {self._unit}", f"{self.rate:,.0f}/s"]
        if self._total is not None and self.rate > 0 and self.done < self._total:
            parts.append(f"{_duration((self._total - self.done) / self.rate)} left")
        return ", ".join(parts) + (f"  {self._note}" if self._note else "")

    def _line(self) -> None:
        self._last_line, self._said = time.monotonic(), (self.done, self._note)
        if not self._quiet:
            print(f"{self._title}: {self._told()}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
