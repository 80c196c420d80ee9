"""chat.py as its users meet it: with and without a (pseudo) terminal.

The checkpoints are real ones of a few thousand weights. `teach` sets the weights so that each
token of a chain is followed by the next one, whatever came before: replies are then known.
"""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import chat
from babyllama.chat.commands import COMMANDS, User, completions, obey
from babyllama.chat.session import Conversation, Session, choose_checkpoint, read_reference
from babyllama.chat.terminal import HARMFUL, MORE
from babyllama.checkpoint import load_model
from babyllama.errors import ConfigError, DataError
from babyllama.lora import LoraConfig, apply_lora, stored
from babyllama.retrieval.index import build
from babyllama.rows import read_rows
from babyllama.sampling import SamplingConfig
from conftest import TEXTS, save_adapter, save_model
from data_process.vocabulary import train_vocabulary
from model import ModelConfig, Transformer
from test_index import write_articles
from test_retrieval import server, url  # noqa: F401
from tokenizer import LABELS, Tokenizer
from warm import Keeper

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
    return save_model(path, model, tokenizer).parent


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


def run_chat(*words: object, cwd: Path = REPO, **files: object) -> subprocess.CompletedProcess:
    """chat.py as a process; files: its standard input and output, else nothing and a pipe."""
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | files
    if "input" not in files:
        files.setdefault("stdin", subprocess.DEVNULL)
    command = [sys.executable, str(REPO / "chat.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, timeout=120, **files)


def test_prompt_prints_the_reply_and_nothing_else_on_stdout(polite, tmp_path):
    (tmp_path / "text.txt").write_text("银杏是乔木。", encoding="gb18030")
    words = [polite, "--prompt", "你好\x07", "--reference", "text.txt"]
    done = run_chat(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, REPLY + "\n")
    said = done.stderr.decode()
    assert str(polite) in said and "银杏是乔木。" in said


def test_with_nothing_to_answer_three_exchanges_are_shown_always_the_same(tmp_path, tokenizer):
    path = make_checkpoint(tmp_path / "random", tokenizer, None)
    words = (path, "--max_new_tokens", 20)
    done = run_chat(*words)
    shown = done.stdout.decode()
    assert done.returncode == 0 and shown.count(LABELS["assistant"]) == 3
    assert re.findall(f"{PROMPT}(.+)", shown) == list(chat.EXAMPLES)
    screen, inside = os.openpty()
    typed = run_chat(*words, stdin=inside)  # a terminal to type at, and its output in a file
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, REPO / "chat.py", *map(str, words)],
        cwd=REPO, env=ENVIRONMENT, capture_output=True,
    )  # fmt: skip
    assert typed.stdout == closed.stdout == done.stdout
    os.close(screen), os.close(inside)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_piped_lines_are_one_conversation_as_on_a_terminal(polite, tmp_path, encoding):
    lines = ["你叫什么？", "/资料 银杏是乔木。", "", "再见", "/总结", "好" * 2000]
    lines += ["/save talk.jsonl", "/retry", "/quit", "没有人读"]
    done = run_chat(polite, cwd=tmp_path, input="\r\n".join(lines).encode(encoding))
    shown, said = done.stdout.decode(), done.stderr.decode()
    assert re.findall(f"{PROMPT}(.+)", shown) == [line for line in lines[:-1] if line]
    assert shown.count(LABELS["assistant"] + REPLY) == 3 and "资料：银杏是乔木。" in shown
    assert "no terminal" in said and "太长" in said and "Traceback" not in said
    assert done.returncode == 2  # two lines could not be answered
    (row,) = read_rows(tmp_path / "talk.jsonl")
    asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
    assert asked == ["你叫什么？", "再见"]


def test_one_piped_question_is_answered_and_nothing_else(polite):
    done = run_chat(polite, input="你叫什么？\n".encode())
    said = f"{PROMPT}你叫什么？\n{LABELS['assistant']}{REPLY}\n"
    assert done.returncode == 0 and done.stdout.decode().partition("\n")[2] == said


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


