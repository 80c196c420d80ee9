"""Talk to a checkpoint in the terminal.

    python chat.py                                  # the newest run in out/, else release/
    python chat.py out/redgpt                       # a run (its newest step) or one step of it
    python chat.py --prompt "你好"                   # one reply on stdout and nothing else
    python chat.py --prompt "作者是谁？" --reference text.txt
    python chat.py out/redgpt --temperature 0       # always the likeliest token

In the conversation /help lists the commands: /资料 gives the model a text to answer from, /wiki
fetches one. Ctrl-C stops a reply, Ctrl-D leaves. Without a terminal three short exchanges are
shown. The chat format is the tokenizer's and sampling is babyllama/generate.py's; this file owns
the conversation: what is kept when the context is full, and what the user sees.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from babyllama.checkpoint import Loaded, load_model, newest_run
from babyllama.cli import INTERRUPTED, REPO, from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.fast import Decoder, Weights, make_decoder
from babyllama.generate import Reply, generate_replies, stream_text
from babyllama.retrieval import API_URL, Choices, WikiError, look_up, trim
from babyllama.rows import write_rows
from babyllama.sampling import SamplingConfig
from tokenizer import LABELS, Tokenizer

EXAMPLES = ("你好", "你是谁？", "你喜欢什么？")
MOST_CHARACTERS = 100_000  # read from a reference file; far more than any context holds
STOPPED_EARLY = "（已停止）"
ENDINGS = {"length": "（到了长度上限）", "loop": "（开始重复，已停止）"}


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """How to talk.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        prompt: answer this one message and exit
        reference: 资料 to answer from: a text file, or the text itself
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
        wiki_url: address of the MediaWiki API behind /wiki, for a mirror
    """

    checkpoint: Path | None = None
    prompt: str | None = None
    reference: str = ""
    device: Device = "auto"
    weights: Weights = "auto"
    wiki_url: str = API_URL


@dataclass
class Conversation:
    """What was said so far, and how much of it the model still sees.

    room: tokens a prompt may take; a quarter of the context, or less, is kept for the reply
    first: the turns before this one no longer fit; they stay in `turns` for /save
    """

    tokenizer: Tokenizer
    room: int
    reference: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    first: int = 0

    def messages(self, first: int = 0) -> list[dict]:
        """The 资料, if there is one, and the turns from `first` on."""
        messages = [{"role": "system", "content": self.reference}] if self.reference else []
        for user, assistant in self.turns[first:]:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return messages

    def prompt_for(self, question: str) -> list[int]:
        """The ids to continue; whole oldest turns are let go until they fit, never the 资料.

        raises: ConfigError if the question does not fit even alone; nothing is let go then
        """
        for first in range(self.first, len(self.turns) + 1):
            asked = [*self.messages(first), {"role": "user", "content": question}]
            ids = self.tokenizer.render_prompt(asked)
            if len(ids) <= self.room:
                self.first = first
                return ids
        raise ConfigError(
            f"这条消息太长：连同资料共 {len(ids)} 个 token，上限 {self.room}；请缩短消息或资料"
        )

    def set_reference(self, text: str) -> str:
        """Make `text` the 资料; returns what there is to say about it.

        A third of the room stays free for the question, so a long text is cut after a sentence.
        """
        text, limit = text.strip(), self.room * 2 // 3
        self.reference = trim(text, limit, lambda part: len(self.tokenizer.encode(part)))
        cut = f"（太长，只留开头 {len(self.reference)} 字）" * (len(self.reference) < len(text))
        return f"资料{cut}：{self.reference or '无'}"


def choose_checkpoint(wanted: Path | None) -> Path:
    """The checkpoint the user named, else the newest run, else the released model.

    raises: ConfigError if there is none at all
    """
    if wanted:
        return from_repo(wanted)
    release = REPO / "release"
    found = newest_run(REPO / "out") or newest_run(release)
    if found is None and not release.is_dir():
        raise ConfigError(
            "wanted a checkpoint, found none in out/ or release/; make one with python "
            "quickstart.py, or with pretrain.py and sft.py, or name one: python chat.py CHECKPOINT"
        )
    return found or release


def whole(text: str) -> str:
    """Text that can be encoded: half characters from a broken terminal become "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_reference(value: str) -> str:
    """The beginning of the file that `value` names, else `value` itself.

    raises: DataError if the file is no text, or if only the name of one that is missing was given
    """
    path = os.path.expanduser(value.strip())
    if not os.path.isfile(path):
        if path.endswith((".txt", ".md")):
            raise DataError(f"没有文件 {path!r}；请检查路径，或直接写出资料的文字")
        return whole(value)
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            with open(path, encoding=encoding) as file:
                return file.read(MOST_CHARACTERS)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}：应为 UTF-8 或 GB18030 编码的文本，此文件不是；请换一个")


