"""Texts with a title or a summary: papers, news, LCSTS, NLPCC 2017, and your own files."""

import re
from collections.abc import Iterable, Iterator, Mapping

from data_process.columns import Fields, Refused
from data_process.raw import Record, Skip, as_row

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


# LCSTS as first published: PART_I.txt … of tagged lines, no XML: ids are unquoted, & and < are raw.
PART = re.compile(r"(?i)part_?(i{1,3})\b")
SPLITS = {"i": "train", "ii": "val", "iii": "test"}
TAG = re.compile(r"\s*</?(short_text|summary)>\s*")
LABEL = re.compile(r"\s*<human_label>\s*(\d{1,9})\s*</human_label>")
LOW_LABELS = ("0", "1", "2")
LEAD = re.compile(r"^【([^】]{1,40})】")
MOST_LINES = 100  # of a block; a longer one has lost its end


def lcsts(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One pair a block, or an object of the re-releases.

    Parts II and III carry a label from 1 to 5; pairs under 3 are left out, part II is the
    validation set, part III the test set. Some summaries of part III stand in part I too;
    de-duplication and decontamination see to them.
    """
    start, lines = None, []
    for record in records:
        if isinstance(record, Skip) or not isinstance(record.data, str):
            yield record if isinstance(record, Skip) else _short(record)
        elif record.data.lstrip().startswith("<doc"):
            if start:
                yield Skip("cut_block", start.where, " ".join(lines))
            start, lines = record, []
        elif not start or len(lines) > MOST_LINES:
            yield Skip("outside_block", record.where, record.data)
        elif record.data.strip() == "</doc>":
            yield _short(start._replace(data=_fields(lines)))
            start = None
        else:
            lines.append(record.data)
    if start:
        yield Skip("cut_block", start.where, " ".join(lines))


def _fields(lines: list[str]) -> dict:
    """The contents of a block's tags, and its label."""
    fields, inside = {}, ""
    for line in lines:
        if label := LABEL.match(line):
            fields["human_label"] = label[1]
        elif tag := TAG.fullmatch(line):
            inside = "" if "/" in line else tag[1]
            fields.setdefault(tag[1], "")
        elif inside:
            fields[inside] = f"{fields[inside]}\n{line.strip()}".strip()
    return fields


def _short(record: Record) -> dict | Skip:
    try:
        body, summary, _ = _pair(record, None)
        label = record.data.get("human_label")
        if str(label) in LOW_LABELS:
            raise Refused("low_label")
    except Refused as refused:
        return refused.skip(record)
    part = PART.search(record.where.rpartition(":")[0] or record.where)
    record = record._replace(split=SPLITS[part[1].lower()] if part else record.split)
    lead = LEAD.match(body)
    # Held-out texts stay as published, or scores could not be compared.
    if lead and lead[1] not in summary and record.split not in ("val", "test"):
        body = body[lead.end() :].strip() or body
    return as_row(record, text=body, summary=summary)
