"""A reply as it is printed: in a conversation, once, or for each line of standard input."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from babyllama.chat.commands import Again, User, obey
from babyllama.chat.session import Asked, Session, decoded, read_reference
from babyllama.chat.terminal import paint, say, visible, whole
from babyllama.config import BAD_INPUT, INTERRUPTED, shown
from babyllama.errors import ConfigError, DataError
from babyllama.language import verbatim
from babyllama.retrieval.retriever import WikiError
from tokenizer import LABELS

MISTAKES = (ConfigError, DataError, WikiError)
STDIN = "标准输入"
ENDINGS = {
    "length": "（到了长度上限 max_new_tokens）",
    "context": "（上下文满了，回答到此为止）",
    "loop": "（开始重复，已停止）",
    "interrupted": "（已停止）",
}


def greet(session: Session, index: Path | None, reference: str) -> str:
    """Notes before the first message.

    index: named by the user; reference: the 资料 to begin with
    """
    loaded = session.loaded
    notes = [f"模型：{shown(loaded.path)}" + "（未经对话微调）" * (loaded.kind == "pretrain")]
    if session.adapters:
        notes.append(f"LoRA：{session.adapter}（共 {len(session.adapters)} 个，/lora 切换）")
    if session.retriever and (session.retrieve or index):
        notes.append(f"索引：{session.retriever.describe()}" + "，自动检索" * session.retrieve)
    if reference:
        notes.append(session.talk.set_reference(read_reference(reference)))
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
            print(visible(piece), end="", file=verbatim(sys.stdout), flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        pieces.close()


def answer(session: Session, message: str) -> str:
    """One turn of a conversation on the screen; returns how the reply ended."""
    asked = session.ask(message)
    if asked.lets_go:
        say("（上下文满了：从现在起，模型看不到最早的几轮；资料保留）")
    print(paint(LABELS["assistant"], "36"), end="", flush=True)
    reply(session, asked)
    print(paint(ENDINGS.get(asked.reason, "")))
    if asked.found is not None:
        say(sources(asked))
    return asked.reason


def respond(session: Session, line: str, user: User) -> str | None:
    """Answer a message or carry out a command on the screen; returns how a reply ended, or None
    where the conversation ends."""
    found = obey(session, line, user)
    if isinstance(found, Again):
        return answer(session, found.message)
    if found is not None:
        say(found)
    return found


def no_terminal(*_: str) -> str:
    raise ConfigError("this command asks back, and there is no terminal; write all in one line")


def note(text: str) -> None:
    print(visible(text, sys.stderr), file=sys.stderr)


SCRIPT = User(no_terminal, note, no_terminal)


def write_title(session: Session, title: str, is_json: bool) -> int:
    """The title of --title on standard output and nothing else; with --json three candidates."""
    if title == "-":
        text = decoded(sys.stdin.buffer.read(), STDIN).strip()
    elif not Path(title).is_file():
        raise DataError(f"--title: wanted a text file or -, found no {title!r}")
    else:
        text = read_reference(title).strip()
    if not text:
        raise DataError("--title: wanted a text, found it blank")
    titles, n_read, _ = session.summarise(whole(text), 3)
    if n_read < len(text) and not is_json:
        note(f"（原文太长，只读了前 {n_read} 字）")
    record = {"titles": titles, "n_read": n_read, "n_characters": len(text)}
    give(record, titles[0] if titles else "", is_json)
    return 0


def answer_once(session: Session, prompt: str, is_json: bool) -> int:
    """The reply to one message on standard output and nothing else; returns the exit code."""
    found = obey(session, whole(prompt), SCRIPT)
    if not isinstance(found, Again):
        give({"prompt": prompt, "reply": found or ""}, found or "", is_json)
        return 0
    asked = session.ask(found.message)
    if is_json:
        give(session.record(asked))
        return 0
    reply(session, asked)
    print(flush=True)
    notes = ENDINGS.get(asked.reason, "") + sources(asked)
    print(visible(notes, sys.stderr), end="\n" if notes else "", file=sys.stderr)
    return INTERRUPTED if asked.reason == "interrupted" else 0


def give(record: dict, text: str = "", is_json: bool = True) -> None:
    """What a script reads on standard output: an object of JSON, or the text in it."""
    said = json.dumps(record, ensure_ascii=False) if is_json else visible(text)
    print(said, file=verbatim(sys.stdout), flush=True)


def piped_lines() -> Iterator[str]:
    """The lines of standard input that are not blank, each as soon as it is there."""
    for line in sys.stdin.buffer if sys.stdin else ():
        message = whole(decoded(line, STDIN).rstrip("\r\n"))
        if message.strip():
            yield message


def answer_lines(session: Session, lines: Iterable[str], is_json: bool) -> int:
    """One conversation, a message or command a line: as on a terminal, or an object of JSON each.
    One that cannot be answered gives its error, and exit code 2 at the end."""
    code = 0
    ended: str | None = ""
    for line in lines:
        if not is_json:
            print(LABELS["user"] + visible(line), file=verbatim(sys.stdout), flush=True)
        try:
            if not is_json:
                ended = respond(session, line, SCRIPT)
            elif isinstance(found := obey(session, line, SCRIPT), Again):
                give(session.record(session.ask(found.message)))
            elif (ended := found) is not None:
                give({"prompt": line, "reply": found})
        except (*MISTAKES, OSError) as error:
            code = BAD_INPUT
            give({"prompt": line, "error": str(error)}) if is_json else note(str(error))
            continue
        if ended is None or ended == "interrupted":
            return code if ended is None else INTERRUPTED
    return code
