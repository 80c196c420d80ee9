r"""MATH: English competition problems with solutions; the result stands in \boxed{…}.

{"problem", "level", "type", "solution"}, one file a problem or JSON lines. The test part is what
the benchmark scores: it is refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse
from data_process.datasets.gsm8k import asked, scored
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="github.com/hendrycks/math",
    rows="7,500 (train)",
    huggingface="EleutherAI/hendrycks_math",
    files=("*/train-*.parquet",),
)
LICENSE = "MIT"

REQUEST = "请写出解题过程，并把最后结果写在 \\boxed{} 里。"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a problem."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data
    if not isinstance(data, dict) or not isinstance(data.get("solution"), str):
        return refuse(record, "wrong_keys")
    if "\\boxed" not in data["solution"]:
        return refuse(record, "no_answer", broken=False)
    return asked(record, data.get("problem"), REQUEST, data["solution"])
