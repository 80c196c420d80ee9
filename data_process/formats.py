"""Records of an uncompressed file: JSON in any arrangement, tables, lines, Markdown.

Each format is a function (name, text) -> Iterator[(place, dict | list | line | Skip)]. Lines and
tables stream, memory is bounded by the longest line (LONGEST); a JSON list is read as a whole.
Damage costs the line or value it stands in. Which one a file has is read from its first bytes
(`format_of`), not from its name. Of .xlsx and .docx (Office Open XML, ECMA-376: a zip archive of
XML parts) the first sheet and the paragraphs are read; formulas count as the value saved with them.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Collection, Iterator
from itertools import islice
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

from babyllama.errors import ConfigError, DataError
from babyllama.language.letters import ORDER, part_of

HEAD = 1 << 20  # bytes from which encoding and format are guessed
LONGEST = 1 << 25  # characters of a line
LARGEST = 1 << 29  # of a file that is one JSON list
LARGEST_PART = 1 << 29  # bytes of a part of an office program's file
WRAPPERS = ("data", "examples", "rows", "records", "items", "results")  # {"data": [rows]}
SURROGATE = re.compile("[\ud800-\udfff]")
HALF = re.compile(r"\\u[dD][89a-fA-F]")
INSTALL = "pip install -c constraints.txt pyarrow"


class Skip(NamedTuple):
    """A record that is left out before cleaning: why, where it stood and how it began.

    broken: the record is damaged, which counts against --max_bad
    why: what a reader found in it and what it knows, where the reason does not say all
    """

    reason: str
    where: str
    sample: str
    broken: bool = True
    why: str = ""


def format_of(head: bytes, encoding: str, name: str = "", columns: Collection[str] = ()) -> str:
    """Which of FORMATS a file has: Markdown by its name, else from its first lines with text.

    columns: names by which the first line of a table is known
    """
    ending = name.lower().rpartition(".")[2]
    if ending == "md":
        return "document"
    lines = (line.strip() for line in io.StringIO(head.decode(encoding, "replace"), newline="\n"))
    first = list(islice(filter(None, lines), 5))
    if not first:
        return "text"
    value = _parse(first[0])
    if isinstance(value, dict) or (isinstance(value, list) and _is_row(value[:1])):
        is_turns = isinstance(value, list) and isinstance(value[0], str)
        return "lines" if len(first) > 1 or is_turns else "values"
    if first[0] not in ("[", "{") and any(isinstance(_parse(line), dict) for line in first[1:]):
        return "lines"  # but for a broken first one
    if re.match(r'\[\s*([{\["]|$)|\{\s*("|$)', first[0]):
        return "values"
    delimiter, cells = _cells(first[0])
    known = sum(cell in columns for cell in cells)
    is_head = known > 1 or (known == 1 and len(cells) < 3 and ending in TABLES)
    if (is_head and max(map(len, cells)) < LONGEST_NAME) or (ending == "csv" and len(cells) > 1):
        return f"table{delimiter}"
    return "text"


TABLES = ("csv", "tsv")
LONGEST_NAME = 40  # characters of a column's


def _cells(line: str) -> tuple[str, list[str]]:
    """The delimiter of a table's first line, and its cells."""
    delimiter = max("\t,;|，", key=line.count)
    return delimiter, [cell.strip().strip('"').strip().lower() for cell in line.split(delimiter)]


# NaN and Infinity are no JSON, but what pandas writes for an empty cell.
DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def _parse(text: str) -> Any:
    """The JSON value of a text; a Skip's reason (str) if it has none that can be used."""
    try:
        value = DECODER.decode(text)
    except RecursionError:
        return "too_deep"
    except ValueError:  # broken JSON, and numbers of more than 4,300 digits
        return "broken_json"
    return _usable(value, text)


def _usable(value: Any, text: str) -> Any:
    if not isinstance(value, dict | list):
        return "not_an_object"
    # Half a character, as the escape "\ud83d" leaves it, can be neither written nor encoded.
    if HALF.search(text) and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return "lone_surrogate"
    return value


def _or_skip(value: Any, place: str, text: str) -> Any:
    return Skip(value, place, text) if isinstance(value, str) else value


def _lines(name: str, text: io.TextIOBase, parse: bool = True) -> Iterator[tuple[str, Any]]:
    """JSON lines, or with `parse` off lines of text."""
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


def past(pattern: re.Pattern[str], text: str, at: int = 0) -> int:
    """The place in a text behind what matches there."""
    found = pattern.match(text, at)
    return found.end() if found else at


BETWEEN = re.compile(r"[\s,]*")
# Where the next value seems to begin after a broken one: behind "}, {", or a line that begins one.
BEHIND = re.compile(r"[^\s,;\]}]")
NEXT = {"{": re.compile(r"[}\]]\s*+,?\s*+(?={)"), "[": re.compile(r"\]\s*+,?\s*+(?=\[)")}


