"""LCCC: short dialogues from Weibo, cleaned by rules.

    {"train": [["…", "…"], …], "valid": …, "test": …}   one object (toy data, older releases)
    [["…", "…"], …]                                     a list of dialogues (base, large)
    ["…", "…"]                                          one dialogue a line (silver/lccc)

Speakers take turns, and the first is the user. Every text is published with spaces between its
characters or words. They are taken out again, but for those between Latin words.
"""

import json
import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse, with_ids
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home="github.com/thu-coai/CDial-GPT",
    rows="6.8 million (base), 12.0 million (large)",
    huggingface="silver/lccc",
    files=("lccc_base_*.jsonl.gz",),
)
LICENSE = "MIT"

PARTS = {"test": "test", "valid": "val", "train": "train"}  # held-out parts are read first
INNER_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a list of utterances."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        else:
            yield from with_ids(record, _rows(record), ".")


def _rows(record: Record) -> Iterator[dict | Skip]:
    if isinstance(record.data, dict):
        parts = {key: record.data[key] for key in PARTS if isinstance(record.data.get(key), list)}
        if not parts:
            yield refuse(record, "wrong_keys")
        for key, dialogues in parts.items():
            for turns in dialogues:
                yield _row(record._replace(split=PARTS[key], data=turns))
    elif isinstance(record.data, str):
        yield _row(record._replace(data=_parsed(record.data)))
    else:
        yield _row(record)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _row(record: Record) -> dict | Skip:
    turns = record.data
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        return refuse(record, "wrong_type")
    return dialogue(record, in_turns(map(_joined, turns)))


def _joined(text: str) -> str:
    words = text.split()
    if all(len(word) == 1 for word in words):  # spaced by characters, Latin words too
        return "".join(words)
    return INNER_SPACE.sub("", text)
