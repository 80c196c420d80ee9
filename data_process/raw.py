"""Opens raw downloads by their bytes, not by their names.

`records` walks files and yields one Record for each JSON object (a list, JSON lines or one
object), each row of a table, each Markdown file, or, in other text files, each line. gzip, bzip2,
xz, zip and tar are opened on the way; a BOM is removed; lines end at "\\n" only, since texts carry
\\r, \\x0b and U+2028. Everything streams: memory is bounded by the longest line, list element or
document (LONGEST).

A line that cannot be used becomes a Skip, which the caller counts. A file that is wrong as a
whole (missing, another encoding, damaged archive) is a DataError. What the records mean is left
to `datasets/`; how the work is divided, to `parts.py`.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from babyllama.cli import shown
from babyllama.errors import DataError
from data_process.layouts import HEAD, LAYOUTS, SURROGATE, Skip, layout_of

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
