"""Scripts as processes of their own that need not load torch again each time.

A keeper process imports once what all scripts need and then only forks. A fork runs its script from
the first line to the exit code, with a session, files, directory and environment of its own: it can
be signalled and killed as any process, and shares nothing with the next one.
"""

import atexit
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
# What they import, and what the first optimizer of a process loads.
LOADED = ("chat", "pretrain", "sft", "torch._dynamo", "serve.app", "serve.server", "vqa.model")
START = "import sys; sys.path[:0] = {paths}; import warm; warm.keep({orders})"


@cache
def keeper() -> "Keeper":
    """One for all tests, which ends with them; skips where nothing forks."""
    pytest.importorskip("termios")
    found = Keeper()
    atexit.register(found.close)
    return found


class Keeper:
    """The process that forks; `start` orders a fork."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        paths = [str(REPO), str(Path(__file__).parent)]
        code = START.format(paths=paths, orders=theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPO, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def start(
        self,
        words: list[str],
        cwd: Path | str,
        environment: Mapping[str, str] = os.environ,
        terminal: int | None = None,
        log: int | None = None,
    ) -> "Process":
        """Start a script, given as its path and arguments.

        terminal: an open one for all that it reads and says, from which Ctrl-C reaches it; without
            one there is nothing to read, and what it says on stderr is the process's `said`
        log: an open file for its stderr; what it says on stdout is then the process's `said`
        """
        told, tell = os.pipe()
        said, say = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        files = [null, null, say] if log is None else [null, say, log]
        files = files if terminal is None else [terminal] * 3
        order = json.dumps([words, str(cwd), dict(environment), terminal is not None])
        socket.send_fds(self._orders, [order.encode()], [*files, tell])
        for fd in (null, say, tell):
            os.close(fd)
        return Process(told, said)

    def close(self) -> None:
        self._orders.close()
        self._process.wait()


class Process:
    """A script that was started: what the tests use of subprocess.Popen."""

    def __init__(self, told: int, said: int) -> None:
        self._told = os.fdopen(told, encoding="ascii")
        self.said = os.fdopen(said, encoding="utf-8")
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self._told.readline())
        return self.returncode

    def poll(self) -> int | None:
        """The exit code of a script that has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self) -> tuple[None, str]:
        """What it says until it ends, as subprocess tells it."""
        said = self.said.read()
        self.wait()
        return None, said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the script, if it has not ended, and close its files."""
        self.kill()
        self.wait()
        self._told.close()
        self.said.close()


def keep(socket_number: int) -> None:
    """Fork for each order that comes through a socket, until it is closed."""
    for name in LOADED:
        __import__(name)
    from babyllama.cpu import compile

    compile.library()
    gc.collect()
    gc.freeze()  # so that a fork's collector leaves the keeper's pages alone
    assert "readline" not in sys.modules, "it would know the keeper's terminal"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is meant for the scripts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    with socket.socket(fileno=socket_number) as orders:
        while True:
            order, fds, _, _ = socket.recv_fds(orders, 1 << 16, 4)
            if not order:
                return
            if os.fork() == 0:
                break
            for fd in fds:
                os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *files, tell = fds
    script = os.fork()
    if script == 0:
        os.close(tell)
        _become(files, *json.loads(order))
        return
    for fd in files:
        os.close(fd)
    os.write(tell, b"%d\n" % script)
    os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(script, 0)[1]))
    os._exit(0)


def _become(
    files: list[int], words: list[str], cwd: str, environment: dict[str, str], at_terminal: bool
) -> None:
    """Run a script in this process, as Python does when it is started with one."""
    import fcntl  # not on Windows, where nothing forks
    import termios

    os.setsid()
    for number, fd in enumerate(files):
        os.dup2(fd, number)
        os.close(fd)
    if at_terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        usual = "backslashreplace" if name == "stderr" else "strict"
        by_line = name == "stderr" or os.isatty(number)
        binary = os.fdopen(number, mode, closefd=False)
        file = io.TextIOWrapper(binary, encoding, errors or usual, line_buffering=by_line)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
