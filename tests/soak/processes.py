"""Start a command of siglit in a session of its own, to be killed: its first process alone, any other, or all.

A fresh interpreter imports for seconds, and a kill would mostly meet that. Here every process is a fork of one that has
imported everything, the second rank included: a spare process waits for Lightning to start it. Real starts of ranks are
in tests/runtime/test_signals.py. Knows nothing of what is killed and what must be left.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import struct
import time
from pathlib import Path

from tests import forks
from tests.runtime.test_signals import members


class Running:
    """A command that runs in a session of its own; its streams go to files."""

    def __init__(self, words, cwd, logs, *, ranks=1, privileged=True):
        """Start it.

        Args:
            words: of the command line, after `siglit`.
            cwd: working directory.
            logs: an existing folder for the files `out` and `err`, which are overwritten.
            ranks: processes that Lightning is going to start, this one included.
            privileged: False: root gives up its right to write into folders whose mode forbids it.
        """
        self.words, self._logs = [*map(str, words)], logs
        for name in ("out", "err"):
            (logs / name).unlink(missing_ok=True)
        env = {**os.environ, **forks.ENV}
        self._process = forks.context.Process(
            target=_be_command, args=(self.words, str(cwd), env, logs / "out", logs / "err", ranks, privileged)
        )
        with forks.environment():
            self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds):
        """Exit status; raises TimeoutError, after killing all, if it is still running then."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill_all()
            raise TimeoutError(f"{' '.join(self.words)} has not ended after {seconds} s: {self.err}")
        return self._process.exitcode

    def processes(self):
        """Ids of all processes of the session that have not ended."""
        return members(self.pid)

    def kill(self, pid):
        """SIGKILL to one process of the session."""
        _kill(pid)

    def kill_all(self):
        """SIGKILL to the whole session, as the machine's end."""
        for pid in self.processes():
            _kill(pid)
        self._process.join()

    def end(self, seconds):
        """Wait until no process of the session is left, and return whether it came to that by itself."""
        until = time.monotonic() + seconds
        while self.processes() and time.monotonic() < until:
            time.sleep(0.02)
        by_itself = not self.processes()
        self.kill_all()
        return by_itself

    @property
    def out(self):
        return _read(self._logs / "out")

    @property
    def err(self):
        return _read(self._logs / "err")


def _read(path: Path):
    return path.read_text() if path.exists() else ""


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _be_command(words, cwd, env, out, err, ranks, privileged):
    os.setsid()
    if not privileged:
        # Version 3 of the interface, this process; two words each of effective, permitted and inheritable rights.
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    spares = [_fork_spare(words, cwd, out, err) for _ in range(1, ranks)]
    if spares:
        from lightning.fabric.strategies.launchers import subprocess_script as fabric
        from lightning.pytorch.strategies.launchers import subprocess_script as pytorch

        class Starter:
            Popen = staticmethod(lambda _, env, cwd=None: _StartedSpare(*spares.pop(), env))

        for module in (fabric, pytorch):
            if hasattr(module, "subprocess"):
                module.subprocess = Starter
    forks._command(words, cwd, env, out, err)


def _fork_spare(words, cwd, out, err):
    """A process that becomes a further rank once its environment is sent; (its id, the pipe to send it through)."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid > 0:
        os.close(source)
        return pid, sink
    os.close(sink)
    code = 1
    try:
        with os.fdopen(source, "rb") as pipe:
            sent = pipe.read()
        if not sent:  # the first process has ended without starting it
            os._exit(0)
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        env = pickle.loads(sent)
        rank_zero_only.rank = int(env["LOCAL_RANK"])
        forks._command(words, cwd, env, out, err)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        os._exit(code)


class _StartedSpare:
    """What Lightning's launcher needs of a subprocess.Popen."""

    def __init__(self, pid, pipe, env):
        self.pid, self.returncode = pid, None
        with os.fdopen(pipe, "wb") as file:
            file.write(pickle.dumps(dict(env)))

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)
