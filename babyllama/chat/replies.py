"""A reply as it is printed: in a conversation, once, or for each line of standard input."""

import json
import sys
from pathlib import Path

from babyllama.chat.commands import Again, User, obey
from babyllama.chat.session import Asked, Session, read_reference
from babyllama.chat.terminal import paint, say, visible, whole
from babyllama.config import BAD_INPUT, INTERRUPTED, shown
from babyllama.errors import ConfigError, DataError
from babyllama.language import verbatim
from babyllama.retrieval.retriever import WikiError
from tokenizer import LABELS

MISTAKES = (ConfigError, DataError, WikiError)
ENDINGS = {
    "length": "（到了长度上限 max_new_tokens）",
    "context": "（上下文满了，回答到此为止）",
    "loop": "（开始重复，已停止）",
    "interrupted": "（已停止）",
}


def greet(session: Session, index: Path | None, reference: str) -> str:
    """What is worth knowing before the first message.

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


def decoded(data: bytes, is_first: bool = True) -> str:
    """Piped text: UTF-8, else GB18030, as Chinese consoles write it; a mark at its beginning goes.

    raises: DataError if it is neither
    """
    for encoding in ("utf-8-sig" if is_first else "utf-8", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError("标准输入：应为 UTF-8 或 GB18030 编码的文本，收到的两者都不是；请先转换编码")


def write_title(session: Session, title: str, is_json: bool) -> int:
    """The title of --title on standard output and nothing else; with --json three candidates."""
    if title == "-":
        text = decoded(sys.stdin.buffer.read())
    elif not Path(title).is_file():
        raise DataError(f"--title: wanted a text file or -, found no {title!r}")
    else:
        text = read_reference(title)
    text = text.strip()
    if not text:
        raise DataError("--title: wanted a text, found it blank")
    titles, n_read, _ = session.summarise(whole(text), 3)
    if is_json:
        found = {"titles": titles, "n_read": n_read, "n_characters": len(text)}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    if n_read < len(text):
        note(f"（原文太长，只读了前 {n_read} 字）")
    print(visible(titles[0] if titles else ""), file=verbatim(sys.stdout))
    return 0


def answer_once(session: Session, prompt: str, is_json: bool) -> int:
    """The reply to one message, or `n` of them, on standard output and nothing else; returns the
    exit code."""
    said = obeyed(session, whole(prompt))
    if said is not None:
        record = {"prompt": prompt, "reply": said}
        print(json.dumps(record, ensure_ascii=False) if is_json else visible(said))
        return 0
    asked = session.ask(whole(prompt))
    if session.sampling.n > 1:
        for one in session.answers(asked):
            text = as_json(session, one) if is_json else visible(one.text)
            print(text, file=verbatim(sys.stdout))
        return 0
    if is_json:
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
    code = 0
    for number, line in enumerate(sys.stdin.buffer):
        message = whole(decoded(line, number == 0).rstrip("\r\n"))
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
