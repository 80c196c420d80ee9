"""NaturalQuestions, open: facts asked in English, answered in a few words.

{"question", "answer": [any of these]}; the first answer is learnt. dev is what the benchmark
scores: refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse
from data_process.datasets.gsm8k import asked, scored
from data_process.datasets.squad import first_answer
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="github.com/google-research-datasets/natural-questions",
    rows="87,925 (train)",
    urls=(
        "https://raw.githubusercontent.com/google-research-datasets/natural-questions/HEAD/"
        "nq_open/NQ-open.train.jsonl",
    ),
)
LICENSE = "CC BY-SA 3.0"

REQUEST = "请用几个词回答。"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a question."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def _row(record: Record) -> dict | Skip:
    if not isinstance(record.data, dict):
        return refuse(record, "not_json")
    question, answer = record.data.get("question"), first_answer(record.data.get("answer"))
    question = f"{question.strip()}？" if isinstance(question, str) and question.strip() else None
    return asked(record, question, REQUEST, answer)
