"""TriviaQA without its texts: quiz questions in English.

An entry of {"Data": […]} with Question and Answer.Value, or the parquet form in lower case. dev is
what the benchmark scores: refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse, with_ids
from data_process.datasets.gsm8k import asked, scored
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="nlp.cs.washington.edu/triviaqa",
    rows="95,000 questions",
    huggingface="mandarjoshi/trivia_qa",
    files=("rc.nocontext/train-*.parquet",),
    manual="unpack unfiltered-web-train.json or wikipedia-train.json of triviaqa-rc.tar.gz there",
)
LICENSE = "Apache-2.0 (code)"

REQUEST = "请用几个词回答。"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a question."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        elif skip := scored(record):
            yield skip
        else:
            entries = record.data.get("Data") if isinstance(record.data, dict) else None
            whole = entries if isinstance(entries, list) else [record.data]
            rows = (_row(record._replace(data=entry)) for entry in whole)
            yield from with_ids(record, rows, ".")


def _row(record: Record) -> dict | Skip:
    if not isinstance(record.data, dict):
        return refuse(record, "not_json")
    low = {str(key).lower(): value for key, value in record.data.items()}
    answer = low.get("answer")
    if isinstance(answer, dict):
        answer = {str(key).lower(): value for key, value in answer.items()}.get("value")
    return asked(record, low.get("question"), REQUEST, answer)
