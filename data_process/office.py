"""Tables and documents of office programs: .csv, .tsv, .xlsx and .docx. Standard library only.

Office Open XML (ECMA-376): a zip archive of XML parts. Read are the first sheet of a workbook and
the paragraphs of a document; formulas count as the value that was saved with them.
"""

import csv
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from babyllama.config import shown
from babyllama.errors import DataError

TABLES = (".csv", ".tsv", ".xlsx")
LARGEST = 1 << 29  # bytes of an unpacked part
_DELIMITERS = ("\t", ",", ";", "，")


def table_rows(path: Path, encoding: str) -> Iterator[dict[str, str]]:
    """The rows of a table as column -> text; its first row names the columns.

    raises: DataError if it is no table, or its first row does not name the columns
    """
    rows = _sheet(path) if path.suffix.lower() == ".xlsx" else _separated(path, encoding)
    columns = [name.strip() for name in next(rows, [])]
    while columns and not columns[-1]:
        columns.pop()
    if not columns or len(set(columns)) < len(columns) or not all(columns):
        raise DataError(
            f"{shown(path)}: wanted a table whose first row names the columns, found "
            f"{columns or 'an empty one'}; write a name above each, as in: question, answer"
        )
    for row in rows:
        if any(cell.strip() for cell in row):
            yield dict(zip(columns, [*row, *[""] * len(columns)], strict=False))


def _separated(path: Path, encoding: str) -> Iterator[list[str]]:
    with open(path, encoding=encoding, newline="") as file:
        head = file.readline()
        file.seek(0)
        delimiter = max(_DELIMITERS, key=head.count)
        csv.field_size_limit(LARGEST)
        try:
            yield from csv.reader(file, delimiter=delimiter)
        except csv.Error as error:
            raise DataError(f"{shown(path)}: wanted a table, found {error}; save it as "
                            f"CSV UTF-8 or .xlsx") from None  # fmt: skip


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a .docx that hold text, those in tables too."""
    for paragraph in _elements(path, "word/document.xml", "p"):
        parts = [
            (part.text or "") if _name(part) == "t" else {"tab": "\t", "br": "\n"}[_name(part)]
            for part in paragraph.iter()
            if _name(part) in ("t", "tab", "br")
        ]
        if text := "".join(parts).strip():
            yield text


def _sheet(path: Path) -> Iterator[list[str]]:
    strings = [
        "".join(part.text or "" for part in item.iter() if _name(part) == "t")
        for item in _elements(path, "xl/sharedStrings.xml", "si", needed=False)
    ]
    for row in _elements(path, r"xl/worksheets/\w+\.xml", "row"):
        cells: list[str] = []
        for cell in (part for part in row if _name(part) == "c"):
            place = _column(cell.get("r", ""))
            cells += [""] * ((place or len(cells)) - len(cells))
            text = "".join(p.text or "" for p in cell.iter() if _name(p) in ("v", "t"))
            try:
                cells.append(strings[int(text)] if cell.get("t") == "s" else text)
            except (ValueError, IndexError):
                raise _no_office(path, f"cell {cell.get('r')} without its text") from None
        yield cells


def _column(reference: str) -> int:
    """Where a cell stands in its row, from 0: C7 -> 2."""
    number = 0
    for letter in re.match("[A-Z]{0,3}", reference)[0]:
        number = number * 26 + ord(letter) - 64
    return max(0, number - 1)


def _elements(
    path: Path, part: str, name: str, needed: bool = True
) -> Iterator[ElementTree.Element]:
    """The elements of that name in the first part whose name fits, each whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(filter(re.compile(part).fullmatch, archive.namelist()), key=_number)
            if not found:
                if needed:
                    raise _no_office(path, f"an archive without {part}")
                return
            if archive.getinfo(found[0]).file_size > LARGEST:
                raise _no_office(path, f"more than {LARGEST:,} bytes in {found[0]}")
            with archive.open(found[0]) as file:
                for _, element in ElementTree.iterparse(file):
                    if _name(element) == name:
                        yield element
                        element.clear()
    except (zipfile.BadZipFile, ElementTree.ParseError, EOFError, RuntimeError) as error:
        raise _no_office(path, str(error)) from None


def _number(name: str) -> tuple[int, str]:
    return int("".join(re.findall(r"\d", name)) or 0), name


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _no_office(path: Path, found: str) -> DataError:
    return DataError(f"{shown(path)}: wanted a file of an office program, found {found}; save it "
                     f"again, or as CSV UTF-8 or plain text")  # fmt: skip
