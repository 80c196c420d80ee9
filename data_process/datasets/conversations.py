"""Lists of turns: ShareGPT, minimind's dialogue files and relatives.

    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversation": [{"human": "…", "assistant": "…"}]}           both sides in one turn

Any name of the list goes with any form of its turns. Dialogues that call tools are left out.
Below `read` stand the parts that all readers of dialogues share.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import cycle

from babyllama.rows import check_messages
from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home='your own files of {"conversations": [{"from" | "role": …, "value" | "content": …}]}',
    manual="nothing to fetch: put your own files there",
)
LICENSE = "that of the files"

LISTS = ("conversations", "conversation", "messages")
CONTENTS = ("value", "content", "utterance")
ROLES = {"system": "system", "user": "user", "human": "user", "speaker1": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
         "bot": "assistant", "speaker2": "assistant"}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "observation")
TOOL_KEYS = ("tools", "tool_calls", "functions", "function_call")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue an object."""
    for record in records:
        yield record if isinstance(record, Skip) else conversation(record)


def conversation(record: Record) -> dict | Skip:
    """The row of an object that holds a list of turns."""
    if not isinstance(record.data, dict):
        return refuse(record, "not_json")
    turns = next((record.data[key] for key in LISTS if key in record.data), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return refuse(record, "wrong_type")
    pairs = [pair for turn in turns for pair in _pairs(turn)]
    uses_tools = any(role in TOOL_ROLES for role, _ in pairs)
    if uses_tools or any(part.get(key) for part in (record.data, *turns) for key in TOOL_KEYS):
        return refuse(record, "tools", broken=False)
    return dialogue(record, labelled(pairs))


def _pairs(turn: dict) -> list[tuple[str, object]]:
    """Role and content of one turn; {"human": …, "assistant": …} holds two."""
    if "human" in turn and "assistant" in turn:
        return [(role, turn[role]) for role in ("human", "assistant")]
    role = str(turn.get("from", turn.get("role"))).lower()
    return [(role, next((turn[key] for key in CONTENTS if key in turn), None))]


def refuse(record: Record, reason: str, broken: bool = True) -> Skip:
    """The Skip of a record that becomes no row."""
    return Skip(reason, record.where, str(record.data), broken)


def dialogue(record: Record, messages: list[dict]) -> dict | Skip:
    """The row of a dialogue, or why it is none.

    A last question without an answer may stay: clean.py cuts and counts it. A system turn
    counts for nothing here.
    """
    if not all(isinstance(message["content"], str) for message in messages):
        return refuse(record, "wrong_type")
    turns = [message for message in messages if message["role"] != "system"]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    reason = check_messages(turns) if turns else "no_answer"
    return refuse(record, reason, broken=False) if reason else as_row(record, messages=messages)


def labelled(pairs: Iterable[tuple[str, object]]) -> list[dict]:
    """Messages of (label, content); labels stand in ROLES, an unknown one stays as it is."""
    return [{"role": ROLES.get(label.lower(), label), "content": text} for label, text in pairs]


def in_turns(utterances: Iterable[object]) -> list[dict]:
    """Messages of two speakers who take turns; the first is the user."""
    roles = cycle(("user", "assistant"))
    return [{"role": r, "content": u} for r, u in zip(roles, utterances, strict=False)]


def split_at_labels(label: re.Pattern[str], text: str) -> tuple[str, list[tuple[str, str]]]:
    """A text with marked turns, as what stands before the first mark and (label, content) pairs.

    label: finds a mark; its one group is the label
    """
    before, *rest = label.split(text)
    return before, list(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))


def with_ids(record: Record, rows: Iterable[dict | Skip], mark: str = "-") -> Iterator[dict | Skip]:
    """The rows of one record under the ids n, n-1, n-2 …

    Rows that share a text stay in one part of the set; with the mark "." they are split one by one.
    """
    n_rows = 0
    for row in rows:
        if isinstance(row, Skip):
            yield row
        else:
            yield row | {"id": f"{record.n}{mark}{n_rows}"} if n_rows else row
            n_rows += 1
