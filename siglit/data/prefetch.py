"""An iterator whose items a background thread makes ahead of time.

Knows nothing of what the items are.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from typing_extensions import override

T = TypeVar("T")


class Prefetched(Iterator[T], Generic[T]):
    """Hands out the items of an iterator, at most `ahead` of which are made before `next` requests them.

    The thread starts with the first `next`, so that the object may be made before a fork. It ends with the iterator,
    with `close`, when the object is garbage, or with the program. `next` raises what the iterator raises.
    """

    def __init__(self, items: Iterator[T], ahead: int = 2):
        """Take the iterator; it runs in the thread alone."""
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        # A slot is taken before an item is made, not after: no item is made that has no place.
        slots, stop = threading.Semaphore(ahead), threading.Event()
        self._slots = slots
        # The thread must hold no reference to this object, or it would keep it alive.
        self._thread = threading.Thread(
            target=_make, args=(items, self._ready, slots, stop), name="siglit-prefetch", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._thread, slots, stop)

    @override
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
        """Stop making items and wait for the one that is being made."""
        self._end()


def _make(items: Iterator, ready: queue.SimpleQueue, slots: threading.Semaphore, stop: threading.Event) -> None:
    while True:
        slots.acquire()
        if stop.is_set():
            # For a consumer that `close`, called in another thread, finds waiting.
            ready.put((None, StopIteration()))
            return
        try:
            item = next(items)
        except BaseException as error:
            ready.put((None, error))
            return
        ready.put((item, None))
        # Kept here while the next one is made, it would be one item more than `ahead`.
        del item


def _end(thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    slots.release()
    # Garbage may be collected in the thread itself.
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()
