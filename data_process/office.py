"""Workbooks and documents of office programs: .xlsx and .docx. Standard library only.

Office Open XML (ECMA-376): a zip archive of XML parts. Read are the first sheet of a workbook and
the paragraphs of a document; formulas count as the value that was saved with them.
"""

import re
import zipfile
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

from babyllama.errors import DataError

LARGEST = 1 << 29  # bytes of an unpacked part


def paragraphs(name: str, file: IO[bytes]) -> Iterator[str]:
    """The paragraphs of a .docx that hold text, those in tables too."""
    for paragraph in _elements(name, file, "word/document.xml", "p"):
        parts = [
            (part.text or "") if _name(part) == "t" else {"tab": "\t", "br": "\n"}[_name(part)]
            for part in paragraph.iter()
            if _name(part) in ("t", "tab", "br")
        ]
        if text := "".join(parts).strip():
            yield text


def sheet(name: str, file: IO[bytes]) -> Iterator[list[str]]:
    """The cells of a workbook's first sheet, row by row."""
    strings = [
        "".join(part.text or "" for part in item.iter() if _name(part) == "t")
        for item in _elements(name, file, "xl/sharedStrings.xml", "si", needed=False)
    ]
    for row in _elements(name, file, r"xl/worksheets/\w+\.xml", "row"):
        cells: list[str] = []
        for cell in (part for part in row if _name(part) == "c"):
            place = _column(cell.get("r", ""))
            cells += [""] * ((place or len(cells)) - len(cells))
            text = "".join(p.text or "" for p in cell.iter() if _name(p) in ("v", "t"))
            try:
                cells.append(strings[int(text)] if cell.get("t") == "s" else text)
            except (ValueError, IndexError):
                raise _no_office(name, f"cell {cell.get('r')} without its text") from None
        yield cells


def _column(reference: str) -> int:
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
            found = sorted(filter(re.compile(part).fullmatch, archive.namelist()), key=_number)
            if not found:
                if needed:
                    raise _no_office(name, f"an archive without {part}")
                return
            if archive.getinfo(found[0]).file_size > LARGEST:
                raise _no_office(name, f"more than {LARGEST:,} bytes in {found[0]}")
            with archive.open(found[0]) as xml:
                for _, element in ElementTree.iterparse(xml):
                    if _name(element) == tag:
                        yield element
                        element.clear()
    except (zipfile.BadZipFile, ElementTree.ParseError, EOFError, RuntimeError) as error:
        raise _no_office(name, str(error)) from None


def _number(part: str) -> tuple[int, str]:
    return int("".join(re.findall(r"\d", part)) or 0), part


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _no_office(name: str, found: str) -> DataError:
    return DataError(f"{name}: wanted a file of an office program, found {found}; save it "
                     f"again, or as CSV UTF-8 or plain text")  # fmt: skip
