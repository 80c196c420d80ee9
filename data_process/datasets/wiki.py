"""Chinese Wikipedia, in any of the forms in which it is handed round.

JSON list        {"completion", "source"}          wikipedia-cn-20230720-filtered, simplified
JSON lines       {"id", "url", "title", "text"}    wiki_zh/AA/wiki_00, WikiExtractor --json
<doc …> blocks   WikiExtractor without --json

A document is its title and its paragraphs, one a line. WikiExtractor makes the text of a dump.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.clean import unescape
from data_process.raw import Record, Skip, as_row

LONGEST_PAGE = 10_000_000  # characters; MediaWiki itself stops at 2 MB
OPENING = re.compile(r"\s*<doc\s.*>\s*$")
TITLE = re.compile(r'\stitle="(.*)"')
CLOSING = re.compile(r"\s*</doc>\s*$")
# What a lost template leaves in brackets: （，）, （teapot，）, （）.
REST = re.compile(r"(?<=（)[\s，、；：。,;:]{1,20}|[\s，、；：,;:]{1,20}(?=）)")
EMPTY_BRACKETS = re.compile(r"（）|《》|「」|\([\s，、；：。,;:]+\)|(?<![A-Za-z_])\(\)")


def wiki(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document an object, or a block."""
    start, lines, size = None, [], 0
    for record in records:
        if isinstance(record, Skip) or not isinstance(record.data, str):
            yield record if isinstance(record, Skip) else _article(record)
        elif OPENING.match(record.data):
            if start:
                yield start.skip("cut_page", " ".join(lines[:3]), True)
            start, lines, size = record, [], 0
        elif start is None:
            yield record.skip("outside_page", broken=True)
        elif CLOSING.match(record.data):
            is_short = size <= LONGEST_PAGE
            yield _block(start, lines) if is_short else start.skip("page_too_long")
            start = None
        else:
            size += len(record.data)
            if size <= LONGEST_PAGE:
                lines.append(record.data)
    if start:
        yield start.skip("cut_page", " ".join(lines[:3]), True)


def _block(start: Record, lines: list[str]) -> dict | Skip:
    title = TITLE.search(start.data)
    return _document(start, unescape(title[1]).strip() if title else "", "\n".join(lines))


def _article(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    text, title = data.get("completion", data.get("text")), data.get("title", "")
    if not isinstance(text, str) or not isinstance(title, str):
        return record.skip(
            "wrong_type", "wanted texts in completion, or in title and text", broken=True
        )
    return _document(record, title.strip(), text)


def _document(record: Record, title: str, text: str) -> dict | Skip:
    text = EMPTY_BRACKETS.sub("", REST.sub("", text))
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if lines[:1] == [title]:
        del lines[0]
    if not lines:
        return record.skip("empty_text", title)
    return as_row(record, text="\n".join([title, *lines] if title else lines))
