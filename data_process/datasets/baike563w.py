"""Baidu Baike, 5.63 million entries as JSON lines.

{"title", "summary" or null, "sections": [{"title", "content"}], "tags", "url"}. A document is
`title：summary`, then `title：content` of each section. Reference marks such as [1-2] go, and so do
sections without content.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "text"
SOURCE = Source(
    home="github.com/DLLXW/baby-llama2-chinese",
    rows="5,634,898",
    size="16.8 GB",
    huggingface="xuqinyang/BaiduBaike-5.63M",
    modelscope="fq980207/563w_baidubaike",
)
LICENSE = "none stated; scraped, for private study only"

REFERENCE = re.compile(r"\[\d+(?:-\d+)?\]")
SPACES = re.compile(r"[^\S\n]+")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document an entry."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    title, summary = data.get("title"), data.get("summary") or ""
    sections = data.get("sections") or []
    good = isinstance(sections, list) and all(isinstance(s, dict) for s in sections)
    pairs = [(title, summary)]
    pairs += [(s.get("title") or "", s.get("content") or "") for s in sections] if good else []
    if not good or not all(isinstance(text, str) for pair in pairs for text in pair):
        return Skip("wrong_type", record.where, str(record.data))
    parts = [(_tidy(head), _tidy(body)) for head, body in pairs]
    if not parts[0][0] or not any(body for _, body in parts):
        return Skip("no_body", record.where, str(record.data), broken=False)
    lines = [
        "：".join(filter(None, part)) for n, part in enumerate(parts) if part[1] or n == 0
    ]  # the entry's own title stays without a summary
    return as_row(record, text="\n".join(lines))


def _tidy(text: str) -> str:
    lines = SPACES.sub(" ", REFERENCE.sub("", text)).split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())
