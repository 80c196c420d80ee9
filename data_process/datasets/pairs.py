"""Texts with a title or a summary: papers, news, LCSTS, NLPCC 2017, and your own files."""

import re
from collections.abc import Mapping

from data_process.columns import Fields, Refused
from data_process.raw import Record, as_row

PARAGRAPH = re.compile(r"(?:<Paragraph>\s*)+")


def pair(record: Record, columns: Mapping[str, str] | None = None) -> dict:
    """{"text", "summary", "keywords"?} by any of their names (columns.py)."""
    text, summary, fields = _pair(record, columns)
    words = fields.value("keywords")
    words = re.split(r"[;；,，、_\s]+", words) if isinstance(words, str) else words or []
    meta = {"meta": {"keywords": [str(word) for word in words if str(word).strip()]}}
    return as_row(
        record, text=text, summary=summary, unused=fields.unused(), **(meta if words else {})
    )


def _pair(record: Record, columns: Mapping[str, str] | None) -> tuple[str, str, Fields]:
    fields = Fields(record, columns)
    if not ("text" in fields and "summary" in fields):
        raise fields.unknown("text", "summary")
    text, summary = fields.text("text"), fields.text("summary")
    if not text or not summary:
        raise Refused("no_summary" if text else "no_text")
    return text, summary, fields


def news(record: Record, columns: Mapping[str, str] | None = None) -> dict:
    """An article with its headline; some collections hold "\\n" as two characters."""
    title_first = {"summary": "title"} if isinstance(record.data, dict) and (
        "title" in record.data) else {}  # fmt: skip
    body, title, _ = _pair(record, title_first | dict(columns or {}))
    return as_row(record, text=body.replace("\\n", "\n"), summary=title.replace("\\n", " "))


def joined(row: dict) -> dict:
    """An article and its headline as one document: the last step of sets of news."""
    return {"id": row["id"], "text": f"{row['summary']}\n{row['text']}"}


def nlpcc(record: Record) -> dict:
    """NLPCC 2017: {"summarization", "article"} with <Paragraph> marks, or {"title", "content"}."""
    text, summary, _ = _pair(record, None)
    text = PARAGRAPH.sub("\n", text).strip()
    if not text:
        raise Refused("no_text")
    return as_row(record, text=text, summary=PARAGRAPH.sub(" ", summary).strip())


LOW_LABELS = ("0", "1", "2")
LEAD = re.compile(r"^【([^】]{1,40})】")


def lcsts(record: Record) -> dict:
    """LCSTS in its re-releases; pairs of the held-out parts with a label under 3 of 5 are left out.

    Some summaries of the test part stand in the training part too; de-duplication and
    decontamination see to them.
    """
    body, summary, _ = _pair(record, None)
    if str(record.data.get("human_label")) in LOW_LABELS:
        raise Refused("low_label")
    lead = LEAD.match(body)
    # Held-out texts stay as published, or scores could not be compared.
    if lead and lead[1] not in summary and record.split not in ("val", "test"):
        body = body[lead.end() :].strip() or body
    return as_row(record, text=body, summary=summary)
