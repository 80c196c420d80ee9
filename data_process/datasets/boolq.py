"""BoolQ: yes or no, from an English passage.

{"question", "passage", "answer": true}, SuperGLUE's `label`, or a packed `query` with `gold`. The
passage is the reference text, the answer 是 or 否. dev is what the benchmark scores: refused here.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse
from data_process.datasets.gsm8k import scored
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="github.com/google-research-datasets/boolean-questions",
    rows="9,427 (train)",
    huggingface="google/boolq",
    files=("data/train-*.parquet",),
    urls=("https://storage.googleapis.com/boolq/train.jsonl",),
)
LICENSE = "CC BY-SA 3.0"

REQUEST = "请用“是”或“否”回答。"
PACKED = re.compile(r"(?s)Passage: (.*)\n?Question: (.*?)\n?")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a question."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    passage, question = data.get("passage"), data.get("question")
    answer = data.get("answer", data.get("label", data.get("gold")))
    packed = PACKED.fullmatch(data["query"]) if isinstance(data.get("query"), str) else None
    if packed:
        passage, question = packed.groups()
    if not all(isinstance(text, str) and text.strip() for text in (passage, question)):
        return refuse(record, "wrong_keys")
    if answer not in (0, 1):  # true and false are these numbers
        return refuse(record, "no_answer", broken=False)
    asked = f"{question.strip().removesuffix('?')}？\n{REQUEST}"
    turns = in_turns([asked, "是" if answer else "否"])
    return dialogue(record, [{"role": "system", "content": passage.strip()}, *turns])
