"""Opens raw downloads by their bytes, not by their names.

`records` walks files and yields one Record for each JSON object (a list, JSON lines or one
object), each row of a table, each Markdown file, or, in other text files, each line. gzip, bzip2,
xz, zip and tar are opened on the way; a BOM is removed; lines end at "\\n" only, since texts carry
\\r, \\x0b and U+2028. Everything streams: memory is bounded by the longest line, list element or
document (LONGEST).

A line that cannot be used becomes a Skip, which the caller counts. A file that is wrong as a
whole (missing, another encoding, damaged archive) is a DataError. What the records mean is left
to `datasets/`.

A layout (JSON lines, a JSON list, one object, CSV, plain lines, and Markdown, whose files are one
document each) is a function (name, text) -> Iterator[(place, dict | list | line | Skip)] that
streams; damage costs the line or element it stands in.

`divide` makes jobs of about the same size: a long file of lines is cut into pieces that end with a
line, short files are put together. The division depends on the files alone, never on the number of
workers.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from babyllama.config import shown
from babyllama.errors import DataError
from data_process.registry import DataSet

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

WIDE_BYTES = bytes(range(128, 256))
DEPTH = 3  # archives inside archives
HELD_OUT = {"test": "test", "dev": "val", "val": "val", "valid": "val", "validation": "val"}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError,
           RuntimeError)  # fmt: skip
# What describes data instead of being data, on the hubs too.
IGNORED = re.compile(
    r"(?i)^[._]|^(readme|license)\b|^(dataset_infos?|dataset_dict|configuration)\.json$"
    r"|\.(pdf|sha256|lock|part)$"
)


class Record(NamedTuple):
    """One entry of a raw file.

    n: running number over all parts that are read together, skipped entries included
    split: "train", "val" or "test" where the name of the file says so
    data: a dict or list (JSON), a dict of columns (CSV), or a line of text
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


class Part(NamedTuple):
    """A file, or a piece of one that begins and ends with whole lines.

    name: how places in it are called
    layout: one of LAYOUTS; empty: decided by the bytes
    """

    path: Path
    name: str
    start: int = 0
    end: int | None = None
    layout: str = ""


def whole_files(raw_dir: Path) -> list[Part]:
    """The data files of a place as parts, in their fixed order."""
    return [
        Part(path, path.name if path == raw_dir else str(path.relative_to(raw_dir)))
        for path in data_files(raw_dir)
    ]


def records(raw: Path | Iterable[Part], encoding: str, layout: str = "") -> Iterator[Record | Skip]:
    """Every entry of a file, of a directory's files, or of some parts, in a fixed order.

    layout: of parts that do not state one
    """
    number = 0
    for part in whole_files(raw) if isinstance(raw, Path) else raw:
        try:
            with open(part.path, "rb") as file:
                for name, stream in _open(part, file):
                    split = split_of(name.split("+")[0].rsplit("/")[-1])
                    for place, data in _entries(name, stream, encoding, part.layout or layout):
                        skip = isinstance(data, Skip)
                        yield data if skip else Record(number, place, split, data)
                        number += 1
        except DAMAGED as error:
            raise DataError(
                f"{shown(part.path)}: wanted a whole file, found it cut or damaged after "
                f"{number} entries ({error}); download it again"
            ) from None


def _open(part: Part, file: io.BufferedReader) -> Iterator[tuple[str, io.BufferedReader]]:
    if part.end is None:
        return _streams(part.name, file)
    name = f"{part.name}+{part.start}" if part.start else part.name
    return iter([(name, io.BufferedReader(_Slice(file, part.start, part.end)))])


def _streams(
    name: str, file: io.BufferedIOBase, depth: int = DEPTH
) -> Iterator[tuple[str, io.BufferedReader]]:
    """The uncompressed files inside a file: itself, or all members of an archive."""
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    head = reader.peek(512)
    opener = next((UNPACK[magic] for magic in UNPACK if head.startswith(magic)), None)
    is_zip, is_tar = head.startswith(b"PK\x03\x04"), head[257:262] == b"ustar"
    if depth == 0 and (opener or is_zip or is_tar):
        raise DataError(f"{name}: wanted data, found archives inside archives; unpack them first")
    if opener:
        with opener(reader) as inner:
            yield from _streams(name, inner, depth - 1)
    elif is_zip:
        with zipfile.ZipFile(reader) as archive:
            for member in sorted(archive.namelist()):
                if not member.endswith("/") and not IGNORED.search(member):
                    with archive.open(member) as inner:
                        yield from _streams(f"{name}/{member}", inner, depth - 1)
    elif is_tar:
        with tarfile.open(fileobj=reader, mode="r|") as archive:
            for entry in archive:
                if entry.isfile() and not IGNORED.search(entry.name.rsplit("/")[-1]):
                    yield from _streams(
                        f"{name}/{entry.name}", archive.extractfile(entry), depth - 1
                    )
    elif head[:4] == b"PAR1":
        raise DataError(f"{name}: wanted JSON or text, found parquet; convert it to JSON lines")
    else:
        yield name, reader


