"""chat.py as its users meet it: a subprocess, with and without a (pseudo) terminal.

The checkpoints are real ones of a few thousand weights. `teach` sets the weights so that each
token of a chain is followed by the next one, whatever came before: replies are then known.
"""

import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_retrieval import server, url  # noqa: F401

import chat
from babyllama.checkpoint import save_checkpoint
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows
from model import ModelConfig, Transformer
from tokenizer import LABELS, Tokenizer

REPO = Path(chat.__file__).parent
PROMPT = LABELS["user"]
REPLY = "你好😀\x07。"  # the vocabulary has no 😀: it takes four byte tokens
ON_SCREEN = f"{LABELS['assistant']}你好😀·。\r\n"  # nothing may ring the bell


def teach(model: Transformer, chain: list[int]) -> None:
    """Make the model follow the chain, greedily or sampled."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.zero_()
        for number, (token, following) in enumerate(pairwise(chain)):
            model.tok_embeddings.weight[token, number] = 1
            model.output.weight[following, number] = 10


def make_checkpoint(path: Path, tokenizer: Tokenizer, reply: list[int] | None) -> Path:
    """A run whose model says `reply`; None: random weights."""
    torch.manual_seed(0)
    config = ModelConfig(32, 1, 2, vocab_size=tokenizer.vocab_size, multiple_of=32, max_seq_len=512)
    model = Transformer(config)
    if reply:
        teach(model, [tokenizer.render_prompt([])[-1], *reply])
    optimizer = torch.optim.AdamW(model.parameters())
    return save_checkpoint(path, 1, model, tokenizer, optimizer, {}, "sft").parent


@pytest.fixture(scope="session")
def polite(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Says REPLY and stops."""
    reply = tokenizer.encode(REPLY, eos=True)
    return make_checkpoint(tmp_path_factory.mktemp("run") / "polite", tokenizer, reply)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Says 好好好… until the context is full."""
    reply = tokenizer.encode("好") * 2
    return make_checkpoint(tmp_path_factory.mktemp("run") / "endless", tokenizer, reply)


# Tiny models gain nothing from a second thread.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "NO_PROXY": "127.0.0.1"}


def run_chat(*arguments: object, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "chat.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=ENVIRONMENT,
    )


def test_prompt_prints_the_reply_and_nothing_else_on_stdout(polite, tmp_path):
    (tmp_path / "text.txt").write_text("银杏是乔木。", encoding="gb18030")
    done = run_chat(polite, "--prompt", "你好\x07", "--reference", "text.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, REPLY + "\n")
    assert str(polite) in done.stderr and "银杏是乔木。" in done.stderr


def test_without_a_terminal_three_exchanges_are_shown_always_the_same(tmp_path, tokenizer, capsys):
    path = make_checkpoint(tmp_path / "random", tokenizer, None)
    done = run_chat(path, "--max_new_tokens", 20)
    assert done.returncode == 0 and done.stdout.count(LABELS["assistant"]) == 3
    assert re.findall(f"{PROMPT}(.+)", done.stdout) == list(chat.EXAMPLES)
    assert chat.main(chat.ChatConfig(checkpoint=path, max_new_tokens=20)) == 0
    assert capsys.readouterr().out == done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such/run"], "/no/such/run"),
        (["POLITE", "--prompt", " "], "--prompt is blank"),
        (["POLITE", "--prompt", "好" * 2000], "太长"),
        (["POLITE", "--temperature", "-1"], "temperature"),
        (["POLITE", "--reference", "txet.txt", "--prompt", "你好"], "没有文件"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(script, polite, arguments, message):
    done = script("chat.py", *(polite if word == "POLITE" else word for word in arguments))
    assert (done.code, done.out) == (2, "") and message in done.err
    assert done.err.splitlines()[-1].startswith("error: ") and "Traceback" not in done.err


def test_without_any_checkpoint_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "REPO", tmp_path)
    with pytest.raises(ConfigError, match=r"quickstart\.py.*pretrain\.py and sft\.py"):
        chat.choose_checkpoint(None)


class Terminal:
    """chat.py at a pseudo terminal, and what a user would type there."""

    # The terminal must be the child's controlling one, or Ctrl-C would be a mere byte.
    START = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    # A shell's background job ignores Ctrl-C, and its children inherit that.
    START += "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    START += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"

    def __init__(self, cwd: Path, *arguments: object, **environment: str) -> None:
        self.screen, inside = os.openpty()
        command = [sys.executable, "-c", self.START, REPO / "chat.py", *arguments]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=cwd,
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "2000"} | environment,
            start_new_session=True,
        )
        os.close(inside)
        self.seen = b""

    def more(self, seconds: float) -> bool:
        """Wait for output; whether any came."""
        ready, _, _ = select.select([self.screen], [], [], seconds)
        new = b""
        if ready:
            with suppress(OSError):  # the program has ended
                new = os.read(self.screen, 4096)
        self.seen += new
        return bool(new)

    def read_until(self, wanted: str) -> bytes:
        """What appears up to and including `wanted`."""
        while wanted.encode() not in self.seen:
            assert self.more(60), f"no {wanted!r} in {self.seen.decode(errors='replace')!r}"
        end = self.seen.index(wanted.encode()) + len(wanted.encode())
        seen, self.seen = self.seen[:end], self.seen[end:]
        return seen

    def type(self, keys: str | bytes) -> None:
        os.write(self.screen, keys if isinstance(keys, bytes) else keys.encode())

    def say(self, line: str | bytes, until: str = PROMPT) -> str:
        """Type a line; returns what is printed between its echo and `until`."""
        self.type(line)
        self.type(b"\r")
        _echo, _, shown = self.read_until(until).partition(b"\n")
        return shown.decode().removesuffix(until)

    def press(self, keys: str | bytes, until: str) -> None:
        """Type keys, again each second until something happens, and read on.

        Python's readline loses a Ctrl-C that comes between its prompt and its waiting.
        """
        self.type(keys)
        while not self.more(1) and self.process.poll() is None:
            self.type(keys)
        self.read_until(until)

    def leave(self, keys: str | bytes) -> int:
        """Type what ends the program; returns its exit code."""
        self.press(keys, until="\n")
        return self.process.wait(timeout=20)


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts chat.py in `tmp_path` and waits for its prompt."""
    pytest.importorskip("termios")
    pytest.importorskip("readline")
    opened = []

    def start(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments, **environment))
        opened[-1].read_until(PROMPT)
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.screen)


