"""Stop when told to, and never outlive the first process of a run.

What has to be whole is whole at any moment (see siglit.cache), so nothing need be finished first: whoever does not
unwind within some seconds, as a process that waits for others does not, is ended. Work that would rather come to the
end of its step holds the first signal back, and only that.
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

_PARENT = "SIGLIT_FIRST_PROCESS"
_GRACE = 3.0
_WATCH_EVERY = 0.5
_Hook = Callable[[Any], object]


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Not an Exception, so that no handler of errors swallows it."""

    exit_code = 128 + signal.SIGTERM


class Signals:
    """What came within `stopping_at_signals`.

    Attributes:
        came: SIGTERM and SIGINT, in order.
        raised: an exception for one of them was raised, wherever the program was then.
        hold: the first one is only noted in `came`; whoever sets this looks there and ends. A second one ends at once.
    """

    def __init__(self) -> None:
        """Nothing came yet."""
        self.came: list[int] = []
        self.hold = self.raised = False
        self._numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
            self._numbers.append(signal.SIGINT)
        self._before = {number: signal.getsignal(number) for number in self._numbers}

    def install(self) -> None:
        """Handle the signals here, also where somebody else has begun to. Only in the main thread."""
        for number in self._numbers:
            signal.signal(number, self._stop)

    def restore(self) -> None:
        """Handle the signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exception(self, told: str = "") -> KeyboardInterrupt:
        """What to leave with after the first signal (SIGTERM if it reached another process), and what to say then."""
        number = self.came[0] if self.came else signal.SIGTERM
        return (Terminated if number == signal.SIGTERM else KeyboardInterrupt)(*[told][: bool(told)])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        if not self.hold or len(self.came) > 1:
            self.raised = True
            raise self.exception()


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[Signals]:
    """Raise `Terminated` at SIGTERM and KeyboardInterrupt at Ctrl-C, and see that both end the block.

    Python drops what is raised while it runs a destructor or what is to be done around a fork: then the block is ended
    from outside, or, where it comes to its end within the grace, the exception is raised there; nothing is printed of
    it. Within a callback of a C library the exception is lost too, and the library fails in a way of its own, which
    then stands for it.

    Does nothing outside of the main thread, where Python handles no signals.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        signals.install = lambda: None  # type: ignore[method-assign]
        yield signals
        return
    # Python's own handlers run only between two instructions; the pipe is written from within a blocking call too.
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    left = threading.Event()
    threading.Thread(target=_end_after_grace, args=(source, left, signals), daemon=True).start()
    before_hook, sys.unraisablehook = sys.unraisablehook, _silent_about_signals(sys.unraisablehook)
    signals.install()
    before_sink = signal.set_wakeup_fd(sink)
    try:
        yield signals
        if signals.came:
            raise signals.exception()
    except Exception as error:
        if signals.raised:
            raise signals.exception() from error
        raise
    finally:
        left.set()
        signal.set_wakeup_fd(before_sink)
        signals.restore()
        sys.unraisablehook = before_hook
        os.close(sink)


@contextlib.contextmanager
def ending_with_first_process(is_first: bool) -> Iterator[None]:
    """Let the processes that this one starts in the block know it, or, in one of them, end when it has ended."""
    if not is_first:
        parent = int(os.environ.get(_PARENT, os.getppid()))
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        yield
        return
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)


def _silent_about_signals(hook: _Hook) -> _Hook:
    return lambda dropped: None if issubclass(dropped.exc_type, KeyboardInterrupt) else hook(dropped)


def _end_after_grace(source: int, left: threading.Event, signals: Signals) -> None:
    held = 0
    with open(source, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            if signals.hold and not held:
                held = number[0]
            elif not left.wait(_GRACE):
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print("stopped; what was finished is kept", file=sys.stderr, flush=True)
                _end(128 + (held or number[0]))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY)
    _end(1)


def _end(code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
