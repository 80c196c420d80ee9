"""Markdown documents, as files or as {"path", "text"}: Chinese law, text books such as OI-wiki.

Headings become bare lines; marks of emphasis, links, pictures, notes and rules, comments and the
authors' line go. Formulas, lists, tables and `code` stay as they are written.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "text"
SOURCE = Source(
    home="github.com/LawRefBook/Laws",
    manual="git clone the repository into data/raw/law",
)
LICENSE = "none stated; statutes and judicial interpretations are outside copyright in China"

# Lengths are bounded, so that a text full of opening marks costs no more than its length.
MARKS = (
    (re.compile(r"<!--.{0,200}?-->", re.DOTALL), ""),
    (re.compile(r"\A\s*author:[^\n]*\n"), ""),
    (re.compile(r"^>[ \t]?", re.MULTILINE), ""),
    (re.compile(r"^#{1,6}[ \t]+([^\n]{0,300}?)[ \t]{0,3}#{0,6}$", re.MULTILINE), r"\1"),
    (re.compile(r"^[ \t]*(?:[-*_][ \t]*){3,}$", re.MULTILINE), ""),
    (
        re.compile(r'^[?!]{3}\+?[ \t]+\w+[ \t]*"?([^"\n]{0,300})"?$', re.MULTILINE),
        r"\1",
    ),  # ??? note "…"
    (re.compile(r" ?:numref:`[^`\n]{0,99}`"), "上文"),  # d2l: references, formulas, other marks
    (re.compile(r" ?:eqref:`[^`\n]{0,99}`"), "上式"),
    (re.compile(r" ?:[a-z]{1,9}:`[^`\n]{0,99}`"), ""),
    (re.compile(r"!\[(?:\\.|[^\]\\\n]){0,100}\]\([^)\n]{0,300}\)"), ""),
    (re.compile(r"\[((?:\\.|[^\]\\\n]){0,100})\]\([^)\n]{0,300}\)"), r"\1"),
    (re.compile(r"[(\[~]\*\*(.{1,200}?)\*\*[)\]~]", re.DOTALL), r"\1"),  # d2l: [**key words**]
    (re.compile(r"(?<![A-Za-z0-9^{)*])\*\*(?![\s*])([^*\n]{1,300})(?<!\s)\*\*(?!\*)"), r"\1"),
    # A * in a formula has one of these signs beside it.
    (re.compile(r"(?<![A-Za-z0-9^_{}()*\\$|,])\*(\w[\w -]{0,30})\*(?![A-Za-z0-9^_*])"), r"\1"),
    (re.compile(r"\n\s*\n"), "\n"),
)


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    text = record.data.get("text") if isinstance(record.data, dict) else None
    if not isinstance(text, str):
        return Skip("wrong_type", record.where, str(record.data))
    for pattern, instead in MARKS:
        text = pattern.sub(instead, text)
    if not text.strip():
        return Skip("empty_text", record.where, str(record.data), broken=False)
    return as_row(record, text=text.strip())
