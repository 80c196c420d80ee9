"""Ape210k: Chinese word problems for primary schools with equation and result.

{"id", "segmented_text", "original_text", "ans", "equation"}; the answer of the dialogue is the
equation, then "答案是" and the result. valid and test are what the benchmark uses: refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse
from data_process.datasets.gsm8k import asked, scored
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home="github.com/Chenny0808/ape210k",
    rows="200,488 (train)",
    urls=("https://raw.githubusercontent.com/Chenny0808/ape210k/HEAD/data/train.ape.json",),
)
LICENSE = "none stated"

REQUEST = "请列出算式，再写出得数。"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a problem."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data
    if not isinstance(data, dict):
        return refuse(record, "not_json")
    equation, result = data.get("equation"), data.get("ans")
    if not isinstance(equation, str) or not isinstance(result, str):
        return refuse(record, "wrong_keys")
    if not equation.strip() or not result.strip():
        return refuse(record, "no_answer", broken=False)
    answer = f"{equation.strip()}\n答案是{result.strip()}"
    return asked(record, data.get("original_text"), REQUEST, answer)
