"""Opens raw downloads by their bytes, not by their names.

`records` walks a file or a directory and yields one Record for each JSON object (a list, JSON
lines or one object) or, in other text files, for each line. gzip, xz and zip are opened on the
way; a BOM is removed; lines end at "\\n" only, since texts carry \\r, \\x0b and U+2028.

A line that cannot be used becomes a Skip, which the caller counts. A file that is wrong as a
whole (missing, another encoding, damaged archive) is a DataError. What the records mean is left
to `datasets/`.
"""

import gzip
import importlib.util
import io
import json
import lzma
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from babyllama.cli import shown
from babyllama.errors import DataError

HEAD = 1 << 20  # bytes from which encoding and layout are guessed
WRAPPERS = ("data", "examples", "rows")  # {"data": [...]}: the rows are inside
HELD_OUT = {"test": "test", "dev": "val", "val": "val", "valid": "val", "validation": "val"}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError)
IGNORED = re.compile(r"(?i)^[._]|^(readme|license)\b|\.(md|pdf|sha256|lock)$")
SURROGATE = re.compile("[\ud800-\udfff]")


class Skip(NamedTuple):
    """A row that is left out before cleaning: why, where it stood and how it began.

    broken: the line itself is damaged, which counts against --max_bad
    """

    reason: str
    where: str
    sample: str
    broken: bool = True


class Record(NamedTuple):
    """One entry of a raw file.

    n: running number over all files of the set, skipped entries included
    split: "train", "val" or "test" where the name of the file says so
    data: a dict (JSON), or a line of text
    """

    n: int
    where: str
    split: str | None
    data: Any


def as_row(record: Record, **fields: object) -> dict:
    """A row made of a record: its number as id, its official split, and the given fields."""
    return {"id": record.n, **fields} | ({"split": record.split} if record.split else {})


def split_of(name: str) -> str | None:
    """The split that a file name states: csl_title_dev.json -> val."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word == "train" or word in HELD_OUT:
            return HELD_OUT.get(word, "train")
    return None


def data_files(raw_dir: Path) -> list[Path]:
    """The data files under a directory (or the one file named), held-out parts first.

    De-duplication keeps what it sees first, so a test row is never lost to its copy in train.
    raises: DataError if there is none
    """
    if raw_dir.is_file():
        return [raw_dir]
    paths = [
        path
        for path in sorted(raw_dir.rglob("*"))
        if path.is_file() and not any(map(IGNORED.search, path.relative_to(raw_dir).parts))
    ]
    if not paths:
        raise DataError(f"{shown(raw_dir)}: wanted data files, found none")
    order = {"test": 0, "val": 1}
    return sorted(paths, key=lambda path: order.get(split_of(path.name) or "", 2))


def records(raw_dir: Path, encoding: str) -> Iterator[Record | Skip]:
    """Every entry of every file, in a fixed order."""
    number = 0
    for path in data_files(raw_dir):
        name = path.name if path == raw_dir else str(path.relative_to(raw_dir))
        with open(path, "rb") as file:
            try:
                for where, stream in _streams(name, file):
                    split = split_of(where.rsplit("/")[-1])
                    for place, data in _entries(where, stream, encoding):
                        skip = isinstance(data, Skip)
                        yield data if skip else Record(number, place, split, data)
                        number += 1
            except DAMAGED as error:
                raise DataError(
                    f"{shown(path)}: wanted a whole file, found it cut or damaged after "
                    f"{number} entries ({error}); download it again"
                ) from None


def _streams(name: str, file: io.BufferedIOBase) -> Iterator[tuple[str, io.BufferedReader]]:
    """The uncompressed files inside a file: itself, or all members of an archive."""
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    magic = reader.peek(6)[:6]
    if magic[:2] == b"\x1f\x8b":
        with gzip.open(reader) as inner:
            yield from _streams(name, inner)
    elif magic == b"\xfd7zXZ\x00":
        with lzma.open(reader) as inner:
            yield from _streams(name, inner)
    elif magic[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(reader) as archive:
            for member in sorted(archive.namelist()):
                if not member.endswith("/") and not IGNORED.search(member):
                    with archive.open(member) as inner:
                        yield from _streams(f"{name}/{member}", inner)
    elif magic[:4] == b"PAR1":
        raise DataError(f"{name}: wanted JSON or text, found parquet; convert it to JSON lines")
    else:
        yield name, reader


def _entries(name: str, stream: io.BufferedReader, encoding: str) -> Iterator[tuple[str, Any]]:
    """(place, dict | line | Skip) for every entry of an uncompressed file."""
    head = stream.read(HEAD)
    _check_encoding(name, head, encoding)
    whole = io.BufferedReader(_Chain(head, stream))
    text = io.TextIOWrapper(whole, encoding, errors="surrogateescape", newline="\n")
    first = [line.strip() for line in io.StringIO(head.decode(encoding, "replace"), newline="\n")]
    layout = _layout(list(islice(filter(None, first), 5)))
    try:
        yield from LAYOUTS[layout](name, text)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: wanted {encoding}, found {error}; see --encoding") from None


def _check_encoding(name: str, head: bytes, encoding: str) -> None:
    """Refuse a file that is plainly written in another encoding."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(b"\0") > len(head) // 10:
        likely = "utf-16"
        wrong = not encoding.lower().replace("_", "-").startswith("utf-16")
    else:
        likely = "gb18030"
        n_wide = sum(byte > 127 for byte in head)
        # Single bad bytes are damaged lines; another encoding breaks most characters.
        n_bad = len(SURROGATE.findall(head.decode(encoding, "surrogateescape")))
        wrong = n_bad > 0.3 * n_wide
    if wrong:
        raise DataError(
            f"{name}: wanted text in {encoding}, found another encoding, likely {likely}; "
            f"run again with --encoding {likely}"
        )


