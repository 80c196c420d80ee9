"""Lists of turns: ShareGPT, minimind's dialogue files and relatives."""

from collections.abc import Iterator
from pathlib import Path

from data_process.raw import Record, Skip, as_row, records

KIND = "chat"
SOURCE = 'your own files of {"conversations": [{"from" | "role": …, "value" | "content": …}]}'
LICENSE = "that of the files"

LISTS = ("conversations", "conversation", "messages")
ROLES = {"system": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant"}  # fmt: skip


def read(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One dialogue an object."""
    for record in records(raw_dir, encoding):
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    if not isinstance(record.data, dict):
        return Skip("not_json", record.where, record.data)
    turns = next((record.data[key] for key in LISTS if key in record.data), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Skip("wrong_type", record.where, str(record.data))
    messages = [message for turn in turns for message in _messages(turn)]
    if record.data.get("tools") or any(m["role"] in ("tool", "function") for m in messages):
        return Skip("tools", record.where, str(record.data), broken=False)
    if not all(isinstance(m["content"], str) for m in messages):
        return Skip("wrong_type", record.where, str(record.data))
    if not all(m["role"] in ROLES for m in messages):
        return Skip("unknown_role", record.where, str(record.data), broken=False)
    named = [m | {"role": ROLES[m["role"]]} for m in messages]
    return as_row(record, messages=named)


def _messages(turn: dict) -> list[dict]:
    """The messages of one turn; {"human": …, "assistant": …} holds two."""
    if "human" in turn and "assistant" in turn:
        return [{"role": role, "content": turn[role]} for role in ("human", "assistant")]
    role = str(turn.get("from", turn.get("role"))).lower()
    return [{"role": role, "content": turn.get("value", turn.get("content"))}]
