"""QuAC: dialogues about an English text; the answers are taken from it.

{"data": [{"paragraphs": [{"context", "qas": [{"question", "orig_answer": {"text"}}]}]}]}. Where
the text does not say, the publisher writes CANNOTANSWER: 无法回答 here, so that a model learns to
say it. val is what the benchmark scores: refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse, with_ids
from data_process.datasets.gsm8k import scored
from data_process.datasets.squad import reference_rows
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="quac.ai",
    rows="11,567 dialogues (train)",
    urls=("https://s3.amazonaws.com/my89public/quac/train_v0.2.json",),
)
LICENSE = "CC BY-SA 4.0"

NO_ANSWER = "CANNOTANSWER"
UNKNOWN = "无法回答"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a text, or more where it has many questions."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        elif skip := scored(record):
            yield skip
        else:
            yield from with_ids(record, _rows(record))


def _rows(record: Record) -> Iterator[dict | Skip]:
    try:
        articles = record.data.get("data", [record.data])
        found = [
            (p["context"].removesuffix(NO_ANSWER), [_pair(qa) for qa in p["qas"]])
            for article in articles
            for p in article["paragraphs"]
        ]
    except (AttributeError, KeyError, TypeError):
        yield refuse(record, "wrong_keys")
        return
    for context, pairs in found:
        yield from reference_rows(record, context, pairs)


def _pair(qa: dict) -> tuple[object, object]:
    answer = qa["orig_answer"]["text"]
    return qa["question"], UNKNOWN if answer == NO_ANSWER else answer
