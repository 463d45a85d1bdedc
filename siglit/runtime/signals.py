"""Stop on SIGTERM and Ctrl-C, and never outlive the first process of a run.

Files on disk are whole at any moment (see `files.py`), so a process may stop without finishing anything. A process
that does not unwind within 3 s of the signal, because it waits for others or for a library, is ended. Work that wants
to complete its current step may hold back the first signal, and only the first. Knows nothing of that work.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPED = "stopped; completed work is kept"
"""What a process prints when a signal ends it and nothing more is known."""
_PARENT = "SIGLIT_FIRST_PROCESS"
_GRACE = 3.0
_WATCH_EVERY = 0.5
_Hook = Callable[[Any], object]


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Not an Exception, so that no error handler swallows it."""

    exit_code = 128 + signal.SIGTERM


class Signals:
    """The signals received within `stopping_at_signals`.

    Attributes:
        received: SIGTERM and SIGINT, in order.
        raised: whether a handler has raised an exception for one of them, wherever the program was then.
        hold: the first signal is only recorded in `received`; the code that sets this checks it and ends. A second
            signal ends the block at once.
    """

    def __init__(self) -> None:
        """Record the handlers in force; install none."""
        self.received: list[int] = []
        self.hold = self.raised = False
        self._numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
            self._numbers.append(signal.SIGINT)
        self._before = {number: signal.getsignal(number) for number in self._numbers}

    def install(self) -> None:
        """Set the handlers, also over those of another library. Call it in the main thread only."""
        for number in self._numbers:
            signal.signal(number, self._stop)

    def restore(self) -> None:
        """Set the previous handlers again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exception(self, message: str = "") -> KeyboardInterrupt:
        """The exception to raise for the first signal, or for SIGTERM if another process received it.

        Args:
            message: what to print when the process ends; "": a general line.
        """
        number = self.received[0] if len(self.received) > 0 else signal.SIGTERM
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        return kind(message) if message else kind()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if not self.hold or len(self.received) > 1:
            self.raised = True
            raise self.exception()


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[Signals]:
    """Raise `Terminated` on SIGTERM and KeyboardInterrupt on Ctrl-C, and make sure that either ends the block.

    Python drops an exception that is raised within a destructor or a fork hook. It is then raised at the end of the
    block, or, if the block does not end within 3 s, the process is ended; Python's report of the dropped exception is
    suppressed. A callback of a C library loses the exception too, and the library fails with an error of its own; that
    error is replaced by the exception of the signal.

    Does nothing outside of the main thread, where Python handles no signals.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        signals.install = lambda: None  # type: ignore[method-assign]
        yield signals
        return
    # Python's handlers run only between two instructions; the pipe is written even during a blocking call.
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    block_ended = threading.Event()
    threading.Thread(target=_end_after_grace, args=(source, block_ended, signals), daemon=True).start()
    before_hook, sys.unraisablehook = sys.unraisablehook, _without_signal_reports(sys.unraisablehook)
    signals.install()
    before_sink = signal.set_wakeup_fd(sink)
    try:
        yield signals
        if len(signals.received) > 0:
            raise signals.exception()
    except Exception as error:
        if signals.raised:
            raise signals.exception() from error
        raise
    finally:
        block_ended.set()
        signal.set_wakeup_fd(before_sink)
        signals.restore()
        sys.unraisablehook = before_hook
        os.close(sink)


@contextlib.contextmanager
def ending_with_first_process(is_first: bool) -> Iterator[None]:
    """In the first process, pass its id to the processes started in the block; in another, end when the first ends."""
    if not is_first:
        parent = int(os.environ.get(_PARENT, os.getppid()))
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
        yield
        return
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)


def _without_signal_reports(hook: _Hook) -> _Hook:
    def report(dropped: Any) -> object:
        # Torch raises in its handler of SIGCHLD too, when a worker of a loader was killed. The loader says so again.
        of_worker = str(dropped.exc_value).startswith("DataLoader worker (pid")
        return None if of_worker or issubclass(dropped.exc_type, KeyboardInterrupt) else hook(dropped)

    return report


def _end_after_grace(source: int, block_ended: threading.Event, signals: Signals) -> None:
    held = 0
    with open(source, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            if signals.hold and not held:
                held = number[0]
            elif not block_ended.wait(_GRACE):
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(STOPPED, file=sys.stderr, flush=True)
                _end(128 + (held or number[0]))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY)
    _end(1)


def _end(code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
