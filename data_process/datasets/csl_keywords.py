"""CSL, keywords: which words describe a paper. The layouts are those of csl.py."""

from collections.abc import Iterable, Iterator

from data_process.datasets.csl import LICENSE, SOURCE, papers
from data_process.raw import Record, Skip, as_row

__all__ = ["LICENSE", "SOURCE", "read"]

KIND = "chat"
QUESTION = "请列出下面这篇论文的关键词："


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a paper: abstract, a space and the title, as in benchmark/kg; then keywords."""
    for record, paper in papers(records, "abstract", "keywords"):
        if isinstance(paper, Skip):
            yield paper
        else:
            text = " ".join(paper[key] for key in ("abstract", "title") if key in paper)
            yield dialogue(record, f"{QUESTION}\n{text}", "、".join(paper["keywords"]))


def dialogue(record: Record, question: str, answer: str) -> dict:
    """A row of one question and one answer."""
    turns = (("user", question), ("assistant", answer))
    return as_row(record, messages=[{"role": r, "content": c.strip()} for r, c in turns])
