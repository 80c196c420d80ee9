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
import yaml

from babyllama.config import REPO
from babyllama.errors import ConfigError
from bench.sandbox import run
from bench.sandbox.inside import MACHINES
from bench.sandbox.run import Limits, run_all, run_program

DATA = REPO / ".." / "shared" / "data" / "benchmarks" / "human_eval" / "HumanEval.jsonl.gz"
QUICK = Limits(seconds=1.5, memory_mb=170, processes=16)
TESTS = "assert answer() == 42"
RIGHT = "def answer():\n    return 42\n"

pytestmark = pytest.mark.skipif(
    bool(run.missing()), reason=f"no programs can be shut in here: {run.missing()}"
)

HOSTILE = yaml.safe_load((REPO / "tests/fixtures/hostile.yaml").read_text("utf-8"))


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
    program, wanted = HOSTILE[name]["program"], HOSTILE[name]["ends"]
    source = program.format(**host) + ("" if "def answer" in program else RIGHT)
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
        run_all([], [])
    run.missing.cache_clear()


def problems() -> list[dict]:
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.skipif(not DATA.is_file(), reason="needs HumanEval's file")
def test_a_few_canonical_solutions_pass_and_an_empty_body_does_not():
    rows = problems()[::40]
    outcomes = run_all(rows, [row["canonical_solution"] for row in rows])
    assert [outcome.reason for outcome in outcomes] == ["passed"] * len(rows)
    assert not any(outcome.passed for outcome in run_all(rows, ["    pass\n"] * len(rows)))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="needs HumanEval's file")
def test_the_164_canonical_solutions_score_100_percent():
    rows = problems()
    outcomes = run_all(rows, [row["canonical_solution"] for row in rows])
    assert [outcome.reason for outcome in outcomes] == ["passed"] * 164