class _Chain(io.RawIOBase):
    """A head that was already read, then the rest of its stream."""

    def __init__(self, head: bytes, rest: io.BufferedReader) -> None:
        self._parts = [io.BytesIO(head), rest]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_read = self._parts[0].readinto(buffer)
        if n_read == 0 and len(self._parts) > 1:
            self._parts.pop(0)
            return self._parts[0].readinto(buffer)
        return n_read


def _layout(first: list[str]) -> str:
    """Which of LAYOUTS a file has, from its first lines that are not blank."""
    if any(isinstance(_parse(line), dict) for line in first):
        return "lines"
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
    return _usable(value, text)


def _usable(value: Any, text: str) -> Any:
    if not isinstance(value, dict):
        return "not_an_object"
    # Half a character, as the escape "\ud83d" leaves it, can be neither written nor encoded.
    if "\\u" in text and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return "lone_surrogate"
    return value


def _lines(name: str, text: io.TextIOBase, parse: bool = True) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        line, place = line.rstrip("\r\n"), f"{name}:{number}"
        if SURROGATE.search(line):
            yield place, Skip("bad_bytes", place, line)
        elif line.strip():
            yield place, _or_skip(_parse(line), place, line) if parse else line


def _or_skip(value: Any, place: str, text: str) -> Any:
    return Skip(value, place, text) if isinstance(value, str) else value


def _list(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON list, up to the first that is broken."""
    whole, decode = text.read(), json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,]*")
    number, at = 0, between.match(whole, whole.index("[") + 1).end()
    while whole[at : at + 1] != "]":
        place, start = f"{name}[{number}]", at
        try:
            value, at = decode(whole, at)
        except (ValueError, RecursionError):
            yield place, Skip("broken_json", place, whole[start : start + 200])
            return
        element = whole[start:at]
        bad = "bad_bytes" if SURROGATE.search(element) else _usable(value, element)
        yield place, _or_skip(bad, place, element)
        number, at = number + 1, between.match(whole, at).end()


def _object(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """One object over several lines: a row, or a wrapper round the rows."""
    whole = text.read()
    value = _parse(whole)
    if isinstance(value, str):
        yield from _lines(name, io.StringIO(whole, newline="\n"))
        return
    inner = next((value[key] for key in WRAPPERS if isinstance(value.get(key), list)), [value])
    for number, element in enumerate(inner):
        place = f"{name}[{number}]"
        good = isinstance(element, dict)
        yield place, element if good else Skip("not_an_object", place, str(element))


def _text(name: str, text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    return _lines(name, text, parse=False)


LAYOUTS = {"lines": _lines, "list": _list, "object": _object, "text": _text}


def package_dir(requirement: str, module: str, folder: str) -> Path:
    """The data directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"wanted the data of the package {requirement}, found it not installed; "
            f"pip install {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / folder


class _NoGlobals(pickle.Unpickler):
    """Reads lists, strings and numbers; a pickle that names a function or class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_pickle(path: Path) -> Any:
    """The plain value in a pickle file."""
    try:
        with open(path, "rb") as file:
            return _NoGlobals(file).load()
    # A damaged pickle fails in as many ways as it has opcodes.
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, ImportError,
            LookupError, MemoryError, TypeError, ValueError) as error:  # fmt: skip
        raise DataError(
            f"{shown(path)}: wanted a pickle of plain lists, found one that is refused "
            f"({error}); install the package again"
        ) from None
