"""Prefetching: two ahead and no more, errors reach the consumer, and the thread never outlives its owner."""

import gc
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest

from siglit.data.prefetch import Prefetched


def threads():
    return [t for t in threading.enumerate() if t.name == "siglit-prefetch"]


def eventually(condition):
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    gc.collect()
    assert eventually(lambda: not threads())


def counted(produced, stop=1000):
    for number in range(stop):
        produced.append(number)
        yield number


def test_items_come_in_order_and_end():
    items = Prefetched(iter(range(50)))
    assert list(items) == list(range(50))
    assert list(items) == []


def test_exactly_two_are_made_ahead():
    produced = []
    items = Prefetched(counted(produced))
    time.sleep(0.05)
    assert produced == [], "nothing starts before the first item is requested"
    for taken in range(1, 5):
        next(items)
        assert eventually(lambda taken=taken: len(produced) == taken + 2)
        time.sleep(0.03)
        assert len(produced) == taken + 2
    items.close()
    with pytest.raises(StopIteration):
        next(items)


def test_the_consumer_does_not_wait_for_items_that_are_ready():
    """Ten items of 20 ms each, taken every 30 ms: only the first is waited for."""

    def slow():
        for number in range(10):
            time.sleep(0.02)
            yield number

    items, waited = Prefetched(slow()), 0.0
    next(items)
    for _ in range(9):
        time.sleep(0.03)
        begun = time.perf_counter()
        next(items)
        waited += time.perf_counter() - begun
    assert waited < 0.09, "half of what making them takes"
    items.close()


def test_an_error_is_raised_after_the_items_before_it():
    def failing():
        yield 1
        raise OSError("the disk went")

    items = Prefetched(failing())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk went"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("end", ["close", "forget", "exhaust"])
def test_the_thread_ends(end):
    items = Prefetched(counted([], 5))
    next(items)
    assert threads()
    if end == "close":
        items.close()
        assert not threads(), "close waits for it"
    elif end == "exhaust":
        list(items)
    del items
    gc.collect()
    assert eventually(lambda: not threads())


def test_close_ends_a_consumer_that_waits_in_another_thread():
    items = Prefetched(iter(()), ahead=0)
    consumer = threading.Thread(target=list, args=(items,), daemon=True)
    consumer.start()
    assert eventually(threads)
    items.close()
    consumer.join(10)
    assert not consumer.is_alive()


def test_a_program_ends_with_a_thread_waiting():
    """At once and quietly, though nothing was closed."""
    code = "from siglit.data.prefetch import Prefetched; import itertools; p = Prefetched(itertools.count()); next(p)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _take(items, queue):
    queue.put(list(items))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_made_before_a_fork_taken_after_it():
    context = multiprocessing.get_context("fork")
    items, queue = Prefetched(iter(range(7))), context.Queue()
    child = context.Process(target=_take, args=(items, queue))
    child.start()
    assert queue.get(timeout=30) == list(range(7))
    child.join()
    assert list(items) == list(range(7)), "and here still"
