"""CMRC 2018: questions about paragraphs of the Chinese Wikipedia.

    data/              a JSON list of {"context_text", "qas": [{"query_text", "answers": ["…"]}]}
    squad-style-data/  the layout of SQuAD

Its paragraphs also stand in the Wikipedia: a mixture with that holds them twice.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse, with_ids
from data_process.datasets.squad import first_answer, reference_rows, squad_rows
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "reference"
SOURCE = Source(
    home="github.com/ymcui/cmrc2018",
    rows="10,142 / 3,219 / 1,002 questions",
    urls=(
        "https://paddlenlp.bj.bcebos.com/datasets/cmrc/cmrc2018_train.json",
        "https://raw.githubusercontent.com/ymcui/cmrc2018/HEAD/data/cmrc2018_dev.json",
        "https://raw.githubusercontent.com/ymcui/cmrc2018/HEAD/data/cmrc2018_trial.json",
    ),
)
LICENSE = "CC BY-SA 4.0"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a paragraph."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        else:
            yield from with_ids(record, _rows(record))


def _rows(record: Record) -> Iterator[dict | Skip]:
    if not isinstance(record.data, dict) or "context_text" not in record.data:
        yield from squad_rows(record)
        return
    qas = record.data.get("qas")
    if not isinstance(qas, list) or not all(isinstance(qa, dict) for qa in qas):
        yield refuse(record, "wrong_keys")
        return
    pairs = [(qa.get("query_text"), first_answer(qa.get("answers"))) for qa in qas]
    yield from reference_rows(record, record.data["context_text"], pairs)
