"""The commands of chat.py: what a line that begins with "/" does to a session.

A command takes the session, the words behind its name, and the user, who can be asked and told; it
returns what to show, or Again with a message that is to be answered.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from glob import escape, glob
from pathlib import Path
from typing import Any, Literal

from babyllama.chat.session import Session, read_reference
from babyllama.errors import ConfigError, DataError
from babyllama.retrieval.retriever import Choices, look_up
from babyllama.rows import write_rows
from babyllama.sampling import SamplingConfig


@dataclass(frozen=True)
class User:
    """ask: puts a question and gives the answer; tell: shows what a command is busy with
    paste: gives a text of any number of lines"""

    ask: Callable[[str], str]
    tell: Callable[[str], None]
    paste: Callable[[], str]


@dataclass(frozen=True)
class Again:
    """A message that is to be answered now."""

    message: str


@dataclass(frozen=True)
class Command:
    """run: None ends the conversation
    complete: gives the words that may stand behind the name; "files" for names of files
    alias: other names, with spaces between
    task: what the model must have been trained for (run_dir.TASKS)"""

    meaning: str
    run: Callable[[Session, str, User], str | Again] | None
    complete: Callable[[Session], list[str]] | Literal["files"] | None = None
    alias: str = ""
    task: str = ""


def do_reference(session: Session, value: str, user: User) -> str:
    talk = session.talk
    text = {"": talk.reference, "-": ""}.get(value)
    return talk.set_reference(read_reference(value) if text is None else text)


def do_wiki(session: Session, term: str, user: User) -> str:
    """From the index on the disk; from the network only where there is none."""
    if not term:
        raise ConfigError("应为：/wiki 词条或问题")
    if session.retriever is None:
        user.tell("没有本地索引（python -m data_process.run wiki --index 可建），改为联网查询")
        return do_wikipedia(session, term, user)
    talk = session.talk
    found = session.retriever.article(term, talk.room * 2 // 3, talk.n_tokens)
    if not found.text:
        place = session.retriever.describe()
        return f"没有找到“{term}”（{place}）；资料不变。/wikipedia {term} 可联网查询"
    return f"{talk.set_reference(found.text)}\n（{found.citation}）"


def do_wikipedia(session: Session, term: str, user: User) -> str:
    url = session.wiki_url
    user.tell("正在查询维基百科…")
    found = look_up(term, url)
    while isinstance(found, Choices):
        lines = [
            f"“{found.term}”" + ("有多个含义：" if found.ambiguous else "没有词条，相近的有：")
        ]
        lines += [f"  {number} {title}" for number, title in enumerate(found.titles, 1)]
        user.tell("\n".join(lines))
        chosen = user.ask("编号（回车取消）：").strip()
        if chosen not in map(str, range(1, len(found.titles) + 1)):
            return "已取消"
        found = look_up(found.titles[int(chosen) - 1], url)
    said = session.talk.set_reference(found.text)
    return f"{said}\n（维基百科《{found.title}》，{found.url}，CC BY-SA）"


TITLE_REQUEST = "给下面的摘要写一个标题：\n"  # stands before the abstract in what /save keeps


def do_summary(session: Session, value: str, user: User) -> str:
    if not value:
        user.tell("粘贴摘要，回车结束：")
        value = user.paste()
    text = read_reference(value).strip()
    if not text:
        return "已取消"
    titles, n_read, _ = session.summarise(text)
    if titles:
        session.talk.turns.append((f"{TITLE_REQUEST}{text}", titles[0]))
    cut = f"\n（原文太长，只读了前 {n_read} 字）" * (n_read < len(text))
    return f"标题：{titles[0] if titles else '（空）'}{cut}"


def do_lora(session: Session, value: str, user: User) -> str:
    if value:
        session.use_adapter(None if value == "-" else value)
    names = [f"{name}（{place}）" for name, place in session.adapters.items()]
    return f"当前：{session.adapter or '基座'}；可用：{'、'.join(names) or '无'}"


SETTINGS = {field.name: field for field in fields(SamplingConfig) if field.name != "n"}


def do_set(session: Session, value: str, user: User) -> str:
    """Show the sampling settings, or change one."""
    name, _, text = value.partition(" ")
    if name and name not in SETTINGS:
        raise ConfigError(f"没有设置 {name!r}；有 {' '.join(SETTINGS)}")
    if text.strip():
        session.sampling = replace(session.sampling, **{name: setting(name, text.strip())})
    names = [name] if name else list(SETTINGS)
    return "\n".join(f"  {name} {getattr(session.sampling, name)}" for name in names)


def setting(name: str, text: str) -> Any:
    """A value as SamplingConfig holds it.

    raises: ConfigError if it is of another kind
    """
    kind = SETTINGS[name].type
    try:
        if name == "seed":
            return None if text in ("null", "-") else int(text)
        if name == "stop":
            return [] if text == "-" else text.split()
        return kind(text) if kind in (int, float) else text
    except ValueError:
        wanted = "整数" if kind is int or name == "seed" else "数"
        raise ConfigError(f"{name} 应为{wanted}，不是 {text!r}") from None


def do_retry(session: Session, value: str, user: User) -> Again:
    if not session.talk.turns:
        raise ConfigError("还没有可以重答的消息")
    message, _ = session.talk.turns.pop()
    session.talk.first = min(session.talk.first, len(session.talk.turns))
    return Again(message)


def do_reset(session: Session, value: str, user: User) -> str:
    session.talk.turns.clear()
    session.talk.first = 0
    return "对话已清空，资料保留" if session.talk.reference else "对话已清空"


def do_save(session: Session, value: str, user: User) -> str:
    path, turns = Path(value).expanduser(), session.talk.turns
    if not turns or not value or path.exists():
        found = f"{path} 已存在" if value and turns else "缺少文件名或对话为空"
        raise DataError(f"应为：/save 新文件名，在对话之后；{found}")
    write_rows(path, [{"id": "chat/1", "messages": session.talk.messages()}])
    return f"{len(turns)} 轮已存入 {path}"


def do_help(session: Session, value: str, user: User) -> str:
    lines = [f"  {name + ' ' + c.alias:<14}{c.meaning}" for name, c in offered(session).items()]
    return "\n".join([*lines, '  多行：行末写 \\ ，或以 """ 开始并以 """ 结束，或直接粘贴'])


COMMANDS = {
    "/资料": Command("文件或文字：让模型据此回答；不写则显示，- 清除", do_reference,
                    "files", "/ref", "reference"),
    "/wiki": Command("词条或问题：从本地索引取资料；没有索引则联网", do_wiki, task="reference"),
    "/wikipedia": Command("词条：联网取维基百科的序言作资料", do_wikipedia, task="reference"),
    "/总结": Command("文件或摘要：写一个标题；不写则提示粘贴", do_summary, "files", "/title /sum",
                   "title"),
    "/lora": Command("名字：换一个适配器；不写则列出，- 只用基座", do_lora,
                     lambda session: [*session.adapters, "-"]),
    "/set": Command("名 值：改采样设置，如 /set temperature 0.5；不写则全部显示", do_set,
                    lambda session: list(SETTINGS)),
    "/retry": Command("重新回答上一条消息", do_retry),
    "/reset": Command("清空对话", do_reset),
    "/save": Command("文件：把对话存成一行 JSON，格式与训练数据相同", do_save, "files"),
    "/help": Command("显示这些命令", do_help),
    "/quit": Command("退出，同 Ctrl-D；Ctrl-C 停止正在输出的回答", None, None, "/exit"),
}  # fmt: skip
NAMES = {alias: name for name, c in COMMANDS.items() for alias in (name, *c.alias.split())}


def offered(session: Session) -> dict[str, Command]:
    """The commands for what the model was trained for."""
    return {name: c for name, c in COMMANDS.items() if not c.task or c.task in session.tasks}


def obey(session: Session, line: str, user: User) -> str | Again | None:
    """Carry out a line that begins with "/", any other is a message; None ends the conversation.

    raises: ConfigError, DataError, WikiError and OSError with what to tell the user
    """
    if not line.startswith(("/", "／")):
        return Again(line)
    name, _, value = f"/{line[1:]}".strip().partition(" ")
    if name not in NAMES:
        raise ConfigError(f"没有命令 {name[:40]}；有 {' '.join(offered(session))}")
    command = COMMANDS[NAMES[name]]
    if NAMES[name] not in offered(session):
        raise ConfigError(f"这个模型没有学过 {name} 要做的事（model.yaml 的 tasks："
                          f"{'、'.join(session.tasks)}）；换一个模型")  # fmt: skip
    return command.run(session, value.strip(), user) if command.run else None


def completions(session: Session, before: str, word: str) -> list[str]:
    """What a word of a command may become; nothing in a message."""
    before, word = before.replace("／", "/", 1), word.replace("／", "/", 1)
    if not before.strip():
        names = [name for name, c in NAMES.items() if c in offered(session)]
        return [name for name in names if word.startswith("/") and name.startswith(word)]
    command = COMMANDS.get(NAMES.get(before.split()[0], ""))
    if command is None or command.complete is None or len(before.split()) > 1:
        return []
    if command.complete == "files":
        found = sorted(glob(escape(word) + "*"))
        return [path + "/" * Path(path).is_dir() for path in found]
    return [name for name in command.complete(session) if name.startswith(word)]