def paint(text: str, code: str = "2") -> str:
    """Colour (dim unless told) where the terminal has it and the user wants it: no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    return text if plain or not text or not sys.stdout.isatty() else f"\x1b[{code}m{text}\x1b[0m"


def visible(text: str) -> str:
    """Model text that cannot move the cursor or ring the bell."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "·", text) if sys.stdout.isatty() else text


def reply(loaded: Loaded, decoder: Decoder, cfg: ChatConfig, prompt: list[int]) -> tuple[str, str]:
    """Print a reply as it comes; returns it with "" or the reason why it ended early."""
    text, end = "", Reply()
    try:
        for piece in stream_text(decoder, prompt, cfg, loaded.tokenizer, end):
            text += piece
            print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        return text, STOPPED_EARLY
    return text, ENDINGS.get(end.reason, "")


def answer(
    loaded: Loaded, decoder: Decoder, cfg: ChatConfig, talk: Conversation, question: str
) -> None:
    """One turn: prints the reply and keeps it, unless it is blank."""
    n_gone = talk.first
    prompt = talk.prompt_for(question)
    if n_gone == 0 < talk.first:
        print(paint("（上下文满了：从现在起，模型看不到最早的几轮；资料保留）"))
    print(paint(LABELS["assistant"], "36"), end="", flush=True)
    text, ended_early = reply(loaded, decoder, cfg, prompt)
    print(paint(ended_early))
    if text.strip():
        talk.turns.append((question, text))


def do_reference(cfg: ChatConfig, talk: Conversation, value: str) -> None:
    text = {"": talk.reference, "-": ""}.get(value)
    print(paint(talk.set_reference(read_reference(value) if text is None else text)))


def do_wiki(cfg: ChatConfig, talk: Conversation, term: str) -> None:
    print(paint("正在查询维基百科…"))
    found = look_up(term, cfg.wiki_url)
    while isinstance(found, Choices):
        print(f"“{found.term}”" + ("有多个含义：" if found.ambiguous else "没有词条，相近的有："))
        for number, title in enumerate(found.titles, 1):
            print(f"  {number} {title}")
        chosen = input("编号（回车取消）：").strip()
        if chosen not in map(str, range(1, len(found.titles) + 1)):
            return print(paint("已取消"))
        found = look_up(found.titles[int(chosen) - 1], cfg.wiki_url)
    print(paint(f"{talk.set_reference(found.text)}\n（{found.title}，{found.url}，CC BY-SA）"))


def do_reset(cfg: ChatConfig, talk: Conversation, _: str) -> None:
    talk.turns.clear()
    talk.first = 0
    print(paint("对话已清空，资料保留" if talk.reference else "对话已清空"))


def do_save(cfg: ChatConfig, talk: Conversation, value: str) -> None:
    path = Path(value).expanduser()
    if not talk.turns or not value or path.exists():
        found = f"{path} 已存在" if value and talk.turns else "缺少文件名或对话为空"
        raise DataError(f"应为：/save 新文件名，在对话之后；{found}")
    write_rows(path, [{"id": "chat/1", "messages": talk.messages()}])
    print(paint(f"{len(talk.turns)} 轮已存入 {path}"))


def do_help(cfg: ChatConfig, talk: Conversation, _: str) -> None:
    for name, (_, meaning) in COMMANDS.items():
        print(f"  {name:<8}{meaning}")


