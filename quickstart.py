"""Set babyllama up and walk through it: from raw Chinese text to models that talk and are scored.

    python quickstart.py                              makes .venv, installs, runs the steps of
                                                      configs/quickstart.toml
    python quickstart.py --tests [--slow] [-- ARGS]   makes .venv, installs, runs ruff, mypy, pytest

Standard library only; Linux, macOS and Windows. Each command is printed as you would type it. A
second call continues where the first one stopped: a step is done when its stamp in out/quickstart/
matches its command, the files it depends on and the stamp of the step before it. Delete that folder
to go through all steps again. Exit code: 0, that of the command that failed, or 75 (stopped with
the run saved) and 130 after Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PLAN = Path(__file__).resolve().with_name("configs") / "quickstart.toml"


class Step(NamedTuple):
    """A step of configs/quickstart.toml, where its fields are explained."""

    name: str
    title: str
    command: str
    makes: str = ""
    depends: tuple = ()
    is_run: bool = False
    is_quiet: bool = False


def plan() -> dict:
    """What configs/quickstart.toml holds, its steps as such."""
    import tomllib  # which a Python that is too old does not have

    found = tomllib.loads(read(PLAN))
    return found | {"steps": tuple(Step(**step) for step in found["steps"])}


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Windows consoles: not always UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.version_info < (3, 11):  # noqa: UP036
        found = sys.version.split()[0]
        sys.exit(f"需要 Python 3.11 或更新，当前 {found} / Python 3.11+ wanted, {found} found")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--tests", action="store_true", help="run ruff, mypy and pytest instead")
    parser.add_argument("--slow", action="store_true", help="with --tests: the slow tests as well")
    parser.add_argument("pytest_args", nargs="*", metavar="-- ARGS", help="passed on to pytest")
    options = parser.parse_args()
    if not options.tests and (options.slow or options.pytest_args):
        parser.error("--slow and arguments for pytest go with --tests")
    root = Path(__file__).resolve().parent
    python = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = prepare(root, python, "requirements/dev.txt" if options.tests else "requirements.txt")
    if code == 0 and options.tests:
        return run_tests(root, python, options.slow, options.pytest_args)
    code = code or run_steps(plan()["steps"], root, python)
    if code == 0:
        say(plan()["next"])
    return code


def prepare(root: Path, python: Path, requirements: str) -> int:
    """Make .venv and install what is missing; the exit code of the command that failed, or 0."""
    if not version_of(python):
        say("\n准备环境 / making the environment")
        command = "python -m venv --clear .venv"
        if code := run(command, root, Path(sys.executable)):
            say("Debian, Ubuntu: apt-get install python3-venv")
            return explain(code, command)
    every = "requirements/dev.txt"
    files = [read(root / name) for name in ("requirements.txt", every, "constraints.txt")]
    stamp, key = root / ".venv/installed.txt", digest(version_of(python), *files)
    if read(stamp) in (f"{key} {requirements}", f"{key} {every}"):
        return 0
    say("\n安装依赖，第一次要几分钟 / installing, a few minutes the first time")
    command, started = f"python -m pip install -r {requirements} -c constraints.txt", time.time()
    if code := run(command, root, python, is_quiet=True):
        return explain(code, command)
    stamp.write_text(f"{key} {requirements}", encoding="utf-8")
    say(f"用时 / took {time.time() - started:.1f} s")
    return 0


def version_of(python: Path) -> str:
    """The version of an environment's python; empty when it is missing, broken or too old."""
    question = "import pip, sys; print(sys.version) if sys.version_info >= (3, 11) else None"
    try:
        return subprocess.run([python, "-c", question], capture_output=True, text=True).stdout
    except OSError:
        return ""


def run_tests(root: Path, python: Path, slow: bool, pytest_args: list) -> int:
    """Run linter, formatter's check, type checker and tests; the first exit code that is not 0."""
    spread = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")  # a process a core
    choice = () if slow else ("-m", "not slow")
    results = {}
    for command, more in (("ruff check", ()), ("ruff format --check", ()), ("mypy", ()),
                          ("pytest", (*spread, *choice, *pytest_args))):  # fmt: skip
        results[command] = run(f"python -m {command}", root, python, *more)
        if results[command] == 130:
            break
    say("\n" + " · ".join(f"{command}: {code or 'ok'}" for command, code in results.items()))
    return next(filter(None, results.values()), 0)


def run_steps(steps: tuple, root: Path, python: Path) -> int:
    """Run the steps that are not done, in order; the exit code of the one that failed, or 0."""
    shows = {"score": show_scores, "compare": show_scores, "persona": show_answers}
    before = ""
    for number, step in enumerate(steps, 1):
        say(f"\n第 {number}/{len(steps)} 步 / step {number} of {len(steps)}：{step.title}")
        stamp = root / "out/quickstart" / step.name
        key = digest(before, step.command, *(read(root / name) for name in step.depends))
        code = run_step(step, root, python, stamp, key)
        if code == 0 and step.name in shows:
            code = shows[step.name](root, python)
        if code:
            return explain(code, step.command)
        before = read(stamp)
    return 0