UNPACK = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}


def _entries(
    name: str, stream: io.BufferedReader, encoding: str, layout: str
) -> Iterator[tuple[str, Any]]:
    """(place, dict | list | line | Skip) for every entry of an uncompressed file."""
    head = stream.read(HEAD)
    _check_encoding(name, head, encoding)
    whole = io.BufferedReader(_Chain(head, stream))
    text = io.TextIOWrapper(whole, encoding, errors="surrogateescape", newline="\n")
    try:
        yield from LAYOUTS[layout or layout_of(head, encoding, name)](name, text)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: wanted {encoding}, found {error}; see --encoding") from None


def _check_encoding(name: str, head: bytes, encoding: str) -> None:
    """Refuse a file that is plainly written in another encoding."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(b"\0") > len(head) // 10:
        likely = "utf-16"
        wrong = not encoding.lower().replace("_", "-").startswith("utf-16")
    else:
        likely = "gb18030"
        n_wide = len(head) - len(head.translate(None, WIDE_BYTES))
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


class _Slice(io.RawIOBase):
    """The bytes of a file from one place to another."""

    def __init__(self, file: io.BufferedReader, start: int, end: int) -> None:
        file.seek(start)
        self._file, self._left = file, end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_read = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= n_read
        return n_read


JOB_BYTES = 64 << 20  # some ten seconds of work for one process
PACKED = (*UNPACK, b"PK\x03\x04", b"PAR1")
WIDE = ("utf16", "utf32")  # encodings in which the byte \n may be half a character


def divide(
    place: Path, data_set: DataSet, encoding: str, job_bytes: int = JOB_BYTES
) -> list[list[Part]]:
    """The jobs of a set, each a list of parts in their fixed order."""
    if data_set.read_dir:
        return [[]]
    files = whole_files(place)
    if data_set.whole:
        return [files]
    if data_set.split_files and not encoding.lower().replace("-", "").startswith(WIDE):
        pieces = [
            piece for file in files for piece in _cut(file, data_set.layout, encoding, job_bytes)
        ]
    else:
        pieces = files
    return list(_packed(pieces, job_bytes))


def _cut(part: Part, layout: str, encoding: str, job_bytes: int) -> Iterator[Part]:
    size = part.path.stat().st_size
    with open(part.path, "rb") as file:
        head = file.read(HEAD)
        layout = layout or layout_of(head, encoding, part.name)
        packed = head.startswith(PACKED) or head[257:262] == b"ustar"
        if size <= 1.5 * job_bytes or packed or layout not in ("lines", "text"):
            yield part
            return
        start = 0
        while start < size:
            end = min(start + job_bytes, size)
            if end < size:
                file.seek(end)
                end = _line_end(file)
            yield part._replace(start=start, end=end, layout=layout)
            start = end


def _line_end(file) -> int:
    """Where the line ends that holds the byte at which the file stands."""
    while block := file.read(HEAD):
        if (at := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + at + 1
    return file.tell()


def _packed(parts: Iterable[Part], job_bytes: int) -> Iterator[list[Part]]:
    job, room = [], job_bytes
    for part in parts:
        size = (part.end or part.path.stat().st_size) - part.start
        if job and size > room:
            yield job
            job, room = [], job_bytes
        job.append(part)
        room -= size
    if job:
        yield job


def to_json(parts: list[Part]) -> str:
    """A job's parts as the text of its plan file."""
    return json.dumps([part._replace(path=str(part.path)) for part in parts], ensure_ascii=False)


def from_json(text: str) -> list[Part]:
    """The parts in a plan file."""
    return [Part(Path(path), *rest) for path, *rest in json.loads(text)]
