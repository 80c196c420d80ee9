"""NLPCC 2017, task 3: news of Toutiao with one-sentence summaries.

First publication: lines of {"summarization", "article"} with <Paragraph> marks; the articles of
train_without_summ.txt have no summary and are left out. Re-release: a list of {"title",
"content"}, bare or inside {"version", "data"}, where the title is the summary.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "summary"
SOURCE = Source(
    home="tcci.ccf.org.cn/conference/2017 (shared task 3)",
    rows="50,000 (re-release)",
    size="146 MB",
    huggingface="supremezxc/nlpcc_2017",
    files=("nlpcc_data.json",),
)
LICENSE = "openrail (card of the re-release); none stated by the organisers"

BODIES = ("article", "content", "text")
SUMMARIES = ("summarization", "summary", "title")
PARAGRAPH = re.compile(r"(?:<Paragraph>\s*)+")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One pair an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    body = next((data[key] for key in BODIES if key in data), None)
    summary = next((data[key] for key in SUMMARIES if key in data), "")
    if not isinstance(body, str) or not isinstance(summary, str):
        return Skip("wrong_type", record.where, str(record.data))
    body = PARAGRAPH.sub("\n", body).strip()
    if not body or not summary.strip():
        reason = "no_summary" if body else "empty_text"
        return Skip(reason, record.where, str(data), broken=False)
    return as_row(record, text=body, summary=PARAGRAPH.sub(" ", summary).strip())