def run_step(step: Step, root: Path, python: Path, stamp: Path, key: str) -> int:
    """Run one step unless it is done; its stamp says what was begun, and when that was finished."""
    made, (found, _, finished) = root / step.makes, read(stamp).partition(" ")
    if found == key and finished and step.makes and made.exists():
        say("已完成 / done before")
        return 0
    if step.is_run and made.exists() and found not in ("", key):
        aside = stamp.with_name(f"{made.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        made.rename(aside)
        say(f"前面有改动，旧结果移到 / something changed, the old results are in {aside}")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)
    started = time.time()
    code = run(step.command, root, python, is_quiet=step.is_quiet)
    if code == 0:
        stamp.write_text(f"{key} {time.time()}")
    say(f"用时 / took {time.time() - started:.1f} s")
    return code


def run(command: str, root: Path, python: Path, *more: str, is_quiet: bool = False) -> int:
    """Print a command, run it in the foreground with `python`; its exit code, 130 after Ctrl-C.

    is_quiet: what it prints goes to a file, which is shown if it fails
    """
    words = [*command.split(), *more]
    say("$ " + " ".join(f'"{word}"' if " " in word else word for word in words))
    with tempfile.TemporaryFile() as folded:
        to: dict[str, Any] = {"stdout": folded, "stderr": subprocess.STDOUT} if is_quiet else {}
        code = ended(subprocess.Popen([python, *words[1:]], cwd=root, env=environment(), **to))
        if code and is_quiet:
            folded.seek(0)
            say(folded.read().decode("utf-8", "replace"))
    return code


def ended(process: subprocess.Popen) -> int:
    """The exit code of a process once it has ended; Ctrl-C and SIGTERM are passed on to it."""
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            # A terminal sends Ctrl-C to the child as well; without one, nobody else tells it.
            if os.name != "nt" and not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return 130 if interrupted and code not in (0, 75) else code


def environment() -> dict:
    """The environment of the children: UTF-8 everywhere, and pip writes into .venv alone."""
    elsewhere = {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME"}
    kept = {name: value for name, value in os.environ.items() if name not in elsewhere}
    # By default torch's threads wait for each other at full speed; on a processor that is busy
    # with something else as well, that was found to make training ten times slower.
    kept.setdefault("OMP_WAIT_POLICY", "passive")
    return {**kept, "PYTHONUTF8": "1", "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "1"}


def show_scores(root: Path, _: Path) -> int:
    """The titles of all models that were scored beside what copying scores, in one table."""
    rows, names = {}, plan()["names"]
    for made in ("sample_sft", "headlines"):
        scores = read(root / "out" / made / "predictions.scores.json")
        for name, found in json.loads(scores or '{"scores_x100": {}}')["scores_x100"].items():
            name = name.split("/step")[0]
            rows[name] = next(iter(found["rouge"].values()))["rouge-1"]["mean"]
    say("194 篇没见过的新闻，拟的标题与原标题的重合（ROUGE-1，满分 100）"
        " / titles of 194 unseen news, ROUGE-1 of 100")  # fmt: skip
    for name, score in sorted(rows.items(), key=lambda row: row[1]):
        say(f"  {score:5.1f}  {'█' * round(score / 2):<22} {names.get(name, name)}")
    return 0


def show_answers(root: Path, python: Path) -> int:
    """Answers of the released model and of the character to the same questions, side by side."""
    say("\n同样的问题，问微调前和微调后的模型 / the same questions before and after")
    said, questions = [], plan()["questions"]
    for checkpoint in ("release", "out/persona"):
        words = ["chat.py", checkpoint, "--json", "--temperature", "0"]
        say(f"$ python {' '.join(words)} < questions.txt")
        done = subprocess.run([python, *words], cwd=root, env=environment(), encoding="utf-8",
                              input="\n".join(questions), capture_output=True)  # fmt: skip
        if done.returncode:
            say(done.stderr)
            return done.returncode
        said.append([json.loads(line)["reply"] for line in done.stdout.splitlines()])
    for question, before, after in zip(questions, *said, strict=True):
        say(f"  问：{question}\n    前：{before}\n    后：{after}")
    return 0


def explain(code: int, command: str) -> int:
    again = " ".join(["python quickstart.py", *(w for w in sys.argv if w in ("--tests", "--slow"))])
    text = f"失败 / failed with exit code {code}: {command}\n解决后 / mend it, then: {again}"
    if code in (75, 130):
        text = f"已停止；再运行 {again} 从这里继续 / stopped; run it again to go on from here"
    print(text, file=sys.stderr, flush=True)
    return code


def say(text: str) -> None:
    print(text, flush=True)


def read(path: Path) -> str:
    """The text of a file, empty when there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
