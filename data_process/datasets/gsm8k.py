"""GSM8K: English word problems for schools, solved step by step.

{"question", "answer"}; the answer holds calculator notes, <<3+4=7>>, which go, and ends with
"#### 7", which becomes the project's "答案是7". The question is asked in Chinese, as bench/ does.
The test part is what the benchmark scores: it is refused here.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="github.com/openai/grade-school-math",
    rows="7,473 (train)",
    size="4 MB",
    huggingface="openai/gsm8k",
    files=("main/train-*.parquet",),
    urls=(
        "https://raw.githubusercontent.com/openai/grade-school-math/HEAD/"
        "grade_school_math/data/train.jsonl",
    ),
)
LICENSE = "MIT"

REQUEST = "请一步一步计算，最后写“答案是”和得数。"
CALCULATOR = re.compile(r"<<.*?>>")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a problem."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def scored(record: Record) -> Skip | None:
    """Why a record must not be learnt from: it stands in the part that a benchmark scores."""
    return refuse(record, "scored_part", broken=False) if record.split in ("val", "test") else None


def asked(record: Record, question: object, request: str, answer: object) -> dict | Skip:
    """The row of a question with a request behind it."""
    if not isinstance(question, str) or not question.strip():
        return refuse(record, "no_question")
    if not isinstance(answer, str) or not answer.strip():
        return refuse(record, "no_answer", broken=False)
    question = f"{question.strip()}\n{request}" if request else question.strip()
    return dialogue(record, in_turns([question, answer.strip()]))


def _row(record: Record) -> dict | Skip:
    data = record.data
    if not isinstance(data, dict) or not isinstance(data.get("answer"), str):
        return refuse(record, "wrong_keys")
    steps, mark, result = CALCULATOR.sub("", data["answer"]).rpartition("####")
    if not mark:
        return refuse(record, "no_answer", broken=False)
    answer = f"{steps.strip()}\n答案是{result.strip().replace(',', '')}"
    return asked(record, data.get("question"), REQUEST, answer)
