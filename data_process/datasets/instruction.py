"""One question, one answer: Alpaca's and BELLE's {instruction, input, output} and relatives.

    {"instruction": "…", "input": "…", "output": "…"}     input may be missing, empty or "无输入"
    {"input": "…", "target": "…"}, {"prompt": "…", "response": "…"}

`history` (a list of [question, answer]) and `system` are understood beside these keys. A line
with a list of turns instead is read as conversations.py does it.
"""

import html
import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import LISTS, conversation, dialogue, in_turns, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home='your own files of {"instruction": …, "input": …, "output": …} (Alpaca, BELLE, Firefly)',
    manual="nothing to fetch: put your own files there",
)
LICENSE = "that of the files"

# Keys of the question's parts, key of the answer; the first answer present decides.
PAIRS = ((("instruction", "input"), "output"), (("instruction", "input"), "target"),
         (("prompt",), "response"))  # fmt: skip
# One Alpaca row in a hundred says in words that it has no input.
NO_INPUT = re.compile(
    r"\W*(?:(?:无|没有|无需|不需要)输入|no ?input)\W*|无|不适用|n/a", re.IGNORECASE
)
PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")  # in LLaMA-Factory's identity.json


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue an object, with earlier turns where it has a history."""
    for record in records:
        yield record if isinstance(record, Skip) else instruction(record)


def instruction(record: Record) -> dict | Skip:
    """The row of an object that holds a question and its answer."""
    data = record.data
    if not isinstance(data, dict):
        return refuse(record, "not_json")
    if any(key in data for key in LISTS):
        return conversation(record)
    found = next((pair for pair in PAIRS if pair[1] in data), None)
    if not found:
        return refuse(record, "wrong_keys")
    parts, answer = [data.get(key) or "" for key in found[0]], data[found[1]]
    history, system = data.get("history") or [], data.get("system") or ""
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        return refuse(record, "wrong_type")
    if not all(isinstance(text, str) for text in (*parts, answer, system)):
        return refuse(record, "wrong_type")
    if PLACEHOLDER.search(answer):
        return refuse(record, "placeholder", broken=False)
    if len(parts) == 2 and parts[0].strip() and NO_INPUT.fullmatch(html.unescape(parts[1]).strip()):
        parts.pop()
    question = "\n".join(part.strip() for part in parts if part.strip())
    persona = [{"role": "system", "content": system}] if system.strip() else []
    turns = [text for pair in [*history, (question, answer)] for text in pair]
    return dialogue(record, persona + in_turns(turns))


def _is_pair(turn: object) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
