"""Stop at once when told to, and never outlive the first process of a run.

What has to be whole is whole at any moment (see siglit.cache), so nothing is finished first: whoever does not unwind
within some seconds, as a process that waits for others does not, is ended.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_PARENT = "SIGLIT_FIRST_PROCESS"
_GRACE = 3.0
_WATCH_EVERY = 0.5


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Not an Exception, so that no handler of errors swallows it."""

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM and KeyboardInterrupt at Ctrl-C, and see that both end the block.

    Python drops what is raised while it runs a destructor: then the block is ended from outside, or, where it comes to
    its end within the grace, the exception is raised there.

    Does nothing outside of the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python's own handlers run only between two instructions; the pipe is written from within a blocking call too.
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    left = threading.Event()
    threading.Thread(target=_end_after_grace, args=(source, left), daemon=True).start()
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise _exception(number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    before_sink = signal.set_wakeup_fd(sink)
    try:
        yield
        if came:
            raise _exception(came[0])
    finally:
        left.set()
        signal.set_wakeup_fd(before_sink)
        for number, handler in before.items():
            signal.signal(number, handler)
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


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _end_after_grace(source: int, left: threading.Event) -> None:
    with open(source, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not left.wait(_GRACE):
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print("stopped; what was finished is kept", file=sys.stderr, flush=True)
                _end(128 + number[0])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY)
    _end(1)


def _end(code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
