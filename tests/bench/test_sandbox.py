"""Programs that a model wrote are shut in: 34 hostile ones leave the host as it was."""

import gzip
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from babyllama.config import REPO
from babyllama.errors import ConfigError
from bench.sandbox import run
from bench.sandbox.inside import MACHINES
from bench.sandbox.run import Limits, reasons, run_all, run_program, sources

DATA = REPO / ".." / "shared" / "data" / "benchmarks" / "human_eval" / "HumanEval.jsonl.gz"
QUICK = Limits(seconds=1.5, memory_mb=170, processes=16)
TESTS = "assert answer() == 42"
RIGHT = "def answer():\n    return 42\n"

pytestmark = pytest.mark.skipif(
    bool(run.missing()), reason=f"no programs can be shut in here: {run.missing()}"
)

# Each does its harm when it is loaded, then answers rightly where it still can. "passed" so means
# that the harm was refused or vanished with the sandbox; {place} is a folder of the host's.
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time"),
    "one fork more than allowed": (
        "import os\npids = []\nfor _ in range(500):\n    pid = os.fork()\n    if pid == 0:\n"
        "        import time; time.sleep(60); os._exit(0)\n    pids.append(pid)",
        "BlockingIOError",
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", ("MemoryError", "memory")),
    "memory of many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n"
        "        x = bytearray(60 * 10**6); time.sleep(60)\ntime.sleep(60)",
        "memory",
    ),
    # Memory that no process of the program maps, so that its pages are counted nowhere.
    "memory in detached segments": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.shmat.restype = ctypes.c_void_p\nfor _ in range(9):\n"
        "    n = libc.shmget(0, 50 * 10**6, 0o1600)\n"
        "    if n < 0: raise OSError(ctypes.get_errno(), 'shmget')\n"
        "    p = libc.shmat(n, None, 0)\n    ctypes.memset(p, 1, 50 * 10**6)\n"
        "    libc.shmdt(ctypes.c_void_p(p))", "PermissionError",
    ),
    "memory in files without a name": (
        "import os\nfor _ in range(450): os.write(os.memfd_create('x'), b'x' * 10**6)",
        "PermissionError",
    ),
    "memory in shared pages that are let go": (
        "import mmap\nm = mmap.mmap(-1, 350 * 10**6)\nfor i in range(0, len(m), 10**6):\n"
        "    m[i : i + 10**6] = b'x' * 10**6\n    m.madvise(mmap.MADV_DONTNEED)", "PermissionError",
    ),
    "memory in buffers of sockets": (
        "import socket\na, b = socket.socketpair()\nfor option in (7, 8, 32, 33):\n"
        "    try: a.setsockopt(socket.SOL_SOCKET, option, 10**7)\n"
        "    except PermissionError: continue\n    raise SystemExit\n"
        "a.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)", "passed",
    ),
    "reaches the runner's keys": (
        "import ctypes\nassert ctypes.CDLL(None).syscall({keyctl}, 0, -3, 0) == -1", "passed",
    ),
    "endless loop": ("while True: pass", "time"),
    "sleep": ("import time; time.sleep(60)", "time"),
    "endless recursion": ("def f(): return f()\nf()", "RecursionError"),
    "deletes files": (
        "import os, shutil\nfor place in ('{place}', '/work', '/dev', '/usr/lib/python3'):\n"
        "    shutil.rmtree(place, ignore_errors=True)\n"
        "for path in ('/usr/bin/env', '{place}/secret'):\n"
        "    try: os.unlink(path)\n    except OSError: pass",
        "passed",
    ),
    "reads a file of the host": ("open('{place}/secret').read()", "FileNotFoundError"),
    "reads passwords": ("open('/etc/passwd').read()", "FileNotFoundError"),
    "writes into the system": ("open('/usr/lib/owned', 'w')", ("OSError", "PermissionError")),
    "fills the disk": (
        "n = 0\nwhile True:\n    n += 1\n    open(f'/work/{{n}}', 'wb').write(b'x' * 10**6)",
        "OSError",
    ),
    "one huge file": ("with open('/work/x', 'wb') as f:\n    while True: f.write(b'x' * 10**6)",
                      ("OSError", "exit")),
    "endless files": (
        "n = 0\nwhile True:\n    n += 1; open(f'/work/{{n}}', 'w').close()", "OSError"
    ),
    "connects to the host": (
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "OSError"
    ),
    "asks for a name": ("import socket; socket.getaddrinfo('example.com', 80)", "gaierror"),
    "signals its parents": (
        "import os, signal\nfor n in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):\n"
        "    for pid in (os.getppid(), 1, {pid}):\n        try: os.kill(pid, n)\n"
        "        except OSError: pass",
        "passed",
    ),
    "signals everybody": (
        "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass", "passed"
    ),
    "huge output": ("import sys\nfor _ in range(200): sys.stdout.write('x' * 10**6)", "passed"),
    "leaves with success": ("import os; os._exit(0)", "exit"),
    "leaves politely": ("raise SystemExit(0)", "SystemExit"),
    "changes the builtins": (
        "import builtins, os, sys, json\n"
        "builtins.exec = builtins.compile = builtins.open = lambda *a, **k: None\n"
        "json.dumps = os._exit = sys.exit = lambda *a, **k: 'passed'\n"
        "def answer(): return 41",
        ("AssertionError", "exit"),
    ),
    "threads that outlive": (
        "import threading, time\nfor _ in range(5):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()",
        "passed",
    ),
    "a daemon that outlives": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(60)\n        open('{place}/late', 'w')\n    os._exit(0)",
        "passed",
    ),
    "symbolic links": (
        "import os\nos.symlink('{place}', '/work/link')\nos.symlink('/proc/1/root', '/work/up')\n"
        "for path in ('/work/link/secret', '/work/up/etc/passwd', '/../../etc/passwd'):\n"
        "    assert not os.path.exists(path)",
        "passed",
    ),
    "claims to have passed": (
        "import os\nfor fd in range(3, 20):\n"
        "    try: os.write(fd, b'{{\"result\": \"passed\"}}\\n')\n"
        "    except OSError: pass\ndef answer(): return 41",
        "exit",
    ),
    "gets out of the folder": (
        "import os\nos.chroot('/work')", "PermissionError"
    ),
    "mounts": (
        "import ctypes\nr = ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None)\n"
        "assert r == -1", "passed",
    ),
    "takes rights back": ("import os\nos.setuid(0)", ("PermissionError", "OSError")),
}  # fmt: skip


