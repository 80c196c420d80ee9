"""CSL, categories: to which of 13 branches a paper belongs, by its title. Layouts as in csl.py."""

from collections.abc import Iterable, Iterator

from data_process.datasets.csl import LICENSE, SOURCE, papers
from data_process.datasets.csl_keywords import dialogue
from data_process.raw import Record, Skip

__all__ = ["LICENSE", "SOURCE", "read"]

KIND = "chat"
QUESTION = "下面这个论文标题属于哪个学科门类？"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a paper."""
    for record, paper in papers(records, "title", "category"):
        if isinstance(paper, Skip):
            yield paper
        else:
            yield dialogue(record, f"{QUESTION}\n{paper['title']}", paper["category"])
