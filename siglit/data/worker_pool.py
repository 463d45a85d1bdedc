"""Worker processes that do jobs one after another and hand the results out in the order of the jobs.

Knows how processes start, end and report errors, not what a job is. torch's DataLoader moves jobs and results.
"""

import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from siglit.errors import UserError
from siglit.runtime.torch_internals import end_persistent_workers, end_workers

J = TypeVar("J")
R = TypeVar("R")
_WORKER_GRACE = 30.0
"""Seconds between SIGTERM and the end of a worker."""


class WorkerPool(Generic[J, R]):
    """Processes that run a function on jobs; they stay between runs and end with `close`, or with this object."""

    def __init__(
        self,
        function: Callable[[J], R],
        workers: int,
        *,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
    ):
        """Prepare the pool.

        Args:
            function: computes the result of a job.
            workers: processes, which start with the first run; 0: run in this one.
            pin_memory: put the tensors of results into page-locked memory; a result's class does it in `pin_memory`.
            generator: what the loader draws a seed for its workers from; None: torch's own, which is the training's.
        """
        self._jobs = _JobSampler()
        self._loader: DataLoader = DataLoader(
            _FunctionDataset(function),
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=2 if workers > 0 else None,
            persistent_workers=workers > 0,
            worker_init_fn=_prepare_worker,
            generator=generator,
        )

    def run(self, jobs: Iterator[J]) -> Iterator[R]:
        """Start a run and return the results in the order of the jobs; two jobs per worker are taken ahead.

        A UserError that the function or `jobs` raises is raised here in its place, after all results before it, and
        unchanged, without the worker's traceback.
        """
        self._jobs.jobs = _errors_as_items(jobs)
        results = iter(self._loader)
        if self._loader.num_workers > 0:
            # At the program's end the workers end in order before multiprocessing sends them SIGTERM. Finalizers
            # run in reverse order of creation, so a thread that takes results ends before the workers that make them.
            weakref.finalize(results, _shut_down, weakref.ref(results))
        return _raise_errors(results)

    def close(self) -> None:
        """End the processes and wait for them."""
        end_persistent_workers(self._loader)


class _JobSampler:
    """Hands a loader the jobs of the current run in place of indices."""

    def __init__(self) -> None:
        self.jobs: Iterator = iter(())

    def __iter__(self) -> Iterator:
        return self.jobs


class _FunctionDataset(Dataset, Generic[J, R]):
    def __init__(self, function: Callable[[J], R]):
        self._function = function

    @override
    def __getitem__(self, job: J | UserError) -> R | UserError:
        # Returned instead of raised: a loader would wrap it in the worker's traceback.
        if isinstance(job, UserError):
            return job
        try:
            return self._function(job)
        except UserError as error:
            return error


def _errors_as_items(jobs: Iterator[J]) -> Iterator[J | UserError]:
    try:
        # No name here may keep a job alive while the next one is made.
        yield from jobs
    except UserError as error:
        yield error


def _raise_errors(results: Iterator[R | UserError]) -> Iterator[R]:
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result
        # Not kept while the next one is waited for.
        del result


def _shut_down(results: weakref.ref) -> None:
    running = results()
    if running is not None:
        end_workers(running)


def _print_nothing(*_: object) -> None:
    pass


def _exit_later(*_: object) -> None:
    timer = threading.Timer(_WORKER_GRACE, os._exit, (128 + signal.SIGTERM,))
    timer.daemon = True
    timer.start()


def _prepare_worker(_: int) -> None:
    # Ctrl-C reaches the workers too; the process that they work for decides what becomes of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SLURM and `timeout` send SIGTERM to all processes of a run; the first one may still want to finish its step.
    signal.signal(signal.SIGTERM, _exit_later)
    # A worker's errors travel to that process with its results. What would be printed here is the complaint of
    # multiprocessing's own thread that the other end of its pipe is closed, as it is after Ctrl-C.
    sys.excepthook = _print_nothing
    # A collection would write to every page that is shared with that process, and so copy it.
    gc.freeze()
    # Each worker owns one core; more threads would fight over it.
    torch.set_num_threads(1)
