"""Four processes that become the ranks of a real gloo group for one piece of work after another.

They are started once for all tests, as forks of a process that has imported torch, because starting takes longer than
the work.
"""

import datetime
import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings

import torch
import torch.distributed as dist

from tests import forks

MAX_RANKS = 4
NAME = "rank"


def other_processes():
    """The child processes of this one but the ranks, which stay from test to test: {process id}."""
    return {child.pid for child in multiprocessing.active_children() if not child.name.startswith(NAME)}


class Ranks:
    """Run a module's function on 1 to 4 ranks: `run(work, size, *args)` is [work(rank, size, *args) of each rank]."""

    def __init__(self):
        self.processes, self.pipes = [], []

    def run(self, work, size, *args, timeout=90):
        """Raise AssertionError with the traceback if a rank fails, TimeoutError if one does not come back."""
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((work, size, f"file://{folder}/store", args))
            for pipe in self.pipes[:size]:
                pipe.send_bytes(job)
            end = time.monotonic() + timeout
            replies = []
            for rank, pipe in enumerate(self.pipes[:size]):
                if not pipe.poll(max(0, end - time.monotonic())):
                    self.stop()
                    raise TimeoutError(f"rank {rank} of {size} has not come back after {timeout} s")
                replies.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(replies) if text]
        assert not failures, "\n".join(failures)
        return [result for _, result in replies]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self):
        while len(self.processes) < MAX_RANKS:
            ours, theirs = forks.context.Pipe()
            rank = len(self.processes)
            process = forks.context.Process(target=_serve, args=(rank, theirs), name=f"{NAME} {rank}", daemon=True)
            with forks.environment():
                process.start()
            self.processes.append(process)
            self.pipes.append(ours)


def _serve(rank, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        text, result = None, None
        try:
            work, size, store, args = pickle.loads(job)
            limit = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
            try:
                result = work(rank, size, *args)
                # No rank may close its connections while another still needs them.
                dist.barrier()
            finally:
                dist.destroy_process_group()
        except BaseException:
            text = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((text, result)))