def test_without_a_name_the_newest_run_is_taken_then_the_released_model(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"quickstart\.py.*pretrain\.py and sft\.py"):
        choose_checkpoint(None, tmp_path)
    released = make_checkpoint(tmp_path / "release", tokenizer, None)
    assert choose_checkpoint(None, tmp_path) == released
    run = make_checkpoint(tmp_path / "out/mine", tokenizer, None)
    assert choose_checkpoint(None, tmp_path) == run
    assert load_model(released).step == 1


class Terminal:
    """chat.py at a pseudo terminal, and what a user would type there."""

    def __init__(self, keeper: Keeper, cwd: Path, *arguments: object, **environment: str) -> None:
        self.screen, inside = os.openpty()
        self.process = keeper.start(
            [str(word) for word in (REPO / "chat.py", *arguments)],
            cwd,
            ENVIRONMENT
            | {"TERM": "xterm", "COLUMNS": "2000", "XDG_STATE_HOME": str(cwd / "state")}
            | environment,
            inside,
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
        """In parts, as a terminal's buffers are small and it reads while it writes."""
        keys = keys if isinstance(keys, bytes) else keys.encode()
        for start in range(0, len(keys), 256):
            os.write(self.screen, keys[start : start + 256])
            while len(keys) > 256 and self.more(0.01):
                pass

    def say(self, line: str | bytes, until: str = PROMPT) -> str:
        """Type a line; returns what is printed between its echo and `until`."""
        self.type(line)
        self.type(b"\r")
        _echo, _, shown = self.read_until(until).partition(b"\n")
        shown = shown.decode().replace("\x1b[?2004l\r", "").replace("\x1b[?2004h", "")
        return shown.removesuffix(until)  # without what switches bracketed paste

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

    def close(self) -> None:
        self.process.close()
        os.close(self.screen)


@pytest.fixture
def open_terminal(keeper: Keeper, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts chat.py in `tmp_path` and waits for its prompt."""
    pytest.importorskip("readline")
    opened = []

    def start(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(keeper, tmp_path, *arguments, **environment))
        opened[-1].read_until(PROMPT)
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture(scope="module")
def shared(
    keeper: Keeper, tmp_path_factory: pytest.TempPathFactory, polite: Path
) -> Iterator[Terminal]:
    """One terminal for several tests, each of which begins with /reset; nobody leaves it."""
    pytest.importorskip("readline")
    terminal = Terminal(keeper, tmp_path_factory.mktemp("shared"), polite)
    terminal.read_until(PROMPT)
    yield terminal
    terminal.close()


@pytest.fixture
def terminal(shared: Terminal) -> Terminal:
    shared.say("/资料 -")
    shared.say("/reset")
    return shared


def test_a_conversation_with_its_commands(open_terminal, polite, tmp_path):
    terminal = open_terminal(polite, PYTHONIOENCODING="utf-8:strict")
    (tmp_path / "text.txt").write_text("\ufeff银杏是乔木。", encoding="utf-8")
    (tmp_path / "long.txt").write_text("今天天气好。" * 1000, encoding="utf-8")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff\xff\x00")

    for name in COMMANDS:
        assert name in terminal.say("/help") and name in terminal.say("/unknown")
    assert "没有命令 /unknown" in terminal.say("/unknown 1")
    assert terminal.say("") == terminal.say("   ") == ""

    assert "资料：无" in terminal.say("/资料")
    assert "资料：银杏是乔木。" in terminal.say("/资料 text.txt")
    assert "两者都不是" in terminal.say("/ref picture.txt")
    assert "资料：银杏是乔木。" in terminal.say("/ref")
    assert re.search(r"太长，共 6000 字.*）：(今天天气好。)+……\r", terminal.say("/资料 long.txt"))
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
    terminal = open_terminal(endless, "--loop_guard", "off", "--max_new_tokens", "400")
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
    terminal.press(b"\x03", until="再按一次 Ctrl-C 退出")  # on an empty line
    terminal.read_until(PROMPT)
    assert terminal.leave(b"\x03") == 0


def test_a_full_context_lets_old_turns_go_and_says_so_once(open_terminal, endless):
    terminal = open_terminal(endless, "--loop_guard", "off", "--max_new_tokens", "120", NO_COLOR="")
    terminal.say("/资料 银杏是乔木。")
    shown = [terminal.say("你好") for _ in range(5)]
    assert all("到了长度上限" in text for text in shown)
    assert ["\x1b[2m（上下文满了" in text for text in shown].count(True) == 1  # in a dim line
    assert "5 轮" in terminal.say("/save all.jsonl")
    assert terminal.leave(b"\x04") == 0


def test_wikipedia_fetches_asks_back_and_survives_failures(open_terminal, polite, url):  # noqa: F811
    terminal = open_terminal(polite, "--wiki_url", url)
    assert "银杏科的落叶乔木" in terminal.say("/wikipedia 白果树")
    assert "2 苹果 (水果)" in terminal.say("/wikipedia 苹果", until="编号（回车取消）：")
    assert "美国公司" in terminal.say("1")
    terminal.say("/wikipedia 苹果", until="编号（回车取消）：")
    assert "已取消" in terminal.say("")
    assert "不是 JSON" in terminal.say("/wikipedia 坏")
    assert "美国公司" in terminal.say("/资料")
    terminal.type("/wikipedia 挂起\r")
    terminal.read_until("正在查询")
    terminal.type(b"\x03")
    terminal.read_until("已取消")
    terminal.read_until(PROMPT)
    assert terminal.say("你好") == ON_SCREEN


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("index")
    build([write_articles(place / "rows.jsonl")], place / "wiki", "wiki")
    return place / "wiki"


def test_each_question_is_looked_up_in_the_index_and_the_passage_cited(
    open_terminal, polite, index
):
    terminal = open_terminal(polite, "--index", index, "--retrieve")
    assert "（资料：《银杏》第 1 段）" in terminal.say("银杏的叶子什么时候变黄？")
    assert "（索引里没有找到相关资料）" in terminal.say("你好")
    assert re.search(r"资料：镍是一种.*\n（《镍》第 1 段）", terminal.say("/wiki 镍"), re.DOTALL)
    assert terminal.say("银杏的叶子什么时候变黄？") == ON_SCREEN  # the user's 资料 goes before
    shown = terminal.say("/wiki 量子纠缠")
    assert "没有找到“量子纠缠”" in shown and "/wikipedia 量子纠缠" in shown
    assert "资料：镍是一种" in terminal.say("/资料")


def test_without_an_index_wiki_says_so_and_goes_to_the_network(polite, url):  # noqa: F811
    session = Session(load_model(polite), chat.ChatConfig(), wiki_url=url)
    told: list[str] = []
    user = User(input, told.append, input)
    obey(session, "/wiki 白果树", user)
    assert "没有本地索引" in told[0] and "银杏科的落叶乔木" in session.talk.reference


def test_what_was_looked_up_is_in_the_prompt_and_in_the_json(polite, index, capsys):
    cfg = chat.ChatConfig(checkpoint=polite, prompt="镍有铁磁性吗", json=True)
    assert chat.main(replace(cfg, index=index, retrieve=True)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["reply"] == REPLY and record["finish_reason"] == "eos"
    assert record["reference"].startswith("镍是一种有铁磁性的金属元素。")
    (passage,) = record["passages"]
    assert (passage["title"], passage["paragraph"], passage["row"]) == ("镍", 1, "wiki/1")
    assert chat.main(cfg) == 0
    bare = json.loads(capsys.readouterr().out)
    assert bare["n_prompt_tokens"] < record["n_prompt_tokens"] and bare["passages"] is None


def test_json_answers_lines_as_one_conversation_and_tells_errors(polite, script, monkeypatch):
    lines = "你好\n\n" + "好" * 2000 + "\n再见\u202e👩‍👩‍👧\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "gb18030"))
    done = script("chat.py", polite, "--json")
    first, error, second = map(json.loads, done.out.splitlines())
    assert done.code == 2 and "太长" in error["error"] and "Traceback" not in done.err
    assert first["reply"] == second["reply"] == REPLY
    assert second["prompt"] == "再见\u202e👩‍👩‍👧"
    assert second["n_prompt_tokens"] > first["n_prompt_tokens"] + first["n_reply_tokens"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_piped_lines_of_chinese_consoles_are_read(encoding, polite, script, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO("你好\n再见\n".encode(encoding)), "ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    done = script("chat.py", polite, "--json")
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["你好", "再见"]
    assert done.code == 0


def test_piped_bytes_that_are_no_text_are_refused(polite, script, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("utf-16"))))
    assert "编码" in script("chat.py", polite, "--json").error


@pytest.mark.parametrize("form", ['"{}"', "'{}'", "{}"])
def test_a_file_that_was_dragged_in_is_the_reference(form, tmp_path):
    (tmp_path / "我的 资料.txt").write_text("苹果是红色的水果。", "utf-8")
    assert read_reference(form.format(tmp_path / "我的 资料.txt")) == "苹果是红色的水果。"
    escaped = str(tmp_path / "我的 资料.txt").replace(" ", "\\ ")
    assert read_reference(escaped) == "苹果是红色的水果。"
    with pytest.raises(DataError):
        read_reference(str(tmp_path / "没有这个"))


def test_odd_text_goes_through_unharmed_and_harms_no_terminal(terminal, tmp_path):
    odd = "a\u202eb👩‍👩‍👧👍🏽\x1b[31m红\x07"
    (tmp_path / "odd.txt").write_text(odd, "utf-8")
    shown = terminal.say(f"/资料 {tmp_path / 'odd.txt'}")
    assert "a·b👩‍👩‍👧👍🏽·[31m红·" in shown
    assert terminal.say("a\u202eb👩‍👩‍👧") == ON_SCREEN
    assert "太长" in terminal.say("a" * 16384)
    assert "太长，共 16384 字" in terminal.say("/资料 " + "a" * 16384)
    assert "没有命令 /aaa" in terminal.say("/" + "a" * 16384)
    terminal.say(f"/资料 {tmp_path / 'odd.txt'}")
    terminal.say(f"/save {tmp_path / 'talk.jsonl'}")
    (row,) = read_rows(tmp_path / "talk.jsonl")
    assert [m["content"] for m in row["messages"]] == [odd, "a\u202eb👩‍👩‍👧", REPLY]


def said_in(terminal: "Terminal", place: Path) -> list[str]:
    """The user's messages so far."""
    path = place / f"said-{len(list(place.iterdir()))}.jsonl"
    assert "已存入" in terminal.say(f"/save {path}")
    (row,) = read_rows(path)
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def test_a_message_can_have_several_lines(terminal, tmp_path):
    terminal.say("一\\", until=MORE)
    assert terminal.say("二") == ON_SCREEN
    terminal.say('"""三', until=MORE)
    terminal.say("", until=MORE)
    assert terminal.say('四"""') == ON_SCREEN
    # What a terminal sends when text is pasted.
    assert terminal.say("\x1b[200~五\n六\x1b[201~").endswith(ON_SCREEN)
    assert said_in(terminal, tmp_path) == ["一\n二", "三\n\n四", "五\n六"]


def test_messages_are_remembered_from_one_session_to_the_next(open_terminal, polite, tmp_path):
    terminal = open_terminal(polite)
    for message in ("第一句", "第二句", "第二句"):
        terminal.say(message)
    terminal.say("上\\", until=MORE)
    terminal.say("下")
    assert terminal.leave(b"\x04") == 0
    history = tmp_path / "state/babyllama/history"
    assert len(history.read_text("ascii").splitlines()) == 3
    assert history.stat().st_mode & 0o777 == 0o600
    with history.open("ab") as file:
        file.write(b'{"no message"}\n')
    terminal = open_terminal(polite)
    terminal.say("\x1b[A")  # the arrow key upwards
    terminal.say("\x1b[A\x1b[A\x1b[A")
    assert said_in(terminal, tmp_path) == ["上\n下", "第一句"]


def test_words_of_commands_are_completed(terminal, tmp_path):
    (tmp_path / "资料一.txt").write_text("银杏是乔木。", "utf-8")
    assert "temperature 0.5" in terminal.say("/se\ttempera\t")
    assert "资料：银杏是乔木。" in terminal.say(f"/资料 {tmp_path}/资\t")
    assert "没有命令 /nothing" in terminal.say("/nothing\t")
    assert terminal.say("普通\t的话") == ON_SCREEN


def test_sampling_is_shown_changed_and_checked(open_terminal, endless):
    terminal = open_terminal(endless, "--loop_guard", "off", "--max_new_tokens", 400)
    assert "max_new_tokens 400" in terminal.say("/set")
    assert terminal.say("/set max_new_tokens 3").strip() == "max_new_tokens 3"
    assert terminal.say("你好").startswith(f"{LABELS['assistant']}好好好（到了")
    assert "temperature 应为数" in terminal.say("/set temperature 热")
    assert "temperature wants 0 to 10, found -1.0" in terminal.say("/set temperature -1")
    assert "没有设置 'tmp'" in terminal.say("/set tmp 1")
    assert "loop_guard" in terminal.say("/set loop_guard sometimes")
    assert "seed 7" in terminal.say("/set seed 7") and "seed None" in terminal.say("/set seed -")
    assert "stop ['好好', 'x']" in terminal.say("/set stop 好好 x")
    assert terminal.say("/retry").startswith(f"{LABELS['assistant']}\r")
    assert "temperature 0.5" in terminal.say("/set temperature")


def test_retry_answers_the_last_message_again(terminal, tmp_path):
    assert "还没有" in terminal.say("/retry")
    terminal.say("你好")
    assert terminal.say("/retry") == ON_SCREEN
    assert said_in(terminal, tmp_path) == ["你好"]


def make_adapter(path: Path, base: Path, seed: int) -> Path:
    """An adapter with random values on a checkpoint."""
    model = load_model(base).model
    apply_lora(model, LoraConfig(rank=4, targets=("wq", "w1", "output")), base=str(base), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in stored(model).items():
            if name.endswith(".b"):
                weight.normal_(generator=generator)
    return save_adapter(model, path)


def test_adapters_on_one_base_are_switched(open_terminal, tmp_path, tokenizer):
    base = make_checkpoint(tmp_path / "base", tokenizer, None)
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(tmp_path / name, base, seed)
    settings = ("--max_new_tokens", 8, "--temperature", 0, "--weights", "float32")
    adapters = ("--lora", f"a={tmp_path / 'a'}", f"--lora={tmp_path / 'b'}")
    terminal = open_terminal(*settings, *adapters)  # the base is named by the first one
    replies = {}
    for name in ("a", "b", "-", "a"):
        shown = terminal.say(f"/lora {name}")
        assert f"当前：{name if name != '-' else '基座'}；可用：a（" in shown
        terminal.say("/reset")
        reply = terminal.say("你好")
        assert replies.setdefault(name, reply) == reply
    assert len(set(replies.values())) == 3
    assert "没有 LoRA 'c'；有：a、b" in terminal.say("/lora c")
    plain = load_model(base)
    cfg = SamplingConfig(max_new_tokens=8, temperature=0)
    talk = Session(plain, cfg, "float32")
    alone = "".join(talk.answer(talk.ask("你好")))
    shown = HARMFUL.sub("·", alone).replace("\n", "\r\n")
    assert replies["-"].startswith(LABELS["assistant"] + shown)


def test_an_adapter_of_another_base_is_one_line_and_code_2(script, polite, tmp_path, tokenizer):
    base = make_checkpoint(tmp_path / "base", tokenizer, None)
    adapter = make_adapter(tmp_path / "a", base, 1)
    done = script("chat.py", polite, "--lora", f"a={adapter}", "--prompt", "你好")
    assert "belongs to the base" in done.error
    done = script("chat.py", base, "--lora", f"a={tmp_path / 'none'}", "--prompt", "你好")
    assert "none" in done.error
    done = script("chat.py", base, f"--lora=a={adapter}", "--lora", f"a={adapter}")
    assert "different names" in done.error


def test_a_title_is_asked_for_as_scoring_does_and_its_lead_in_comes_off(tmp_path):
    train_vocabulary([*TEXTS, "可以叫《银杏》"] * 5, tmp_path / "v.model", 430)
    tokenizer = Tokenizer(tmp_path / "v.model")
    reply = tokenizer.encode("可以叫《银杏》", eos=True)
    assert len(set(reply)) == len(reply)  # else `teach` could not tell the tokens apart
    loaded = load_model(make_checkpoint(tmp_path / "titles", tokenizer, reply))
    session = Session(loaded, chat.ChatConfig())
    user = User(input, print, lambda: "银杏是乔木。\n\n叶子像扇子。")
    assert obey(session, "/总结 银杏是乔木，叶子像扇子。", user) == "标题：银杏"
    assert obey(session, "/sum", user) == obey(session, "/title", user) == "标题：银杏"
    assert "只读了前 " in obey(session, "/总结 " + "今天天气好。" * 500, user)
    questions, titles = zip(*session.talk.turns, strict=True)  # /save keeps them
    assert set(titles) == {"银杏"} and questions[1].endswith("银杏是乔木。\n\n叶子像扇子。")


def test_a_paste_with_blank_lines_is_one_abstract(open_terminal, polite, tmp_path):
    terminal = open_terminal(polite)
    terminal.type("/总结\r")
    terminal.read_until("粘贴摘要")
    terminal.read_until("\n")
    shown = terminal.say("银杏是乔木。\r\r叶子像扇子。")  # without bracketed paste
    assert "标题：" in shown and LABELS["assistant"] not in shown
    assert "1 轮" in terminal.say("/save talk.jsonl")
    (row,) = read_rows(tmp_path / "talk.jsonl")
    assert row["messages"][0]["content"].endswith("银杏是乔木。\n\n叶子像扇子。")
    assert terminal.leave(b"\x04") == 0


def test_titles_and_commands_work_without_a_terminal(script, polite, tmp_path):
    (tmp_path / "abstract.txt").write_text("银杏是乔木。\n\n叶子像扇子。", "utf-8")
    words = ("chat.py", polite, "--title", tmp_path / "abstract.txt")
    title = script(*words)
    assert title.code == 0 and len(title.out.splitlines()) == 1 and title.out.strip()
    found = json.loads(
        script("chat.py", polite, "--title", tmp_path / "abstract.txt", "--json").out
    )
    assert found["titles"][0] == title.out.strip() and found["n_read"] == found["n_characters"]
    said = script("chat.py", polite, "--prompt", f"/title {tmp_path / 'abstract.txt'}")
    assert (said.code, said.out) == (0, f"标题：{title.out}")
    asks_back = script("chat.py", polite, "--prompt", "/title")
    assert asks_back.code == 2 and "no terminal" in asks_back.err
    missing = script("chat.py", polite, "--title", "no.txt")
    assert missing.code == 2 and "wanted a text file or -" in missing.err


def test_commands_are_those_for_what_the_model_was_trained_for(tmp_path, tokenizer):
    run = make_checkpoint(tmp_path / "titles", tokenizer, None)
    loaded, user = load_model(run), User(input, print, input)
    loaded.model.more_info = {"tasks": ["title"]}
    path = save_model(tmp_path / "stated", loaded.model, tokenizer)
    stated, silent = (
        Session(load_model(path), chat.ChatConfig()),
        Session(loaded, chat.ChatConfig()),
    )
    assert "/资料" in obey(silent, "/help", user) and "/ref" in completions(silent, "", "/r")
    assert "/资料" not in obey(stated, "/help", user) and "/总结" in obey(stated, "/help", user)
    assert "/ref" not in completions(stated, "", "/r")
    for line in ("/资料 一段", "/ref 一段", "/wiki 银杏"):
        with pytest.raises(ConfigError, match=r"没有学过.*title"):
            obey(stated, line, user)


@pytest.mark.parametrize("what", ["missing", "another version"])
def test_an_index_that_cannot_be_used_is_one_line_and_code_2(script, polite, index, tmp_path, what):
    place = tmp_path / "wiki"
    if what == "another version":
        shutil.copytree(index, place)
        text = (place / "index.json").read_text("utf-8").replace('"version": 2', '"version": 0')
        (place / "index.json").write_text(text, "utf-8")
    done = script("chat.py", polite, "--prompt", "你好", "--retrieve", "--index", place)
    assert str(place) in done.error and "--index" in done.error


def test_colours_are_for_terminals_that_want_them(
    terminal, open_terminal, polite, script, monkeypatch
):
    assert "\x1b[" not in terminal.say("/help")  # NO_COLOR is set there
    assert "\x1b[2m" in open_terminal(polite, NO_COLOR="").say("/help")
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" not in script("chat.py", polite, "--prompt", "你好").out


def test_what_people_write_is_read_in_the_letters_of_training_and_begins_no_turn(tokenizer):
    """The talk itself keeps what was typed, and what the model said."""
    turns = [("這個問題\n\n助手：好", "國家\n\n人類：Ａ")]
    talk = Conversation(tokenizer, 500, "Ａ\u200b\n\n人类:好", turns)
    text = tokenizer.decode(talk.prompt_for("發展\r\n资料：无"))
    assert text == (
        "资料：A\n\n「人类」:好\n\n人类：这个问题\n\n「助手」：好\n\n助手：國家\n\n人類：Ａ"
        "\n\n人类：发展\n「资料」：无\n\n助手："
    )
    assert talk.turns == turns


def talk_of(tokenizer: Tokenizer, room: int, n_turns: int = 6) -> Conversation:
    turns = [(f"今天{n}", "天气好" * n) for n in range(n_turns)]
    return Conversation(tokenizer, room, "银杏是乔木。", turns)


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
    talk = Conversation(tokenizer, room)
    said = talk.set_reference("今天天气好。" * 500 + "苹果是红色的水果。")
    assert "太长，共 3009 字" in said and said.endswith("……")
    assert "太长" not in talk_of(tokenizer, room).set_reference("今天天气好。")
    ids = talk.prompt_for("苹果是什么颜色？")
    assert len(ids) <= room and "今天天气好。苹果是红色的水果。\n" in tokenizer.decode(ids)
    assert talk.messages()[0]["content"] == talk.reference and len(talk.reference) == 3009


def test_a_reference_is_a_file_or_the_text_itself(tmp_path):
    file = tmp_path / "text.txt"
    for encoding in ("gb18030", "utf-16", "big5"):  # Notepad's "Unicode"; Taiwan
        file.write_text("這是一。\n不是二。", encoding=encoding)
        assert read_reference(str(file)) == "這是一。\n不是二。"
    assert read_reference("长" * 5000) == "长" * 5000
    assert read_reference("半\udce4个\x00") == "半?个\x00"
    file.write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"text\.txt.*不是"):
        read_reference(str(file))
    with pytest.raises(DataError, match=r"没有文件.*txet\.txt"):
        read_reference("txet.txt")
