"""Llama-Chinese: dialogues in that project's own prompt format, one in a cell of a CSV file.

Column `text`: "<s>Human: …\\n</s><s>Assistant: …\\n</s>", for as many turns as there are.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, labelled, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
LAYOUT = "csv"
SOURCE = Source(
    home="github.com/LlamaFamily/Llama-Chinese",
    rows="200 (dev_sft.csv), 200 (dev_sft_sharegpt.csv)",
    urls=tuple(
        f"https://raw.githubusercontent.com/LlamaFamily/Llama-Chinese/HEAD/data/{name}.csv"
        for name in ("dev_sft", "dev_sft_sharegpt")
    ),
)
LICENSE = "none stated"

TURN = re.compile(r"\s*<s>(Human|Assistant):(.*?)</s>\s*", re.DOTALL)


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a cell."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    text = record.data.get("text") if isinstance(record.data, dict) else None
    if not isinstance(text, str):
        return refuse(record, "wrong_keys")
    if TURN.sub("", text).strip():
        return refuse(record, "text_outside_turns")
    return dialogue(record, labelled((label, turn.strip()) for label, turn in TURN.findall(text)))