@pytest.fixture
def host(tmp_path):
    """A folder and a listening port of the host, and what must be the same afterwards."""
    (tmp_path / "secret").write_text("a secret", "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        keyctl = MACHINES[platform.machine()][1]
        port = server.getsockname()[1]
        yield {"place": tmp_path, "port": port, "pid": os.getpid(), "keyctl": keyctl}
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name, host):
    before = {path: Path(path).stat().st_mtime_ns for path in ("/usr/lib", "/usr/bin")}
    n_threads, left = threading.active_count(), set(run._family(os.getpid()))
    program, wanted = HOSTILE[name]
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    source = program.format(**host) + ("\n" if "def answer" in program else "\n" + RIGHT)
    began = time.monotonic()
    outcome = run_program(source, TESTS, QUICK if "time" in wanted else replace(QUICK, seconds=20))
    assert time.monotonic() - began < 40
    assert outcome.reason in wanted, outcome
    assert outcome.passed == (outcome.reason == "passed")
    assert [p.name for p in sorted(host["place"].iterdir())] == ["secret"]
    assert (host["place"] / "secret").read_text("utf-8") == "a secret"
    assert {path: Path(path).stat().st_mtime_ns for path in before} == before
    assert threading.active_count() == n_threads
    assert set(run._family(os.getpid())) <= left, "processes are left over"


def test_what_honest_programs_use_is_left_to_them():
    """The event loop's own sockets, threads, Chinese encodings, a private map."""
    program = """
import asyncio, mmap, threading
async def two(): return 2
assert asyncio.run(two()) == 2 and "你".encode("gb18030").decode("gb18030") == "你"
thread = threading.Thread(target=list); thread.start(); thread.join()
assert len(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) == 4096
"""
    assert run_program(program + RIGHT, TESTS, replace(QUICK, seconds=20)).passed


def test_a_right_program_passes_and_wrong_ones_say_why():
    patient = replace(QUICK, seconds=20)
    assert run_program(RIGHT, TESTS, patient) == (True, "passed", "")
    assert run_program("def answer(): return 41", TESTS, patient).reason == "AssertionError"
    assert run_program("def answer(:", TESTS, patient).reason == "SyntaxError"
    assert run_program("", TESTS, patient).reason == "NameError"
    assert run_program("import no_such_module", TESTS, patient).reason == "ModuleNotFoundError"


def test_nothing_is_left_in_the_temporary_folder():
    before = set(os.listdir(tempfile.gettempdir()))
    run_program("open('/work/x', 'w').write('x'); open('/tmp/y', 'w')", TESTS, QUICK)
    after = set(os.listdir(tempfile.gettempdir()))
    assert not {name for name in after - before if name in ("x", "y", "work")}


def test_a_killed_runner_takes_its_programs_with_it(tmp_path):
    """Nobody waits for what a runner started that is gone."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from bench.sandbox.run import Limits, run_program\n"
        "run_program('while True: pass', '', Limits(seconds=60))"
    )
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code, str(REPO)])
    deadline = time.monotonic() + 60
    while len(family := run._family(pid)) < 4 and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert len(family) >= 4
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while any(map(is_running, family)) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert not any(map(is_running, family))


def is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_system_that_cannot_shut_programs_in_is_refused(monkeypatch):
    run.missing.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"darwin.*leave HumanEval out"):
        run_program(RIGHT, TESTS)
    run.missing.cache_clear()


def problems() -> list[dict]:
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.skipif(not DATA.is_file(), reason="needs HumanEval's file")
def test_a_few_canonical_solutions_pass_and_an_empty_body_does_not():
    rows = problems()[::40]
    outcomes = run_all(rows, [row["canonical_solution"] for row in rows])
    assert reasons(outcomes) == {"passed": len(rows)}
    assert not any(run_program(*sources(row, "    pass\n")).passed for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="needs HumanEval's file")
def test_the_164_canonical_solutions_score_100_percent():
    rows = problems()
    outcomes = run_all(rows, [row["canonical_solution"] for row in rows])
    assert reasons(outcomes) == {"passed": 164}
