"""Runs a program that a model wrote, shut in: it can harm nothing and reach nobody.

The program runs as process 1's child in namespaces of its own (Linux): no network, no other
process to be seen, a file system of read-only system folders and an empty folder in memory, a
keyring of its own. Its time, memory, file sizes and processes are limited, its output goes nowhere.
Memory is counted as what its processes map, so a filter of system calls refuses what else would
hold some; control groups would count it too, but few users may make one. Where the system does not
allow all that, nothing is run: `require` says what is missing.

A pass must be earned: the tests are compiled before the program runs, and end with a word that is
handed over after them. A program that leaves early, whatever its exit code, does not know it. No
boundary stops a returned object that claims to equal everything, or a program written against this
very file that asks for the word itself: both deceive the score, neither gets out.

At the end HumanEval's programs: functions that the model completes, run with their tests. The
harness asks for the completions; it cannot score them offline, since its metric is fetched.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
from tqdm import tqdm

from babyllama.errors import ConfigError

_INSIDE = Path(__file__).with_name("inside.py")
_EVERY_S = 0.02


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    seconds: by the clock; memory_mb: of all its processes together; file_mb: of its folder
    """

    seconds: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 32


class Outcome(NamedTuple):
    """End of a program: passed, or why not.

    reason: passed, an exception's name, time, memory, exit (it left early), or setup
    """

    passed: bool
    reason: str
    detail: str = ""


@cache
def missing() -> str:
    """What the system lacks to shut programs in; "" if nothing."""
    if sys.platform != "linux":
        return f"namespaces, which {sys.platform} does not have"
    found = run_program("pass", "pass", Limits(seconds=20.0))
    return "" if found.passed else f"namespaces ({found.detail or found.reason})"


def require() -> None:
    """Refuse to run anything where it cannot be shut in.

    raises: ConfigError that says what to do instead
    """
    lacking = missing()
    if lacking:
        raise ConfigError(
            f"--execute_model_code: wanted a system that can shut programs in, found one without "
            f"{lacking}; use Linux that allows user namespaces (or root in a virtual machine), or "
            f"leave HumanEval out"
        )


def run_program(program: str, tests: str, limits: Limits = Limits()) -> Outcome:
    """Run a program and then its tests, both as Python source, shut in; where the system cannot do
    that, nothing runs and the outcome is setup."""
    word = secrets.token_hex(16)
    job = {"program": program, "tests": tests, "word": word, "python": _python(),
           "limits": limits.__dict__}  # fmt: skip
    child = subprocess.Popen(
        [_python(), "-I", "-S", "-B", str(_INSIDE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    assert child.stdin and child.stdout
    os.set_blocking(child.stdout.fileno(), False)
    reason = ""
    try:
        child.stdin.write(json.dumps(job).encode())
        child.stdin.close()
        reason = _watch(child, limits)
    except BrokenPipeError:
        reason = "setup"
    finally:
        _end(child)
    said = child.stdout.read() or b""
    child.stdout.close()
    return _outcome(said[:4096].decode("utf-8", "replace"), word, reason)


def _outcome(said: str, word: str, reason: str) -> Outcome:
    """What the report of process 1 means; its last line counts."""
    try:
        found = json.loads(said.splitlines()[-1])
        result, detail = str(found["result"]), str(found.get("detail", ""))
    except (IndexError, ValueError, KeyError, TypeError):
        return Outcome(False, reason or "exit")
    if reason:
        return Outcome(False, reason, detail)
    if result == word:
        return Outcome(True, "passed")
    known = result if result.isidentifier() and result != "passed" else "exit"
    return Outcome(False, known, detail[:200])


def _watch(child: subprocess.Popen, limits: Limits) -> str:
    """Wait for the end; "time" or "memory" if it has to be brought about."""
    deadline = time.monotonic() + limits.seconds + 1.0  # process 1 keeps the time itself
    while child.poll() is None:
        if time.monotonic() > deadline:
            return "time"
        if _memory_mb(child.pid) > limits.memory_mb:
            return "memory"
        time.sleep(_EVERY_S)
    return ""


def _end(child: subprocess.Popen) -> None:
    """Kill all that is left; what lives in the namespace goes with its process 1."""
    for process in _family(child.pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _family(pid: int) -> list[psutil.Process]:
    """All descendants of a process and itself, as the host sees them."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [*first.children(recursive=True), first]
    return []


def _memory_mb(pid: int) -> float:
    """Resident memory of a process and all below it."""
    n_bytes = 0
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):
            n_bytes += process.memory_info().rss
    return n_bytes / 1e6


def _python() -> str:
    """The interpreter itself: a virtual environment only points to it."""
    return os.path.realpath(sys.executable)


def run_all(rows: Sequence[dict], completions: Iterable[str]) -> list[Outcome]:
    """Outcome of each completed program with its row's tests, in order; errors as require."""
    require()
    pairs = zip(rows, completions, strict=True)
    return [
        run_program(f"{row['prompt']}{text}\n", f"{row['test']}\ncheck({row['entry_point']})\n")
        for row, text in tqdm(pairs, total=len(rows), desc="run programs", unit=" programs")
    ]
