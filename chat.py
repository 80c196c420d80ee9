"""Talk to a checkpoint in the terminal.

    python chat.py                                  # the newest run in out/, else release/
    python chat.py out/redgpt                       # a run (its newest step) or one step of it
    python chat.py --prompt "你好"                   # one reply on stdout and nothing else
    python chat.py --prompt "作者是谁？" --reference text.txt
    python chat.py --prompt "你好" --json            # one JSON object a reply
    python chat.py < questions.txt                  # a conversation, one message a line
    python chat.py --title abstract.txt             # the title of a text; - is standard input
    python chat.py --retrieve                       # look each question up in the local index
    python chat.py out/base --lora a=out/csl_lora --lora b=out/redgpt_lora
    python chat.py out/redgpt --temperature 0       # always the likeliest token

In the conversation /help lists the commands: /资料 gives the model a text to answer from, /wiki
finds one in the local index (python -m data_process.run wiki --index), /总结 writes a title. Tab
completes them, the arrow keys bring back what was typed, in former sessions too (Windows: the
console's own editing, this session's lines, no Tab). Ctrl-C stops a reply, Ctrl-D leaves. With
neither a terminal nor lines to answer three short exchanges are shown. The session is
babyllama/chat/session.py's, the terminal terminal.py's; this file owns what the user sees when.
"""

import sys
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from babyllama.chat.commands import User, completions
from babyllama.chat.replies import (
    MISTAKES,
    answer_lines,
    answer_once,
    greet,
    piped_lines,
    respond,
    write_title,
)
from babyllama.chat.session import Session, choose_checkpoint, open_retriever
from babyllama.chat.terminal import Lines, paint, say, state_dir, visible, whole
from babyllama.checkpoint import load_model
from babyllama.config import parse, run
from babyllama.decoder import Weights
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError
from babyllama.retrieval.retriever import API_URL
from babyllama.sampling import SamplingConfig
from tokenizer import LABELS

EXAMPLES = ("你好", "你是谁？", "你喜欢什么？")


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """Settings of a chat.

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


def converse(session: Session) -> None:
    """Read, answer, repeat, until /quit, Ctrl-D, or Ctrl-C twice on an empty line."""
    lines = Lines(lambda before, word: completions(session, before, word), state_dir() / "history")
    user = User(lambda question: whole(input(question)), say, lambda: whole(lines.paste()))
    print(paint("输入文字即可对话；/help 显示命令，Ctrl-D 退出"))
    is_leaving = False
    while True:
        try:
            if is_leaving:  # here, where a second Ctrl-C is heard at once
                say("再按一次 Ctrl-C 退出")
            line = whole(lines.read(LABELS["user"]))
        except (KeyboardInterrupt, EOFError) as stopped:
            print()
            if is_leaving or isinstance(stopped, EOFError):
                return
            is_leaving = not lines.so_far()
            continue
        is_leaving = False
        try:
            if line.strip() and respond(session, line, user) is None:
                return
        except (KeyboardInterrupt, EOFError):
            say("\n已取消")
        except (*MISTAKES, OSError) as error:
            say(str(error), "31")


def main(cfg: ChatConfig) -> int:
    if cfg.prompt and cfg.title:
        raise ConfigError("--prompt and --title are two questions; give one of them")
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise ConfigError("--prompt is blank; give a message, or leave it out to talk")
    if cfg.n > 1:
        raise ConfigError(f"--n {cfg.n}: a chat has one reply to a message; leave it out")
    retriever = open_retriever(cfg.index, cfg.retrieve)
    checkpoint = choose_checkpoint(cfg.checkpoint, lora=cfg.lora)
    loaded = load_model(checkpoint, pick_device(cfg.device))
    session = Session(loaded, cfg, cfg.weights, cfg.lora, retriever, cfg.retrieve, cfg.wiki_url)
    place = sys.stderr if cfg.prompt or cfg.json or cfg.title else sys.stdout
    print(paint(visible(greet(session, cfg.index, cfg.reference), place), file=place), file=place)
    if cfg.title:
        return write_title(session, cfg.title, cfg.json)
    if cfg.prompt:
        return answer_once(session, cfg.prompt, cfg.json)
    if cfg.json:
        return answer_lines(session, piped_lines(), True)
    is_typed, is_seen = (file is not None and file.isatty() for file in (sys.stdin, sys.stdout))
    if is_typed and is_seen:
        converse(session)
        return 0
    lines = iter(()) if is_typed else piped_lines()
    first = next(lines, None)
    if first is None:
        session.sampling = replace(cfg, seed=cfg.seed or 0)
    return answer_lines(session, EXAMPLES if first is None else chain([first], lines), False)


if __name__ == "__main__":
    run(main, parse(ChatConfig, __doc__, positional=["checkpoint"]))
