"""Dialogues out of records: roles by any of their names, turns in any of their forms."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from itertools import cycle

from babyllama.rows import check_messages
from data_process.columns import COLUMNS, Refused, as_text
from data_process.raw import Record, as_row

NAMES = {
    "user": "user human usr speaker1 p1 prompter client customer patient student questioner q 用户"
    " 人类 问 提问 提问者 客户 顾客 买家 患者 学生 甲",
    "assistant": "assistant gpt chatgpt bot chatbot model ai agent sys speaker2 p2 counselor doctor"
    " teacher answerer claude bing gemini a 助手 助理 模型 机器人 答 回答 客服 卖家 医生 老师 乙",
    "system": "system developer 系统",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
TOOL_KEYS = ("tools", "tool_calls", "functions", "function_call")
SPEAKERS = ("from", "role", "speaker", "sender", "author", "角色")
CONTENTS = ("value", "content", "utterance", "message", "text", "parts", "内容")
# Both sides of a turn in one object: {"human": …, "assistant": …}, {"q": …, "a": …}.
ASKED = ("user", *COLUMNS["question"], "input")
ANSWERED = ("bot", "gpt", "moss", *COLUMNS["answer"])
LABEL = re.compile(r"\s*(\w{1,10})\s?[:：]\s*")
AROUND = " \t\r\n<|>:：[]【】#*"  # a role: 用户： and <|user|>


def dialogue(record: Record, messages: list[dict], **more: object) -> dict:
    """The row of a dialogue.

    A last question without an answer may stay: clean.py cuts and counts it.
    more: further keys of the row
    raises: Refused if the turns do not alternate, or one is empty
    """
    turns = [message for message in messages if message["role"] != "system"]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if reason := check_messages(turns) if turns else "no_answer":
        said_by = ", ".join(message["role"] for message in messages[:5]) or "nobody"
        raise Refused(reason, f"turns of {said_by}; wanted user and assistant in turn")
    return as_row(record, messages=messages, **more)


def labelled(
    pairs: Iterable[tuple[object, object]], roles: Mapping[str, str] | None = None
) -> list[dict]:
    """Messages of (label, content); labels stand in ROLES or in `roles`.

    raises: Refused that names a label which stands in neither
    """
    known = ROLES | {name.lower(): role for name, role in (roles or {}).items()}
    messages = []
    for label, content in pairs:
        name = str(label).strip(AROUND).lower()
        if name not in known:
            raise Refused(
                "unknown_role",
                f"role {label!r}; known are {', '.join(ROLES)}; say what it is with "
                f"--roles.{shlex.quote(name)} user (or assistant, or system)",
            )
        messages.append({"role": known[name], "content": as_text(content, f"a turn of {label!r}")})
    return messages


def in_turns(utterances: Iterable[object]) -> list[dict]:
    """Messages of two speakers who take turns; the first is the user."""
    sides = cycle(("user", "assistant"))
    return [
        {"role": side, "content": as_text(said, "a turn")}
        for side, said in zip(sides, utterances, strict=False)
    ]


def split_at_labels(label: re.Pattern[str], text: str) -> tuple[str, list[tuple[str, str]]]:
    """A text with marked turns, as what stands before the first mark and (label, content) pairs.

    label: finds a mark; its one group is the label
    """
    before, *rest = label.split(text)
    return before, list(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))


def messages_of(turns: object, roles: Mapping[str, str] | None = None) -> list[dict]:
    """Messages of a list of turns in any form.

    {"from" | "role": …, "value" | "content": …}, {"human": …, "assistant": …}, [question, answer],
    "text", "A: text", or {"turn_1": …}; turns without a role alternate, the first is the user's
    raises: Refused
    """
    if isinstance(turns, str):  # as parquet files hold them
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise Refused("wrong_type", "the turns: one text; wanted a list") from None
    turns = list(turns.values()) if isinstance(turns, dict) else turns
    if not isinstance(turns, list):
        raise Refused("wrong_type", f"the turns: {turns!r:.40}; wanted a list")
    found = [LABEL.match(turn) if isinstance(turn, str) else None for turn in turns]
    marks = [mark for mark in found if mark and mark[1].lower() in ROLES]
    if turns and len(marks) == len(turns):
        pairs = [(mark[1], turn[mark.end() :]) for mark, turn in zip(marks, turns, strict=True)]
    else:
        pairs = [pair for turn in turns for pair in _pairs(turn)]
    if any(label in TOOL_ROLES for label, _ in pairs):
        raise Refused("tools")
    if all(label is None for label, _ in pairs):
        return in_turns(said for _, said in pairs)
    return labelled(pairs, roles)


def _pairs(turn: object) -> list[tuple[str | None, object]]:
    """(speaker or None, content) of one turn, or of the two that stand in it."""
    if isinstance(turn, list) and len(turn) == 2:
        return [("user", turn[0]), ("assistant", turn[1])]
    if not isinstance(turn, dict):
        return [(None, turn)]
    if any(turn.get(key) for key in TOOL_KEYS):
        raise Refused("tools")
    turn = {str(key).lower(): value for key, value in turn.items()}
    speaker = next((turn[key] for key in SPEAKERS if key in turn), None)
    if speaker is not None:
        if not any(key in turn for key in CONTENTS):
            raise Refused("unknown_columns", f"a turn with {', '.join(turn)}; known for what is "
                          f"said are {', '.join(CONTENTS)}")  # fmt: skip
        return [(speaker, next(turn[key] for key in CONTENTS if key in turn))]
    asked = next((key for key in ASKED if key in turn), None)
    answered = next((key for key in ANSWERED if key in turn), None)
    if asked and answered:
        return [("user", turn[asked]), ("assistant", turn[answered])]
    said = next((key for key in CONTENTS if key in turn), None)
    if not said:
        raise Refused("unknown_columns", f"a turn with {', '.join(turn) or 'nothing'}; known are "
                      f"{', '.join(SPEAKERS)} with {', '.join(CONTENTS)}")  # fmt: skip
    return [(None, turn[said])]
