"""`python -m siglit …` in a process of its own, forked from one that has imported everything.

Importing torch and Lightning costs a process six seconds of a core; a fork of a process that has imported them saves
this. The command has its own folder, environment, streams and exit status, and `__main__` is siglit's, so that it can
start further ranks.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# No GPU: these are the ranks of gloo groups, and commands whose results are compared with the CPU's bit for bit. A fork
# could not use CUDA anyway if the process that it was forked from had.
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
PRELOAD = [
    "siglit.commands.precompute",
    "siglit.commands.train",
    "siglit.commands.eval_retrieval",
    "siglit.commands.report",
    "siglit.commands.plan",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def run(words, cwd, env, timeout=300):
    """Run one command; as subprocess.run with captured text does, TimeoutExpired included."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_command, args=(words, str(cwd), {**os.environ, **ENV, **env}, out, err))
        with environment():
            process.start()
        process.join(timeout)
        timed_out = process.is_alive()
        if timed_out:
            process.kill()
            process.join()
        texts = [path.read_text() if path.exists() else "" for path in (out, err)]
        if timed_out:
            raise subprocess.TimeoutExpired(words, timeout, *texts)
        return subprocess.CompletedProcess(words, process.exitcode, *texts)


@contextlib.contextmanager
def environment():
    """Set what the process to fork from needs before it imports torch; the first command starts it."""
    before = {name: os.environ.get(name) for name in ENV}
    os.environ.update(ENV)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _command(words, cwd, env, out, err):
    # As where a shell starts the command. The method that this process inherits would have every loader of worker
    # processes start a further process that imports everything.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["siglit", *words]
    sys.path[0:0] = [cwd] if cwd not in sys.path else []
    runpy.run_module("siglit", run_name="__main__", alter_sys=True)
