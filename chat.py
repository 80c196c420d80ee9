"""Talk to a checkpoint in the terminal.

    python chat.py                                  # the newest run in out/, else release/
    python chat.py out/redgpt                       # a run (its newest step) or one step of it
    python chat.py --prompt "你好"                   # one reply on stdout and nothing else
    python chat.py --prompt "作者是谁？" --reference text.txt
    python chat.py --prompt "你好" --json            # one JSON object a reply
    python chat.py --json < questions.txt           # a conversation, one message a line
    python chat.py --title abstract.txt             # the title of a text; - is standard input
    python chat.py --retrieve                       # look each question up in the local index
    python chat.py out/base --lora a=out/csl_lora --lora b=out/redgpt_lora
    python chat.py out/redgpt --temperature 0       # always the likeliest token

In the conversation /help lists the commands: /资料 gives the model a text to answer from, /wiki
finds one in the local index (python -m data_process.run wiki --index), /总结 writes a title. Tab
completes them, the arrow keys bring back what was typed, in former sessions too (Windows: the
console's own editing, this session's lines, no Tab). Ctrl-C stops a reply, Ctrl-D leaves. Without
a terminal three short exchanges are shown. The session is babyllama/chat/session.py's, the terminal
terminal.py's; this file owns what the user sees when.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from babyllama.chat.commands import Again, User, completions, obey
from babyllama.chat.session import Asked, Session, choose_checkpoint, named, read_reference, whole
from babyllama.chat.terminal import Lines, paint, say, state_dir, visible
from babyllama.checkpoint import find_adapter, load_model, read_adapter
from babyllama.config import BAD_INPUT, INTERRUPTED, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.generate import Weights
from babyllama.retrieval.retriever import API_URL, INDEX, Retriever, WikiError
from babyllama.sampling import SamplingConfig
from tokenizer import LABELS

EXAMPLES = ("你好", "你是谁？", "你喜欢什么？")
ENDINGS = {
    "length": "（到了长度上限 max_new_tokens）",
    "context": "（上下文满了，回答到此为止）",
    "loop": "（开始重复，已停止）",
    "interrupted": "（已停止）",
}
MISTAKES = (ConfigError, DataError, WikiError)


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """How to talk.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        prompt: answer this one message and exit
        json: one JSON object a reply; without --prompt for each line of standard input
        title: write the title of this text file, or of standard input (-), and exit
        reference: 资料 to answer from: a text file, or the text itself
        lora: adapters on the checkpoint, NAME=DIRECTORY each, to be given several times; /lora
            switches; without a checkpoint they bring their base
        index: full-text index for /wiki and --retrieve; if absent data/index/wiki, if it is there
        retrieve: take 资料 for each question from the index
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
        wiki_url: address of the MediaWiki API behind /wikipedia, for a mirror
    """

    checkpoint: Path | None = None
    prompt: str | None = None
    json: bool = False
    title: str | None = None
    reference: str = ""
    lora: tuple[str, ...] = ()
    index: Path | None = None
    retrieve: bool = False
    device: Device = "auto"
    weights: Weights = "auto"
    wiki_url: str = API_URL
    loop_guard: Literal["off", "end", "redraw"] = "redraw"  # people do not want to read loops


def joined(argv: Sequence[str], flag: str = "--lora") -> list[str]:
    """The words with a flag that is given several times as one flag with a list."""
    rest, found, at = [], [], iter(argv)
    for word in at:
        if word == flag or word.startswith(f"{flag}="):
            found.append(word[len(flag) + 1 :] if "=" in word[: len(flag) + 1] else next(at, ""))
        else:
            rest.append(word)
    alone = len(found) == 1 and found[0].startswith("[")
    return [*rest, *([flag, found[0] if alone else json.dumps(found)] if found else [])]


def open_retriever(cfg: ChatConfig) -> Retriever | None:
    """The index that was named, or the usual one if it is there.

    raises: DataError if it cannot be used, ConfigError if one is needed and there is none
    """
    if cfg.index or INDEX.is_dir():
        return Retriever.open(cfg.index or INDEX)
    if cfg.retrieve:
        raise ConfigError(
            f"--retrieve wants a full-text index, found none in {shown(INDEX)}; make it with "
            f"python -m data_process.run wiki --index, or name one with --index"
        )
    return None


def open_session(cfg: ChatConfig) -> Session:
    """Model, adapters and index as the settings name them."""
    checkpoint = cfg.checkpoint
    if checkpoint is None and cfg.lora:
        _, found, _ = read_adapter(find_adapter(named(cfg.lora[0])[1]))
        checkpoint = Path(found["base"]) if found["base"] else None
    retriever = open_retriever(cfg)
    loaded = load_model(choose_checkpoint(checkpoint), pick_device(cfg.device))
    return Session(loaded, cfg, cfg.weights, cfg.lora, retriever, cfg.retrieve, cfg.wiki_url)


def greet(session: Session, cfg: ChatConfig) -> str:
    """What is worth knowing before the first message."""
    loaded = session.loaded
    notes = [f"模型：{shown(loaded.path)}" + "（未经对话微调）" * (loaded.kind == "pretrain")]
    if session.adapters:
        notes.append(f"LoRA：{session.adapter}（共 {len(session.adapters)} 个，/lora 切换）")
    if session.retriever and (cfg.retrieve or cfg.index):
        notes.append(f"索引：{session.retriever.describe()}" + "，自动检索" * cfg.retrieve)
    if cfg.reference:
        notes.append(session.talk.set_reference(read_reference(cfg.reference)))
    return "\n".join(notes)


def sources(asked: Asked) -> str:
    """Which passages a question is answered from."""
    if asked.found is None:
        return ""
    return f"（资料：{asked.found.citation}）" if asked.found.text else "（索引里没有找到相关资料）"


def reply(session: Session, asked: Asked) -> None:
    """Print a reply as it comes; Ctrl-C ends it."""
    pieces = session.answer(asked)
    try:
        for piece in pieces:
            print(visible(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        pieces.close()


def answer(session: Session, message: str) -> None:
    """One turn of a conversation on the screen."""
    asked = session.ask(message)
    if asked.lets_go:
        say("（上下文满了：从现在起，模型看不到最早的几轮；资料保留）")
    print(paint(LABELS["assistant"], "36"), end="", flush=True)
    reply(session, asked)
    print(paint(ENDINGS.get(asked.reason, "")))
    if asked.found is not None:
        say(sources(asked))


def converse(session: Session) -> None:
    """Read, answer, repeat, until /quit, Ctrl-D, or Ctrl-C twice on an empty line."""
    lines = Lines(lambda before, word: completions(session, before, word), state_dir() / "history")
    user = User(lambda question: whole(input(question)), say, lambda: whole(lines.paste()))
    print(paint("输入文字即可对话；/help 显示命令，Ctrl-D 退出"))
    is_leaving = False
    while True:
        try:
            line = whole(lines.read(LABELS["user"]))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if is_leaving:
                return
            is_leaving = not lines.so_far()
            if is_leaving:
                say("再按一次 Ctrl-C 退出")
            continue
        is_leaving = False
        try:
            if line.startswith(("/", "／")):
                found = obey(session, "/" + line[1:], user)
                if found is None:
                    return
                if isinstance(found, Again):
                    answer(session, found.message)
                else:
                    say(found)
            elif line.strip():
                answer(session, line)
        except (KeyboardInterrupt, EOFError):
            say("\n已取消")
        except (*MISTAKES, OSError) as error:
            say(str(error), "31")


def no_terminal(*_: str) -> str:
    raise ConfigError("this command asks back, and there is no terminal; write all in one line")


def note(text: str) -> None:
    print(visible(text, sys.stderr), file=sys.stderr)


SCRIPT = User(no_terminal, note, no_terminal)


def obeyed(session: Session, line: str) -> str | None:
    """What a command gives where nobody can be asked; None for a message.

    raises: ConfigError and others with what to tell the user
    """
    if not line.startswith(("/", "／")):
        return None
    found = obey(session, "/" + line[1:], SCRIPT)
    if isinstance(found, Again):
        return "".join(session.answer(session.ask(found.message)))
    return found or ""


def write_title(session: Session, cfg: ChatConfig) -> int:
    """The title of --title on standard output and nothing else; with --json three candidates."""
    if cfg.title == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    elif not Path(cfg.title).is_file():
        raise DataError(f"--title: wanted a text file or -, found no {cfg.title!r}")
    text = (sys.stdin.read() if cfg.title == "-" else read_reference(cfg.title)).strip()
    if not text:
        raise DataError("--title: wanted a text, found it blank")
    titles, n_read = session.summarise(whole(text), 3)
    if cfg.json:
        found = {"titles": titles, "n_read": n_read, "n_characters": len(text)}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    if n_read < len(text):
        note(f"（原文太长，只读了前 {n_read} 字）")
    print(visible(titles[0] if titles else ""))
    return 0


def answer_once(session: Session, cfg: ChatConfig) -> int:
    """The reply to --prompt, or --n of them, on standard output and nothing else."""
    said = obeyed(session, whole(cfg.prompt))
    if said is not None:
        record = {"prompt": cfg.prompt, "reply": said}
        print(json.dumps(record, ensure_ascii=False) if cfg.json else visible(said))
        return 0
    asked = session.ask(whole(cfg.prompt))
    if cfg.n > 1:
        for one in session.answers(asked):
            print(as_json(session, one) if cfg.json else visible(one.text))
        return 0
    if cfg.json:
        for _ in session.answer(asked):
            pass
        print(as_json(session, asked))
        return 0
    reply(session, asked)
    print(flush=True)
    notes = ENDINGS.get(asked.reason, "") + sources(asked)
    print(visible(notes, sys.stderr), end="\n" if notes else "", file=sys.stderr)
    return INTERRUPTED if asked.reason == "interrupted" else 0


def as_json(session: Session, asked: Asked) -> str:
    return json.dumps(session.record(asked), ensure_ascii=False)


def answer_lines(session: Session) -> int:
    """A JSON object for each line of standard input, which is one conversation; a message that
    cannot be answered gives an object with "error", and exit code 2 at the end."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    code = 0
    for line in sys.stdin:
        message = whole(line.rstrip("\r\n"))
        if not message.strip():
            continue
        try:
            said = obeyed(session, message)
            asked = session.ask(message) if said is None else None
        except (*MISTAKES, OSError) as error:
            code = BAD_INPUT
            print(json.dumps({"prompt": message, "error": str(error)}, ensure_ascii=False))
            continue
        if asked is None:
            print(json.dumps({"prompt": message, "reply": said}, ensure_ascii=False), flush=True)
            continue
        for _ in session.answer(asked):
            pass
        print(as_json(session, asked), flush=True)
    return code


def main(cfg: ChatConfig) -> int:
    if cfg.prompt and cfg.title:
        raise ConfigError("--prompt and --title are two questions; give one of them")
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise ConfigError("--prompt is blank; give a message, or leave it out to talk")
    if cfg.n > 1 and not cfg.prompt:
        raise ConfigError(f"--n {cfg.n} is for one message; add --prompt, or leave it out to talk")
    session = open_session(cfg)
    place = sys.stderr if cfg.prompt or cfg.json or cfg.title else sys.stdout
    print(paint(visible(greet(session, cfg), place), file=place), file=place)
    if cfg.title:
        return write_title(session, cfg)
    if cfg.prompt:
        return answer_once(session, cfg)
    if cfg.json:
        return answer_lines(session)
    if all(file is not None and file.isatty() for file in (sys.stdin, sys.stdout)):
        converse(session)
        return 0
    session.sampling = replace(cfg, seed=cfg.seed or 0)
    for question in EXAMPLES:
        print(LABELS["user"] + question)
        answer(session, question)
    return 0


if __name__ == "__main__":
    run(main, parse(ChatConfig, __doc__, joined(sys.argv[1:]), positional=["checkpoint"]))
