"""Items made ahead by one background thread, so that whoever takes them does not wait.

Knows nothing of what the items are.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Iterator[T], Generic[T]):
    """Hands out the items of an iterator, of which at most `ahead` are made before they are asked for.

    The thread starts with the first `next`, so that the object may be made before a fork. It ends with the iterator,
    with `close`, when the object is garbage, or with the program. What the iterator raises comes out of `next`.
    """

    def __init__(self, items: Iterator[T], ahead: int = 2):
        """Take the iterator; it runs in the thread alone."""
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        # A slot is taken before an item is made, not after: nothing is made that has no place.
        slots, stop = threading.Semaphore(ahead), threading.Event()
        self._slots = slots
        # The thread must not know this object, or it would keep it alive.
        self._thread = threading.Thread(
            target=_make, args=(items, self._ready, slots, stop), name="siglit-prefetch", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._thread, slots, stop)

    def __next__(self) -> T:
        if not self._end.alive:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        item, error = self._ready.get()
        self._slots.release()
        if error is not None:
            self.close()
            raise error
        return item

    def close(self) -> None:
        """Stop making items and wait for the one in hand."""
        self._end()


def _make(items: Iterator, ready: queue.SimpleQueue, slots: threading.Semaphore, stop: threading.Event) -> None:
    while True:
        slots.acquire()
        if stop.is_set():
            return
        try:
            made = next(items)
        except BaseException as error:
            ready.put((None, error))
            return
        ready.put((made, None))
        # An item that is being made while another waits here would be one more than was promised.
        del made


def _end(thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    slots.release()
    # Garbage may be collected in the thread itself.
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()
