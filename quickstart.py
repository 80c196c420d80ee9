"""Set babyllama up and walk through it: from raw Chinese text to models that talk and are scored.

    python quickstart.py                              makes .venv, installs, runs the steps below
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


class Step(NamedTuple):
    name: str
    title: str
    command: str
    makes: str = ""  # what must exist afterwards; a step that makes nothing runs every time
    depends: tuple = ()  # files that make the step run again when they change
    is_run: bool = False  # continues the run in `makes`; an outdated one is moved out of the way
    is_quiet: bool = False  # its output is shown only if it fails


STEPS = (
    Step("data", "第一幕：从零开始。收集并清洗文本 / act 1, from scratch: texts",
         "python -m data_process.run sample", makes="data/clean/inews"),
    Step("vocabulary", "训练词表：模型读写的是常见的字和词（token） / train a vocabulary",
         "python tokenizer.py train --rows data/clean/inews --vocab_size 6000"
         " --out data/tokenizers/sample.model", makes="data/tokenizers/sample.model"),
    Step("tokens", "文本转为 token / turn the texts into tokens",
         "python -m data_process.run sample --tokenizer data/tokenizers/sample.model",
         makes="data/tokens/sample", is_quiet=True),
    Step("pretrain", "预训练：学着猜下一个 token。困惑度（ppl）是它平均在几个候选里犹豫，准确率"
         "（accuracy）是一次猜中的比例；→ 后面是它这时续写的文字 / pretrain",
         "python pretrain.py --config configs/pretrain/sample.yaml", makes="out/sample",
         depends=("configs/pretrain/sample.yaml", "configs/model/tiny.yaml"), is_run=True),
    Step("sft", "微调：照着问答学会回答，这里是拟标题和闲聊 / fine-tune on headlines and talk",
         "python sft.py --dataset sample", makes="out/sample_sft",
         depends=("configs/sft/sample.yaml", "configs/prompts/summary_zh.yaml"), is_run=True),
    Step("score", "评测：给 194 篇没见过的新闻拟标题，与原标题比重合多少（ROUGE） / score",
         "python eval_rouge.py out/sample_sft --out out/sample_sft/predictions.jsonl",
         makes="out/sample_sft/predictions.jsonl", is_quiet=True),
    Step("tokens_release", "第二幕：从发布的模型 release/ 开始，用它的词表 / act 2, from release/",
         "python -m data_process.run sample --tokenizer release/tokenizer.model",
         makes="data/tokens", depends=("release/model.yaml",), is_quiet=True),
    Step("headlines", "微调 release/，学写新闻标题 / fine-tune it on the headlines",
         "python sft.py --config configs/sft/headlines.yaml", makes="out/headlines",
         depends=("configs/sft/headlines.yaml", "configs/prompts/title_zh.yaml"), is_run=True),
    Step("compare", "在同样 194 篇新闻上评测两个 release/ / score both on the same news",
         "python eval_rouge.py out/headlines release --decoding best --max_seq_len 176"
         " --weights auto --out out/headlines/predictions.jsonl",
         makes="out/headlines/predictions.jsonl", is_quiet=True),
    Step("persona", "用 62 段对话教它做一只叫石榴的书店橘猫 / a character by 62 dialogues",
         "python sft.py --rows configs/persona.jsonl --name persona", makes="out/persona",
         depends=("configs/persona.jsonl",), is_run=True),
)  # fmt: skip
ASKED = ("你叫什么？", "你住在哪里？", "你害怕什么东西？", "给我推荐一本书吧", "晚安")

# What the lines of the scores are called; all others keep their names.
NAMES = {
    "sample_sft": "第一幕：从零三分钟 / act 1: from scratch",
    "release": "release/，没学过这些新闻 / as it is released",
    "headlines": "第二幕：release/ 学过新闻标题 / act 2: fine-tuned on headlines",
    "first sentence": "照抄第一句 / the first sentence",
    "first clause": "照抄第一个分句 / the first clause",
    "first 25 characters": "照抄前 25 字 / the first 25 characters",
    "best sentence (knows the reference)": "对着答案挑最好的一句 / the best sentence, by an oracle",
}

NEXT = """
换成你自己的数据，各一条命令 / your own data, one command each（先激活 / activate first: {activate}）
  一个自己的机器人 / a bot of your own     python sft.py --rows my.jsonl        （问答或对话 / JSON, CSV, xlsx）
  学你的文风 / writing as you do           python pretrain.py --text diary.txt  （.txt .md .docx / a folder）
  对话 / talk                              python chat.py out/my
真正的训练 / the real training             python pretrain.py --dry-run         （43M：每一步的命令、显存、时间）
"""  # noqa: E501
ACTIVATE = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"


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
    code = code or run_steps(STEPS, root, python)
    if code == 0:
        say(NEXT.format(activate=ACTIVATE))
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
    rows = {}
    for made in ("sample_sft", "headlines"):
        scores = read(root / "out" / made / "predictions.scores.json")
        for name, found in json.loads(scores or '{"scores_x100": {}}')["scores_x100"].items():
            name = name.removesuffix(" best").split("/step")[0]
            rows[name] = next(iter(found["rouge"].values()))["rouge-1"]["mean"]
    say("194 篇没见过的新闻，拟的标题与原标题的重合（ROUGE-1，满分 100）"
        " / titles of 194 unseen news, ROUGE-1 of 100")  # fmt: skip
    for name, score in sorted(rows.items(), key=lambda row: row[1]):
        say(f"  {score:5.1f}  {'█' * round(score / 2):<22} {NAMES.get(name, name)}")
    return 0


def show_answers(root: Path, python: Path) -> int:
    """Answers of the released model and of the character to the same questions, side by side."""
    say("\n同样的问题，问微调前和微调后的模型 / the same questions before and after")
    said, asked = [], "\n".join(ASKED)
    for checkpoint in ("release", "out/persona"):
        words = ["chat.py", checkpoint, "--json", "--temperature", "0"]
        say(f"$ python {' '.join(words)} < questions.txt")
        done = subprocess.run([python, *words], cwd=root, env=environment(), encoding="utf-8",
                              input=asked, capture_output=True)  # fmt: skip
        if done.returncode:
            say(done.stderr)
            return done.returncode
        said.append([json.loads(line)["reply"] for line in done.stdout.splitlines()])
    for question, before, after in zip(ASKED, *said, strict=True):
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