def _values(
    name: str, text: io.TextIOBase, columns: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list, or one value after another; an object that only holds rows gives
    these.

    raises: DataError if the file is too large to be read as a whole
    """
    whole = text.read(LARGEST + 1)
    if len(whole) > LARGEST:
        raise DataError(f"{name}: wanted a JSON list of at most {LARGEST:,} characters, found a "
                        f"longer one; write its elements as lines")  # fmt: skip
    at = past(BETWEEN, whole)
    in_list = whole[at : at + 1] == "["
    at += in_list
    number, first = 0, ""
    while True:
        place = f"{name}[{number}]"
        at = past(BETWEEN, whole, at)
        if at == len(whole):
            if in_list:
                yield place, Skip("cut_off", place, "the list has no end")
            return
        start, is_end = at, whole[at] == "]"
        if is_end and not (in_list and BEHIND.search(whole, at + 1)):
            return
        first = first or whole[at]
        try:
            # The end of a list inside a broken element is none: reading goes on behind it.
            value, at = (None, 0) if is_end else DECODER.raw_decode(whole, at)
        except (ValueError, RecursionError):
            at = 0
        if not at:
            yield place, Skip("broken_json", place, whole[start : start + 200])
            follows = NEXT["{"] if is_end else NEXT.get(first, NEXT["{"])
            found = follows.search(whole, start + 1)
            if not found:
                return
            at = found.end()
        else:
            element = whole[start:at]
            bad = bool(SURROGATE.search(element))
            value = "bad_bytes" if bad else _usable(value, element)
            if not in_list and isinstance(value, dict):
                yield from _rows_in(place, value, columns)
            else:
                yield place, _or_skip(value, place, element)
        number += not is_end


class OfPart(NamedTuple):
    """A record whose file says in which part of the set it belongs."""

    part: str
    data: Any


def _rows_in(place: str, value: dict, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The rows in an object: {"data": [rows]}, {"train": [rows], "test": [rows]}, {id: row}, or
    {column: {id: cell}} as pandas writes it; else the object itself."""
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
    dicts = [row for row in value.values() if isinstance(row, dict)]
    is_alone = len(value) == 1  # then it may be empty, too
    wrapper = next((key for key, found in lists.items() if key.lower() in WRAPPERS
                    and (_is_row(found[:1]) or (is_alone and not found))), None)  # fmt: skip
    n_known = sum(key.lower() in columns for key in value)
    if wrapper and n_known < 2:
        found: list[tuple[str | None, Any]] = [(None, row) for row in lists[wrapper]]
    elif lists and len(lists) == len(value) and all(map(part_of, value)):
        named = sorted((ORDER[part_of(key)], key) for key in lists)  # held-out rows first
        found = [(part_of(key), row) for _, key in named for row in lists[key]]
    elif len(dicts) == len(value) == n_known > 0:
        found = [
            (None, {key: cells.get(n) for key, cells in value.items()})
            for n in dict.fromkeys(n for cells in dicts for n in cells)
        ]
    elif len(dicts) == len(value) > 1 and not n_known:
        found = [(None, row) for row in dicts]
    else:
        found = [(None, value)]
    for number, (part, row) in enumerate(found):
        where = f"{place.rpartition('[')[0]}[{number}]" if len(found) > 1 else place
        if isinstance(row, dict | list):
            yield where, OfPart(part, row) if part else row
        else:
            yield where, Skip("not_an_object", where, str(row))


def _is_row(value: list) -> bool:
    """True if a list holds what may be a row, or the turns of one."""
    return bool(value) and isinstance(value[0], dict | list | str)


def _table(name: str, text: io.TextIOBase, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table, as column -> text; its first line names the columns.

    Cells with tabs between them are taken as they are; others may be quoted, as Excel does.
    raises: DataError if a quotation mark is never closed, as it would swallow the rest of the file
    """
    csv.field_size_limit(LONGEST)
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(
        text, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True
    )
    columns: list[str] = []
    number = 0
    while True:
        place = f"{name}[{number}]"
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{place}: wanted a row of {len(columns)} cells, found a quotation mark that "
                    f"is nowhere closed; correct the file"
                ) from None
            yield place, Skip("broken_csv", place, "", why=str(error))
            number += 1
            continue
        if row is None:
            return
        cells = [cell.strip() for cell in row]
        if delimiter == "\t":
            cells = [c[1:-1].replace('""', '"') if QUOTED.fullmatch(c) else c for c in cells]
        if not any(cells) or (not columns and cells[0].startswith("sep=")):  # a line for Excel
            continue
        if columns:
            yield place, _row(place, columns, cells if delimiter == "\t" else row)
        columns = columns or _columns(name, cells)
        number += 1


QUOTED = re.compile(r'"(?:[^"]|"")*"')


def _document(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    whole = text.read(LONGEST)
    if len(whole) == LONGEST:
        yield name, Skip("document_too_long", name, whole[:200])
    elif SURROGATE.search(whole):
        yield name, Skip("bad_bytes", name, whole)
    elif whole.strip():
        yield name, {"path": name, "text": whole}


def entries(
    name: str, text: io.TextIOBase, what: str, columns: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """(place, dict | list | line | OfPart | Skip) for every entry of a text file.

    what: its format, as `format_of` names it
    """
    if what.startswith("table") or what == "csv":
        return _table(name, text, what[5:] or ",")
    if what == "values":
        return _values(name, text, columns)
    return _document(name, text) if what == "document" else _lines(name, text, what == "lines")


def workbook(name: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The rows of a workbook's first sheet, as column -> cell; its first row names the columns."""
    columns: list[str] = []
    for number, cells in enumerate(sheet(name, file)):
        if columns and any(cell.strip() for cell in cells):
            place = f"{name}[{number}]"
            yield place, _row(place, columns, cells)
        columns = columns or _columns(name, cells)


def _columns(name: str, cells: list[str]) -> list[str]:
    """The columns that the first row of a table names; [] if it is blank."""
    columns = [cell.strip() for cell in cells]
    if any(columns):
        columns[0] = columns[0] or "index"  # as pandas leaves it
    while columns and not columns[-1]:
        columns.pop()
    if columns and not columns[0]:
        columns[0] = "Unnamed: 0"  # row numbers that pandas wrote, as pandas reads them
    if len(set(columns)) < len(columns) or not all(columns):
        raise DataError(
            f"{name}: wanted a table whose first row names the columns, found {cells!r:.200}; "
            "write a name above each, as in: question, answer"
        )
    return columns


def _row(place: str, columns: list[str], cells: list[str]) -> Any:
    """A row of a table; cells that are missing at its end are empty."""
    if any(cell.strip() for cell in cells[len(columns) :]):
        why = f"{len(cells)} cells, wanted {len(columns)} ({', '.join(columns)})"
        return Skip("wrong_columns", place, str(cells), why=why[:200])
    if SURROGATE.search("".join(cells)):
        return Skip("bad_bytes", place, str(cells))
    return dict(zip(columns, [*cells, *[""] * len(columns)], strict=False))


def parquet(name: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"{name}: a parquet file; reading it wants pyarrow ({INSTALL}), or "
                          f"convert it to JSON lines") from None  # fmt: skip
    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(64):
            for row in batch.to_pylist():
                yield f"{name}:{number}", row
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: wanted a whole parquet file, found it damaged after {number} "
                        f"rows ({error}); download it again") from None  # fmt: skip


def paragraphs(name: str, file: IO[bytes]) -> Iterator[str]:
    """The paragraphs of a .docx that hold text, those in tables too."""
    for paragraph in _elements(name, file, "word/document.xml", "p"):
        parts = [
            (part.text or "") if _tag(part) == "t" else {"tab": "\t", "br": "\n"}[_tag(part)]
            for part in paragraph.iter()
            if _tag(part) in ("t", "tab", "br")
        ]
        if text := "".join(parts).strip():
            yield text


def sheet(name: str, file: IO[bytes]) -> Iterator[list[str]]:
    """The cells of a workbook's first sheet, row by row."""
    strings = [
        "".join(part.text or "" for part in item.iter() if _tag(part) == "t")
        for item in _elements(name, file, "xl/sharedStrings.xml", "si", needed=False)
    ]
    for row in _elements(name, file, r"xl/worksheets/\w+\.xml", "row"):
        cells: list[str] = []
        for cell in (part for part in row if _tag(part) == "c"):
            place = _place(cell.get("r", ""))
            cells += [""] * ((place or len(cells)) - len(cells))
            text = "".join(p.text or "" for p in cell.iter() if _tag(p) in ("v", "t"))
            try:
                cells.append(strings[int(text)] if cell.get("t") == "s" else text)
            except (ValueError, IndexError):
                raise _no_office(name, f"cell {cell.get('r')} without its text") from None
        yield cells


def _place(reference: str) -> int:
    """Where a cell stands in its row, from 0: C7 -> 2."""
    number, letters = 0, re.match("[A-Z]{0,3}", reference)
    for letter in letters[0] if letters else "":
        number = number * 26 + ord(letter) - 64
    return max(0, number - 1)


def _elements(
    name: str, file: IO[bytes], part: str, tag: str, needed: bool = True
) -> Iterator[ElementTree.Element]:
    """The elements of a tag in the first part whose name fits, each whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = sorted(filter(re.compile(part).fullmatch, archive.namelist()), key=_order)
            if not found:
                if needed:
                    raise _no_office(name, f"an archive without {part}")
                return
            if archive.getinfo(found[0]).file_size > LARGEST_PART:
                raise _no_office(name, f"more than {LARGEST_PART:,} bytes in {found[0]}")
            with archive.open(found[0]) as xml:
                for _, element in ElementTree.iterparse(xml):
                    if _tag(element) == tag:
                        yield element
                        element.clear()
    except (zipfile.BadZipFile, ElementTree.ParseError, EOFError, RuntimeError) as error:
        raise _no_office(name, str(error)) from None


def _order(part: str) -> tuple[int, str]:
    return int("".join(re.findall(r"\d", part)) or 0), part


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _no_office(name: str, found: str) -> DataError:
    return DataError(f"{name}: wanted a file of an office program, found {found}; save it "
                     f"again, or as CSV UTF-8 or plain text")  # fmt: skip