COMMANDS: dict[str, tuple[Callable[[ChatConfig, Conversation, str], None] | None, str]] = {
    "/资料": (do_reference, "文件或文字：让模型据此回答；不写则显示，- 清除（也可写 /ref）"),
    "/wiki": (do_wiki, "词条：取维基百科的序言作资料"),
    "/reset": (do_reset, "清空对话"),
    "/save": (do_save, "文件：把对话存成一行 JSON，格式与训练数据相同"),
    "/help": (do_help, "显示这些命令"),
    "/quit": (None, "退出，同 Ctrl-D；Ctrl-C 停止正在输出的回答"),
}


def obey(cfg: ChatConfig, talk: Conversation, line: str) -> bool:
    """Carry out a line that begins with "/"; False if it ends the conversation."""
    name, _, value = line.strip().partition(" ")
    name = "/资料" if name == "/ref" else name
    if name not in COMMANDS:
        raise ConfigError(f"没有命令 {name}；有 {' '.join(COMMANDS)}")
    command, _ = COMMANDS[name]
    if command:
        command(cfg, talk, value.strip())
    return command is not None


def set_up_terminal() -> Callable[[], str]:
    """Line editing, history and completion where Python has readline (Windows has not).

    returns: a function that tells what stands in the line being edited
    """
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 must not end the program
    try:
        import readline
    except ImportError:
        return str
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, n: [*(c for c in COMMANDS if c.startswith(text)), None][n])
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    return readline.get_line_buffer


def converse(loaded: Loaded, decoder: Decoder, cfg: ChatConfig, talk: Conversation) -> None:
    """Read, answer, repeat, until /quit, Ctrl-D, or Ctrl-C on an empty line."""
    line_so_far = set_up_terminal()
    print(paint("输入文字即可对话；/help 显示命令，Ctrl-D 退出"))
    while True:
        try:
            line = whole(input(LABELS["user"]))
        except (KeyboardInterrupt, EOFError) as stop:
            print()
            if isinstance(stop, KeyboardInterrupt) and line_so_far():
                continue
            return
        try:
            if line.startswith(("/", "／")):
                if not obey(cfg, talk, "/" + line[1:]):
                    return
            elif line.strip():
                answer(loaded, decoder, cfg, talk, line)
        except (KeyboardInterrupt, EOFError):
            print(paint("\n已取消"))
        except (ConfigError, DataError, WikiError, OSError) as error:
            print(paint(str(error), "31"))


def main(cfg: ChatConfig) -> int:
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise ConfigError("--prompt is blank; give a message, or leave it out to talk")
    if cfg.n > 1 and not cfg.prompt:
        raise ConfigError(f"--n {cfg.n} is for one message; add --prompt, or leave it out to talk")
    loaded = load_model(choose_checkpoint(cfg.checkpoint), pick_device(cfg.device))
    loaded.tokenizer.require_dialogue()
    decoder = make_decoder(loaded.model, cfg.weights)
    context = loaded.config.max_seq_len
    talk = Conversation(loaded.tokenizer, room=context - min(cfg.max_new_tokens, context // 4))
    notes = [f"模型：{shown(loaded.path)}" + "（未经对话微调）" * (loaded.kind == "pretrain")]
    if cfg.reference:
        notes.append(talk.set_reference(read_reference(cfg.reference)))
    print(paint("\n".join(notes)), file=sys.stderr if cfg.prompt else sys.stdout)
    if cfg.prompt:
        prompt = talk.prompt_for(whole(cfg.prompt))
        if cfg.n > 1:
            eos_id = loaded.tokenizer.eos_id
            for found in generate_replies(decoder, [prompt], cfg, eos_id, loaded.tokenizer):
                print(visible(found.text))
            return 0
        _, ended_early = reply(loaded, decoder, cfg, prompt)
        print()
        print(ended_early, end="\n" if ended_early else "", file=sys.stderr)
        return INTERRUPTED if ended_early == STOPPED_EARLY else 0
    if all(file is not None and file.isatty() for file in (sys.stdin, sys.stdout)):
        converse(loaded, decoder, cfg, talk)
        return 0
    cfg = replace(cfg, seed=cfg.seed or 0)
    for question in EXAMPLES:
        print(LABELS["user"] + question)
        answer(loaded, decoder, cfg, talk, question)
    return 0


if __name__ == "__main__":
    run(main, parse(ChatConfig, __doc__, positional=["checkpoint"]))
