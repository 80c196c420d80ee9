"""Documents: JSON objects with a text, plain lines, Markdown files, entries of Baidu Baike."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from data_process.columns import Fields, Refused, as_text
from data_process.raw import Record, as_row

CONTROL = re.compile(
    r"(?:(?:<\|im_start\|>(?:(?:system|user|assistant)\n)?|<\|(?:im_end|endoftext)\|>|</?s>|<unk>)\s*)+"
)


def text(record: Record, columns: Mapping[str, str] | None = None) -> dict:
    """A text with its title as first line, unless it begins with it. Control strings of chat
    formats, with which older minimind files glue samples, go."""
    fields = Fields(record, columns)
    if "text" not in fields:
        raise fields.unknown("text")
    body, title = CONTROL.sub("\n", fields.text("text")).strip(), fields.text("title")
    if not body:
        raise Refused("empty_text")
    whole = body if body.startswith(title) else f"{title}\n{body}"
    return as_row(record, text=whole, unused=fields.unused())


def line(record: Record) -> dict:
    """A line is a document."""
    if not isinstance(record.data, str):
        raise Refused("not_text", "an object; wanted a line of text", broken=True)
    return as_row(record, text=record.data.strip())


@functools.cache
def marks() -> list[tuple[re.Pattern[str], str]]:
    """What goes from Markdown, and what stands in its place."""
    found = yaml.safe_load(Path(__file__).with_name("markdown.yaml").read_text("utf-8"))
    return [(re.compile(pattern), instead) for pattern, instead in found]


def markdown(record: Record) -> dict:
    """A Markdown document, as a file or as {"path", "text"}.

    Headings become bare lines; marks of emphasis, links, images, notes and rules, comments and
    the authors' line go. Formulas, lists, tables and `code` stay as they are written.
    """
    text = record.data.get("text") if isinstance(record.data, dict) else None
    if not isinstance(text, str):
        raise Refused("wrong_type", "wanted a Markdown file, or a column text", broken=True)
    for pattern, instead in marks():
        text = pattern.sub(instead, text)
    if not text.strip():
        raise Refused("empty_text")
    return as_row(record, text=text.strip())


REFERENCE = re.compile(r"\[\d+(?:-\d+)?\]")
SPACES = re.compile(r"[^\S\n]+")


def baike(record: Record) -> dict:
    """Baidu Baike: {"title", "summary" or null, "sections": [{"title", "content"}], …}: a document
    is `title：summary`, then `title：content` of each section that has content."""
    data = record.data if isinstance(record.data, dict) else {}
    sections = data.get("sections") or []
    if not isinstance(sections, list) or not all(isinstance(s, dict) for s in sections):
        raise Refused("wrong_type", "column 'sections': wanted a list of objects", broken=True)
    pairs = [(data.get("title"), data.get("summary"))]
    pairs += [(section.get("title"), section.get("content")) for section in sections]
    parts = [tuple(_tidy(as_text(text, "a section")) for text in pair) for pair in pairs]
    if not parts[0][0] or not any(body for _, body in parts):
        raise Refused("no_body")
    # The entry's own title stays without a summary.
    lines = ["：".join(filter(None, part)) for n, part in enumerate(parts) if part[1] or n == 0]
    return as_row(record, text="\n".join(lines))


def _tidy(text: str) -> str:
    lines = SPACES.sub(" ", REFERENCE.sub("", text)).split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())