def test_a_conversation_with_its_commands(open_terminal, polite, tmp_path):
    terminal = open_terminal(polite, PYTHONIOENCODING="utf-8:strict")
    (tmp_path / "text.txt").write_text("\ufeff银杏是乔木。", encoding="utf-8")
    (tmp_path / "long.txt").write_text("今天天气好。" * 1000, encoding="utf-8")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff\xff\x00")

    for name in chat.COMMANDS:
        assert name in terminal.say("/help") and name in terminal.say("/unknown")
    assert "没有命令 /unknown" in terminal.say("/unknown 1")
    assert terminal.say("") == terminal.say("   ") == ""

    assert "资料：无" in terminal.say("/资料")
    assert "资料：银杏是乔木。" in terminal.say("/资料 text.txt")
    assert "不是；请换一个" in terminal.say("/ref picture.txt")
    assert "资料：银杏是乔木。" in terminal.say("/ref")
    assert re.search(r"只留开头 (\d+) 字）：(今天天气好。)+\r", terminal.say("/资料 long.txt"))
    assert "资料：无" in terminal.say("/资料 -")
    assert "资料：他是谁" in terminal.say("／资料 他是谁")

    assert "对话为空" in terminal.say("/save talk.jsonl")
    assert terminal.say("你好") == ON_SCREEN
    assert "太长" in terminal.say("好" * 2000)
    assert terminal.say(b"a\xffb\x00") == ON_SCREEN
    assert "2 轮已存入 talk.jsonl" in terminal.say("/save talk.jsonl")
    assert "已存在" in terminal.say("/save talk.jsonl")
    (row,) = read_rows(tmp_path / "talk.jsonl")
    said = [message["content"] for message in row["messages"]]
    assert said[:3] == ["他是谁", "你好", REPLY] and said[3][0] == "a" and len(said) == 5

    assert "清空，资料保留" in terminal.say("/res\t")  # completed
    assert "对话为空" in terminal.say("/save second.jsonl")
    assert terminal.leave("/quit\r") == 0
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["talk.jsonl"]


