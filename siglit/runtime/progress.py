"""Progress of long work on stderr: a bar with rate and time left on a terminal, a line every 10 s elsewhere.

Knows nothing of the work itself.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Counts units of work up to a total and shows their rate and the time left; a context manager."""

    def __init__(self, title: str, total: int | None, unit: str, *, start: int = 0, quiet: bool = False):
        """Prepare a meter; it shows nothing before the `with` statement.

        Args:
            title: name of the work.
            total: units in all, or an upper bound, or None where it is not known.
            unit: plural noun of what is counted, such as "images".
            start: units done before this process; they count to the total but not to the rate.
            quiet: show nothing (the other ranks of a group).
        """
        self._title, self._total, self._unit, self._quiet = title, total, unit, quiet
        self._start_time, self._start, self.done = time.monotonic(), start, start
        self._note, self._line_time = "", time.monotonic()
        self._last_line: tuple[int, str] | None = None
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, status="")

    def __enter__(self) -> Self:
        """Start the clock and the bar."""
        self._start_time = self._line_time = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, units: int, note: str = "") -> None:
        """Count more units; `note` is shown behind the rate."""
        self.done += units
        self._note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, status=self._status())
        elif time.monotonic() - self._line_time >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._start) / max(time.monotonic() - self._start_time, 1e-9)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and print the last line, unless the work failed; a total that was too large is corrected."""
        is_printed = self._last_line == (self.done, self._note) and self.done == self._total
        if kind is None and self._total is not None:
            self._total = self.done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self._total, status=self._status())
            self._bar.stop()
        elif kind is None and not is_printed:
            self._print_line()

    def _status(self) -> str:
        count = f"{self.done:,}" + (f" of {self._total:,}" if self._total is not None else "")
        parts = [f"{count} {self._unit}", f"{self.rate:,.0f}/s"]
        if self._total is not None and self.rate > 0 and self.done < self._total:
            parts.append(f"{format_duration((self._total - self.done) / self.rate)} left")
        return ", ".join(parts) + (f"  {self._note}" if self._note else "")

    def _print_line(self) -> None:
        self._line_time, self._last_line = time.monotonic(), (self.done, self._note)
        if not self._quiet:
            print(f"{self._title}: {self._status()}", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Such as 0:07, 12:30 or 10:10:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
