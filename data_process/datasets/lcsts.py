"""LCSTS: short Weibo texts with summaries, as first published and in its re-releases.

PART_I.txt, PART_II.txt, PART_III.txt are blocks of tagged lines, no XML: ids are unquoted, & and <
are raw. Parts II and III carry a <human_label> from 1 to 5; pairs under 3 are left out, part II is
the validation set, part III the test set. Re-releases are JSON; their body is the first of BODIES
that a row has, its summary the first of SUMMARIES.

Not done here: some summaries of part III stand in part I too; de-duplication and decontamination
see to them.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "summary"
SPLIT_FILES = False  # a block has several lines
SOURCE = Source(
    home="icrc.hitsz.edu.cn (LCSTS 2.0, on application)",
    rows="2,400,591 / 8,685 / 725",
    size="903 MB",
    huggingface="hugcyp/LCSTS",
    files=("*.jsonl",),
)
LICENSE = "research only"

BODIES = ("short_text", "text", "content", "source", "article")
SUMMARIES = ("summary", "title", "target", "summarization")
PART = re.compile(r"(?i)part_?(i{1,3})\b")
SPLITS = {"i": "train", "ii": "val", "iii": "test"}
TAG = re.compile(r"\s*</?(short_text|summary)>\s*")
LABEL = re.compile(r"\s*<human_label>\s*(\d+)\s*</human_label>")
LEAST_LABEL = 3
LEAD = re.compile(r"^【([^】]{1,40})】")
MOST_LINES = 100  # of a block; a longer one has lost its end


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One pair a block, or an object."""
    start, lines = None, []
    for record in records:
        if isinstance(record, Skip) or not isinstance(record.data, str):
            yield record if isinstance(record, Skip) else _row(record, record.data)
        elif record.data.lstrip().startswith("<doc"):
            if start:
                yield Skip("cut_block", start.where, " ".join(lines))
            start, lines = record, []
        elif not start or len(lines) > MOST_LINES:
            yield Skip("outside_block", record.where, record.data)
        elif record.data.strip() == "</doc>":
            yield _row(start, _fields(lines))
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


def _row(record: Record, data: object) -> dict | Skip:
    if not isinstance(data, dict):
        return Skip("wrong_type", record.where, str(data))
    body = next((data[key] for key in BODIES if key in data), None)
    summary = next((data[key] for key in SUMMARIES if key in data), None)
    if not isinstance(body, str) or not isinstance(summary, str):
        return Skip("wrong_type", record.where, str(data))
    part = PART.search(record.where.rpartition(":")[0] or record.where)
    record = record._replace(split=SPLITS[part[1].lower()] if part else record.split)
    label = data.get("human_label")
    if label is not None and str(label).isdigit() and int(label) < LEAST_LABEL:
        return Skip("low_label", record.where, str(data), broken=False)
    body, summary = body.strip(), summary.strip()
    if not body or not summary:
        return Skip("empty_text", record.where, str(data), broken=False)
    lead = LEAD.match(body)
    # Held-out texts stay as published, or scores could not be compared.
    if lead and lead[1] not in summary and record.split not in ("val", "test"):
        body = body[lead.end() :].strip() or body
    return as_row(record, text=body, summary=summary)
