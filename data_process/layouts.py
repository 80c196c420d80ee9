"""The layouts of an uncompressed text file: JSON lines, a JSON list, one object, CSV, plain lines,
and Markdown, whose files are one document each.

Each is a function (name, text) -> Iterator[(place, dict | list | line | Skip)] that streams:
memory is bounded by the longest line or list element (LONGEST), and damage costs the line or
element it stands in.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from babyllama.errors import DataError

HEAD = 1 << 20  # bytes from which encoding and layout are guessed, and by which lists are read
LONGEST = 1 << 25  # characters of a line or of a list's element
WRAPPERS = ("data", "examples", "rows")  # {"data": [...]}: the rows are inside
SURROGATE = re.compile("[\ud800-\udfff]")


class Skip(NamedTuple):
    """A row that is left out before cleaning: why, where it stood and how it began.

    broken: the line itself is damaged, which counts against --max_bad
    """

    reason: str
    where: str
    sample: str
    broken: bool = True


def layout_of(head: bytes, encoding: str, name: str = "") -> str:
    """Which of LAYOUTS a file has: Markdown by its name, else from its first lines with text."""
    if name.lower().endswith(".md"):
        return "document"
    lines = (line.strip() for line in io.StringIO(head.decode(encoding, "replace"), newline="\n"))
    first = list(islice(filter(None, lines), 5))
    values = [_parse(line) for line in first]
    if any(isinstance(value, dict) for value in values):
        alone = len(first) == 1 and any(isinstance(values[0].get(key), list) for key in WRAPPERS)
        return "object" if alone else "lines"
    if first and re.match(r'\[\s*([{\[]|$)|\{\s*("|$)', first[0]):
        return "list" if first[0][0] == "[" else "object"
    return "text"


def _parse(text: str) -> Any:
    """The JSON value of a text; a Skip's reason (str) if it has none that can be used."""
    try:
        value = json.loads(text)
    except RecursionError:
        return "too_deep"
    except ValueError:  # broken JSON, and numbers of more than 4,300 digits
        return "broken_json"
    return _usable(value, text, dict)


def _usable(value: Any, text: str, kinds: Any) -> Any:
    if not isinstance(value, kinds):
        return "not_an_object"
    # Half a character, as the escape "\ud83d" leaves it, can be neither written nor encoded.
    if HALF.search(text) and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return "lone_surrogate"
    return value


HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _lines(name: str, text: io.TextIOBase, parse: bool = True) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := text.readline(LONGEST):
        number += 1
        place = f"{name}:{number}"
        if len(line) == LONGEST and line[-1] != "\n":
            while (rest := text.readline(LONGEST)) and rest[-1] != "\n":
                pass
            yield place, Skip("line_too_long", place, line[:200])
            continue
        line = line.rstrip("\r\n")
        if SURROGATE.search(line):
            yield place, Skip("bad_bytes", place, line)
        elif line.strip():
            yield place, _or_skip(_parse(line), place, line) if parse else line


def _or_skip(value: Any, place: str, text: str) -> Any:
    return Skip(value, place, text) if isinstance(value, str) else value


BETWEEN = re.compile(r"[\s,]*")
NEXT = {"{": re.compile(r"[}\]]\s*,\s*(?={)"), "[": re.compile(r"\]\s*,\s*(?=\[)")}


def _list(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON list, read piece by piece.

    After a broken element, reading goes on where the next one seems to begin.
    """
    decode = json.JSONDecoder().raw_decode
    window = _Window(text)
    window.at = window.text.index("[") + 1
    number, first = 0, ""
    while True:
        place = f"{name}[{number}]"
        window.at = BETWEEN.match(window.text, window.at).end()
        start = window.at
        if window.text[start : start + 1] == "]":
            return
        first = first or window.text[start : start + 1]
        try:
            value, window.at = decode(window.text, start)
        except (ValueError, RecursionError):
            # Cut by the window's end, or broken.
            if window.size < LONGEST and window.grow():
                continue
            yield place, Skip("broken_json", place, window.text[start : start + 200])
            if not window.find(NEXT.get(first, NEXT["{"])):
                return
        else:
            element = window.text[start : window.at]
            bad = bool(SURROGATE.search(element))
            value = "bad_bytes" if bad else _usable(value, element, (dict, list))
            yield place, _or_skip(value, place, element)
        number += 1


class _Window:
    """The part of a long text round the place `at`."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._source = text
        self.text, self.at = text.read(HEAD), 0

    @property
    def size(self) -> int:
        return len(self.text) - self.at

    def grow(self) -> bool:
        """Read on, and forget what lies before `at`; False at the end."""
        piece = self._source.read(min(max(HEAD, self.size), LONGEST))
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def find(self, pattern: re.Pattern[str]) -> bool:
        """Move behind the pattern's next match; False if there is none to the end."""
        self.at += 1
        while not (found := pattern.search(self.text, self.at)):
            self.at = max(self.at, len(self.text) - 100)
            if not self.grow():
                return False
        self.at = found.end()
        return True


def _object(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """One object over several lines: a row, or a wrapper round the rows."""
    whole = text.read(16 * LONGEST)
    if len(whole) == 16 * LONGEST:
        raise DataError(f"{name}: wanted JSON lines or a JSON list, found one object of more than "
                        f"{len(whole):,} characters; convert it to JSON lines")  # fmt: skip
    value = _parse(whole)
    if isinstance(value, str):
        yield from _lines(name, io.StringIO(whole, newline="\n"))
        return
    inner = next((value[key] for key in WRAPPERS if isinstance(value.get(key), list)), [value])
    for number, element in enumerate(inner):
        place = f"{name}[{number}]"
        written = json.dumps(element, ensure_ascii=False)
        if not isinstance(element, dict | list):
            yield place, Skip("not_an_object", place, written)
        else:
            yield place, Skip("bad_bytes", place, written) if SURROGATE.search(written) else element


def _table(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file, as column -> text; its first line names the columns."""
    csv.field_size_limit(LONGEST)
    rows = csv.reader(text)
    try:
        columns, number = next(rows, []), 0
    except csv.Error as error:
        raise DataError(f"{name}: wanted CSV whose first line names the columns, found a line that "
                        f"cannot be read ({error}); choose another reader") from None  # fmt: skip
    while True:
        number += 1
        place = f"{name}[{number}]"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield place, Skip("broken_csv", place, str(error))
            continue
        if row is None:
            return
        if len(row) != len(columns):
            yield place, Skip("wrong_columns", place, str(row))
        elif SURROGATE.search("".join(row)):
            yield place, Skip("bad_bytes", place, str(row))
        else:
            yield place, dict(zip(columns, row, strict=True))


def _text(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    return _lines(name, text, parse=False)


def _document(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    whole = text.read(LONGEST)
    if len(whole) == LONGEST:
        yield name, Skip("document_too_long", name, whole[:200])
    elif SURROGATE.search(whole):
        yield name, Skip("bad_bytes", name, whole)
    elif whole.strip():
        yield name, {"path": name, "text": whole}


LAYOUTS = {
    "lines": _lines,
    "list": _list,
    "object": _object,
    "csv": _table,
    "text": _text,
    "document": _document,
}
