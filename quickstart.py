"""Set babyllama up and walk through it: from raw Chinese text to a model that talks and is scored.

    python quickstart.py                              makes .venv, installs, runs the steps below
    python quickstart.py --tests [--slow] [-- ARGS]   makes .venv, installs, runs ruff and pytest

Standard library only; Linux, macOS and Windows. Each command is printed as you would type it. A
second call continues where the first one stopped: a step is done when its stamp in out/quickstart/
matches its command, the files it depends on and the stamp of the step before it. To go through all
steps again, delete that folder. Exit code: 0, that of the command that failed, or 75 (stopped with
the run saved) and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    name: str
    title: str
    command: str
    makes: str = ""  # what must exist afterwards; a step that makes nothing runs every time
    depends: tuple = ()  # files that make the step run again when they change
    is_run: bool = False  # continues the run in `makes`; an outdated one is moved out of the way


STEPS = (
    Step("data", "收集并清洗样本文本 / collect and clean the sample texts",
         "python -m data_process.run sample", makes="data/clean/inews"),
    Step("vocabulary", "训练词表 / train a vocabulary",
         "python tokenizer.py train --rows data/clean/inews --vocab_size 6000"
         " --out data/tokenizers/sample.model", makes="data/tokenizers/sample.model"),
    Step("tokens", "文本转为 token / turn the texts into tokens",
         "python -m data_process.run sample --tokenizer data/tokenizers/sample.model",
         makes="data/tokens/sample"),
    Step("pretrain", "预训练 / pretrain",
         "python pretrain.py --config configs/pretrain/sample.yaml", makes="out/sample",
         depends=("configs/pretrain/sample.yaml", "configs/model/tiny.yaml"), is_run=True),
    Step("sft", "微调：拟标题与闲聊 / fine-tune on headlines and small talk",
         "python sft.py --dataset sample", makes="out/sample_sft",
         depends=("configs/sft/sample.yaml", "configs/prompts/summary_zh.yaml"), is_run=True),
    Step("score", "用 ROUGE 评测 / score with ROUGE",
         "python eval_rouge.py out/sample_sft out/sample"
         " --out out/sample_sft/predictions.jsonl", makes="out/sample_sft/predictions.jsonl"),
    Step("chat", "对话 / talk to it", "python chat.py out/sample_sft"),
)  # fmt: skip

FLAGS = ("--tests", "--slow")

NEXT = """
接下来 / where to go next
  激活环境 / activate        {activate}
  继续对话 / chat            python chat.py out/sample_sft
  显卡上的 43M / on a GPU    python pretrain.py --dry-run    显存与时间 / its memory and time
  其他数据 / other data      python -m data_process.run --help
"""


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles: not always UTF-8
    if sys.version_info < (3, 11):  # noqa: UP036
        found = sys.version.split()[0]
        sys.exit(f"需要 Python 3.11 或更新，当前 {found} / Python 3.11+ wanted, {found} found")
    options = parse()
    root = Path(__file__).resolve().parent
    python = root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = prepare(root, python, "requirements/dev.txt" if options.tests else "requirements.txt")
    if code:
        return code
    if options.tests:
        return run_tests(root, python, options.slow, options.pytest_args)
    code = run_steps(STEPS, root, python)
    if code == 0:
        activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
        say(NEXT.format(activate=activate))
    return code


def parse() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--tests", action="store_true", help="run ruff and pytest instead")
    parser.add_argument("--slow", action="store_true", help="with --tests: the slow tests as well")
    parser.add_argument("pytest_args", nargs="*", metavar="-- ARGS", help="passed on to pytest")
    options = parser.parse_args()
    if not options.tests and (options.slow or options.pytest_args):
        parser.error("--slow and arguments for pytest go with --tests")
    return options


def prepare(root: Path, python: Path, requirements: str) -> int:
    """Make .venv and install what is missing; the exit code of the command that failed, or 0."""
    if not version_of(python):
        say("\n准备环境 / making the environment")
        command = "python -m venv --clear .venv"
        code = run(command, root, Path(sys.executable))
        if code:
            say("Debian, Ubuntu: apt-get install python3-venv")
            return explain(code, command)
    files = ("requirements.txt", "requirements/dev.txt", "constraints.txt")
    key = digest(version_of(python), *(read(root / name) for name in files))
    stamps = {name: root / ".venv" / f"installed-{Path(name).stem}.txt" for name in files[:2]}
    if key in (read(stamps[requirements]), read(stamps["requirements/dev.txt"])):
        return 0
    say("\n安装依赖，第一次要几分钟 / installing, a few minutes the first time")
    command = f"python -m pip install -r {requirements} -c constraints.txt"
    started = time.perf_counter()
    code = run(command, root, python)
    if code:
        return explain(code, command)
    stamps[requirements].write_text(key, encoding="utf-8")
    say(f"用时 / took {time.perf_counter() - started:.1f} s")
    return 0


def version_of(python: Path) -> str:
    """The version of an environment's python; empty when it is missing, broken or too old."""
    question = "import pip, sys; print(sys.version) if sys.version_info >= (3, 11) else None"
    try:
        return subprocess.run([python, "-c", question], capture_output=True, text=True).stdout
    except OSError:
        return ""


