"""A pool of processes: results in the order of the jobs, errors in their place, and no process left behind."""

import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from siglit.data.worker_pool import WorkerPool
from siglit.errors import UserError

WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def square(number):
    """Slower for even numbers, so that results are completed in another order than that of the jobs."""
    time.sleep(0.01 * (number % 2 == 0))
    if number == 5:
        raise UserError("five is refused")
    if number == 6:
        raise ValueError("six is a mistake of ours")
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


@pytest.fixture
def pool(workers):
    pool = WorkerPool(square, workers)
    yield pool
    pool.close()


@WORKERS
def test_results_are_in_the_order_of_the_jobs_run_after_run(pool):
    assert list(pool.run(iter(range(5)))) == [0, 1, 4, 9, 16]
    assert list(pool.run(iter([3, 2]))) == [9, 4]
    assert list(pool.run(iter(()))) == []


def test_processes_stay_between_runs_and_start_again_after_close():
    pool = WorkerPool(lambda _: os.getpid(), 2)
    first = set(pool.run(iter(range(6))))
    assert os.getpid() not in first
    assert set(pool.run(iter(range(6)))) == first
    pool.close()
    pool.close()
    assert multiprocessing.active_children() == []
    assert not first & set(pool.run(iter(range(6))))
    pool.close()


@WORKERS
def test_results_of_a_run_that_was_left_do_not_appear_in_the_next(pool):
    left = pool.run(iter(range(5)))
    assert next(left) == 0
    assert list(pool.run(iter([1, 2, 3]))) == [1, 4, 9]


@WORKERS
def test_a_user_error_of_a_job_is_raised_in_its_place_and_as_it_is(pool):
    results = pool.run(iter([1, 2, 5, 3]))
    assert list(itertools.islice(results, 2)) == [1, 4]
    with pytest.raises(UserError, match="^five is refused$"):
        next(results)


@WORKERS
@pytest.mark.parametrize("before", [[], [1, 2, 3]])
def test_a_user_error_of_the_jobs_is_raised_after_all_results_before_it(pool, before):
    def jobs():
        yield from before
        raise UserError("the source is damaged")

    results = []
    with pytest.raises(UserError, match="^the source is damaged$"):
        results.extend(pool.run(jobs()))
    assert results == [number**2 for number in before]


@WORKERS
def test_other_errors_keep_their_type_and_the_pool_runs_on(pool):
    with pytest.raises(ValueError, match="six is a mistake of ours"):
        list(pool.run(iter([1, 6, 2])))
    assert list(pool.run(iter([1, 2]))) == [1, 4]


def test_a_killed_worker_is_an_error_and_leaves_no_other():
    pool = WorkerPool(square, 2)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(pool.run(iter([1, 7, 2, 3])))
    pool.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_two_jobs_per_worker_are_taken_ahead(workers):
    taken = []
    pool = WorkerPool(square, workers)
    results = pool.run(taken.append(number) or number for number in [1, 2, 3, 4] * 3)
    for count in range(4):
        assert len(taken) == 2 * workers + count
        next(results)
    pool.close()


def test_processes_end_with_the_pool():
    pool = WorkerPool(square, 2)
    results = pool.run(iter([1, 2, 3]))
    next(results)
    assert len(multiprocessing.active_children()) == 2
    del pool, results


def test_workers_ignore_ctrl_c_have_one_thread_and_survive_sigterm_for_a_while():
    pool = WorkerPool(lambda number: (os.kill(os.getpid(), number), torch.get_num_threads())[1], 1)
    assert list(pool.run(iter([signal.SIGINT, signal.SIGTERM, signal.SIGINT]))) == [1, 1, 1]
    pool.close()


def test_a_pool_works_in_a_thread_that_others_run_beside():
    pool, results, stop = WorkerPool(square, 2), [], threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    thread = threading.Thread(target=lambda: results.extend(pool.run(iter([1, 2, 3]))))
    thread.start()
    thread.join(30)
    stop.set()
    other.join()
    pool.close()
    assert results == [1, 4, 9]
