"""Documents: JSON objects with a text, plain lines, Markdown files, entries of Baidu Baike."""

import re
from collections.abc import Mapping

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


def markdown(record: Record) -> dict:
    """A Markdown document, as a file or as {"path", "text"}.

    Headings become bare lines; marks of emphasis, links, images, notes and rules, comments and
    the authors' line go. Formulas, lists, tables and `code` stay as they are written.
    """
    text = record.data.get("text") if isinstance(record.data, dict) else None
    if not isinstance(text, str):
        raise Refused("wrong_type", "wanted a Markdown file, or a column text", broken=True)
    for pattern, instead in MARKS:
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
    lines = [
        "：".join(filter(None, part)) for n, part in enumerate(parts) if part[1] or n == 0
    ]  # the entry's own title stays without a summary
    return as_row(record, text="\n".join(lines))


def _tidy(text: str) -> str:
    lines = SPACES.sub(" ", REFERENCE.sub("", text)).split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())
