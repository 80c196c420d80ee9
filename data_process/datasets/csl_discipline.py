"""CSL, disciplines: to which of 67 a paper belongs, by its abstract. Layouts as in csl.py.

FewCLUE's csldcp ({"content" or "abst", "label"}) is read as well.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.csl import LICENSE, SOURCE, papers
from data_process.datasets.csl_keywords import dialogue
from data_process.raw import Record, Skip

__all__ = ["LICENSE", "SOURCE", "read"]

KIND = "chat"
QUESTION = "下面这篇论文摘要属于哪个学科？"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a paper."""
    for record, paper in papers(records, "abstract", "discipline"):
        if isinstance(paper, Skip):
            yield paper
        else:
            yield dialogue(record, f"{QUESTION}\n{paper['abstract']}", paper["discipline"])