def run_tests(root: Path, python: Path, slow: bool, pytest_args: list[str]) -> int:
    """Run the linter, the formatter's check and the tests; the first exit code that is not 0."""
    choice = [] if slow else ["-m", "not slow"]
    results = {}
    for command in ("ruff check", "ruff format --check", "pytest"):
        more = [*choice, *pytest_args] if command == "pytest" else []
        results[command] = run(f"python -m {command}", root, python, *more)
        if results[command] == 130:
            break
    say("\n" + " · ".join(f"{command}: {code or 'ok'}" for command, code in results.items()))
    return next((code for code in results.values() if code), 0)


def run_steps(steps: Sequence[Step], root: Path, python: Path) -> int:
    """Run the steps that are not done, in order; the exit code of the one that failed, or 0."""
    before = ""
    for number, step in enumerate(steps, 1):
        if not step.makes:
            print_summary(steps, root)
        say(f"\n第 {number}/{len(steps)} 步 / step {number} of {len(steps)}：{step.title}")
        key = digest(before, step.command, *(read(root / name) for name in step.depends))
        code = run_step(step, root, python, key)
        if code:
            return explain(code, step.command)
        before = read(stamp_of(step, root))
    return 0


def run_step(step: Step, root: Path, python: Path, key: str) -> int:
    """Run one step unless it is done; its stamp says what was begun, and when that was finished."""
    stamp = stamp_of(step, root)
    found = json.loads(read(stamp) or '{"key": "", "seconds": 0, "finished": null}')
    if found["key"] == key and found["finished"] and step.makes and (root / step.makes).exists():
        say(f"已完成 / done before ({found['seconds']:.1f} s)")
        return 0
    if step.is_run and found["key"] not in ("", key):
        move_aside(root / step.makes, stamp.parent)
    spent = found["seconds"] if found["key"] == key and not found["finished"] else 0.0
    write_stamp(stamp, key, spent, finished=None)
    started = time.perf_counter()
    code = run(step.command, root, python)
    spent += time.perf_counter() - started
    write_stamp(stamp, key, spent, finished=None if code else time.time())
    say(f"用时 / took {spent:.1f} s")
    return code


def run(command: str, root: Path, python: Path, *more: str) -> int:
    """Print a command, run it in the foreground with `python`; its exit code, 130 after Ctrl-C."""
    words = [*command.split(), *more]
    say("$ " + " ".join(f'"{word}"' if " " in word else word for word in words))
    process = subprocess.Popen([python, *words[1:]], cwd=root, env=environment())
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            # A terminal sends Ctrl-C to the child as well; without one, nobody else tells it.
            if os.name != "nt" and not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if interrupted and code not in (0, 75):
        return 130
    return code if code >= 0 else 128 - code


def environment() -> dict[str, str]:
    """The environment of the children: UTF-8 everywhere, and pip writes into .venv alone."""
    elsewhere = {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME"}
    kept = {name: value for name, value in os.environ.items() if name not in elsewhere}
    kept = {**kept, "PYTHONUTF8": "1", "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "1"}
    # By default torch's threads wait for each other at full speed; on a processor that is busy
    # with something else as well, that was found to make training ten times slower.
    kept.setdefault("OMP_WAIT_POLICY", "passive")
    return kept


def print_summary(steps: Sequence[Step], root: Path) -> None:
    say("\n小结 / summary")
    for number, step in enumerate(steps, 1):
        if step.makes:
            seconds = json.loads(read(stamp_of(step, root)))["seconds"]
            line = f"{number}  {step.name:<12}{seconds:>8.1f} s   {figures(root / step.makes)}"
            say(line.rstrip())


def figures(made: Path) -> str:
    """The key figures of what a step made, in one line; empty when it left none."""
    scores = read(made.with_suffix(".scores.json"))
    if scores:
        ours = next(iter(json.loads(scores)["scores_x100"].values()))
        headline = next(iter(ours["rouge"].values()))
        return "ROUGE-1/2/L " + " / ".join(f"{score['mean']:.1f}" for score in headline.values())
    records = [json.loads(line) for line in read(made / "metrics.jsonl").splitlines()]
    last = next((each for each in reversed(records) if each["kind"] == "val"), None)
    if not last:
        return ""
    loss = f"验证损失 / validation loss {last['loss']:.3f}"
    return f"{loss} · 困惑度 / ppl {last['ppl']:.1f} · 准确率 / accuracy {last['accuracy']:.1%}"


def move_aside(folder: Path, to: Path) -> None:
    """Keep what was made from other settings, out of the way of the run that starts now."""
    if folder.exists():
        target = to / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.rename(target)
        say(f"前面有改动，旧结果移到 / something changed, the old results are in {target}")


def explain(code: int, command: str) -> int:
    again = " ".join(["python quickstart.py", *(w for w in sys.argv[1:] if w in FLAGS)])
    if code in (75, 130):
        text = f"已停止；再运行 {again} 从这里继续 / stopped; run it again to go on from here"
    else:
        text = f"失败 / failed with exit code {code}: {command}\n解决后 / mend it, then: {again}"
    print(text, file=sys.stderr, flush=True)
    return code


def say(text: str) -> None:
    print(text, flush=True)


def read(path: Path) -> str:
    """The text of a file, empty when there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def stamp_of(step: Step, root: Path) -> Path:
    return root / "out" / "quickstart" / f"{step.name}.json"


def write_stamp(path: Path, key: str, seconds: float, finished: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"key": key, "seconds": seconds, "finished": finished}))
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