def test_ctrl_c_stops_the_reply_and_not_the_program(open_terminal, endless, tmp_path):
    terminal = open_terminal(endless, "--max_new_tokens", "400")
    terminal.type("你好\r")
    terminal.read_until("好好好")
    terminal.type(b"\x03")
    terminal.read_until("（已停止）")
    terminal.read_until(PROMPT)
    terminal.type("半句")
    terminal.read_until("半句")
    terminal.press(b"\x03", until=PROMPT)  # drops the line
    assert "1 轮" in terminal.say("/save talk.jsonl")
    (row,) = read_rows(tmp_path / "talk.jsonl")
    assert re.fullmatch("好{3,399}", row["messages"][1]["content"])
    assert terminal.leave(b"\x03") == 0  # on an empty line


def test_a_full_context_lets_old_turns_go_and_says_so_once(open_terminal, endless):
    terminal = open_terminal(endless, "--max_new_tokens", "120", NO_COLOR="")
    terminal.say("/资料 银杏是乔木。")
    shown = [terminal.say("你好") for _ in range(5)]
    assert all("到了长度上限" in text for text in shown)
    assert ["\x1b[2m（上下文满了" in text for text in shown].count(True) == 1  # in a dim line
    assert "5 轮" in terminal.say("/save all.jsonl")
    assert terminal.leave(b"\x04") == 0


def test_wiki_fetches_asks_back_and_survives_failures(open_terminal, polite, url):  # noqa: F811
    terminal = open_terminal(polite, "--wiki_url", url)
    assert "银杏科的落叶乔木" in terminal.say("/wiki 白果树")
    assert "2 苹果 (水果)" in terminal.say("/wiki 苹果", until="编号（回车取消）：")
    assert "美国公司" in terminal.say("1")
    terminal.say("/wiki 苹果", until="编号（回车取消）：")
    assert "已取消" in terminal.say("")
    assert "不是 JSON" in terminal.say("/wiki 坏")
    assert "美国公司" in terminal.say("/资料")
    terminal.type("/wiki 挂起\r")
    terminal.read_until("正在查询")
    terminal.type(b"\x03")
    terminal.read_until("已取消")
    terminal.read_until(PROMPT)
    assert terminal.say("你好") == ON_SCREEN


def talk_of(tokenizer: Tokenizer, room: int, n_turns: int = 6) -> chat.Conversation:
    turns = [(f"今天{n}", "天气好" * n) for n in range(n_turns)]
    return chat.Conversation(tokenizer, room, "银杏是乔木。", turns)


@pytest.mark.parametrize("room", range(60, 200, 7))
def test_history_is_the_longest_run_of_newest_turns_that_fits(tokenizer, room):
    talk = talk_of(tokenizer, room)
    question = {"role": "user", "content": "你是谁？"}
    ids = talk.prompt_for("你是谁？")
    assert ids == tokenizer.render_prompt([*talk.messages(talk.first), question])
    assert len(ids) <= room and "银杏是乔木。" in tokenizer.decode(ids)
    if talk.first:
        longer = tokenizer.render_prompt([*talk.messages(talk.first - 1), question])
        assert len(longer) > room
    assert len(talk.turns) == 6


def test_a_message_that_cannot_fit_changes_nothing(tokenizer):
    talk = talk_of(tokenizer, 100)
    with pytest.raises(ConfigError, match="上限 100"):
        talk.prompt_for("好" * 100)
    assert talk.first == 0


@pytest.mark.parametrize("room", [96, 384])
def test_the_longest_reference_leaves_room_for_a_question(tokenizer, room):
    talk = chat.Conversation(tokenizer, room)
    said = talk.set_reference("今天天气好。" * 500)
    assert "太长" in said and talk.reference.endswith("。")
    assert len(tokenizer.encode(talk.reference)) <= room * 2 // 3
    assert len(talk.prompt_for("你好")) <= room


def test_a_reference_is_a_file_or_the_text_itself(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("一。\n二。", encoding="gb18030")
    assert chat.read_reference(str(file)) == "一。\n二。"
    assert chat.read_reference("长" * 5000) == "长" * 5000
    assert chat.read_reference("半\udce4个\x00") == "半?个\x00"
    file.write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"text\.txt.*不是"):
        chat.read_reference(str(file))
    with pytest.raises(DataError, match=r"没有文件.*txet\.txt"):
        chat.read_reference("txet.txt")
