"""C3: reading questions from Chinese examinations, about texts (m) and dialogues (d).

A JSON list of [[line, …], [{"question", "choice": ["…", …], "answer"}], id]; the answer is the
text of a choice, not its letter. The lines are the reference text, the questions the turns. The
choices are not shown, since the model is to answer, not to choose; so a statement that is asked
as 正确 / 错误 stands alone as the user's turn.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse, with_ids
from data_process.datasets.squad import reference_rows
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "reference"
SOURCE = Source(
    home="github.com/nlpdata/c3",
    rows="11,869 / 3,816 questions (train / dev)",
    urls=tuple(
        f"https://raw.githubusercontent.com/nlpdata/c3/HEAD/data/c3-{kind}-{part}.json"
        for kind in "md"
        for part in ("train", "dev")
    ),
)
LICENSE = "research use"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a text."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        else:
            yield from with_ids(record, _rows(record))


def _rows(record: Record) -> Iterator[dict | Skip]:
    lines, questions, *_ = record.data if _is_entry(record.data) else ([], None)
    if not isinstance(questions, list) or not all(isinstance(q, dict) for q in questions):
        yield refuse(record, "wrong_type")
        return
    pairs = [(question.get("question"), question.get("answer")) for question in questions]
    yield from reference_rows(record, "\n".join(lines), pairs)


def _is_entry(data: object) -> bool:
    return (
        isinstance(data, list)
        and len(data) == 3
        and isinstance(data[0], list)
        and all(isinstance(line, str) for line in data[0])
    )
