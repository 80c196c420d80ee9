"""Opens raw downloads by their bytes, not by their names.

`records` walks files and yields one Record for each row: a JSON value, a row of a table, a Markdown
file, or, in other text files, a line (formats.py). gzip, bzip2, xz, zip and tar are opened on the
way; a BOM is removed; lines end at "\\n" only, since texts carry \\r, \\x0b and U+2028. Everything
streams. What cannot be data (images, Thumbs.db, checksums …) is left alone.

A record that cannot be used becomes a Skip, which the caller counts. A file that is wrong as a
whole (missing, another encoding, damaged archive, a Word document) is a DataError. What the records
mean is left to `datasets/`. `divide` cuts the files of a set into jobs of about the same size.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from babyllama.config import shown
from babyllama.errors import DataError
from babyllama.language.letters import ORDER, WIDE_BOMS, likely_encoding, part_of
from data_process.formats import (
    HEAD,
    SURROGATE,
    OfPart,
    Skip,
    entries,
    format_of,
    paragraphs,
    parquet,
    workbook,
)

WIDE_BYTES = bytes(range(128, 256))
DEPTH = 3  # archives inside archives
LARGEST_TABLE = 1 << 28  # bytes of a workbook or parquet file inside an archive
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError,
           RuntimeError, NotImplementedError, UnicodeError)  # fmt: skip
# What describes data instead of being data, on the hubs too: names of files and of folders.
IGNORED = re.compile(
    r"(?i)^[._~]|^(license|licence|changelog|使用说明|说明|许可|版权声明)\b"
    r"|^readme(?![^.]*\.(jsonl?|csv|tsv|parquet)\b)([\W_]|$)"
    r"|^(dataset_infos?|dataset_dict|configuration)\.json$|^(thumbs\.db|desktop\.ini|__macosx)"
    r"|^(icon\r|system volume information|requirements\.txt)$|^(md5|sha\d*|check)sums?\b|~$"
    r"|\.(pdf|rtf|md5|sha\d+|\w+sum|lock|part|crc|db|ini|ya?ml|log|bak|orig|te?mp|swp|crdownload"
    r"|py|ipynb|sh|bat|exe|dll|lnk|url|torrent|html?"
    r"|jpe?g|png|gif|webp|bmp|svg|tiff?|mp[34]|wav|flac|m4a|avi|mkv|mov|model|bin|pt|safetensors)$"
)
FOREIGN = {
    b"\xd0\xcf\x11\xe0": "an old Office file; save it as CSV UTF-8, JSON lines or plain text",
    b"%PDF": "a PDF; save its text as .txt in UTF-8",
    b"{\\rtf": "a rich text document; save it as plain text (.txt, UTF-8)",
    b"<!DOCTYPE html": "a web page; save its text as .txt in UTF-8",
    b"<html": "a web page; save its text as .txt in UTF-8",
    b"Rar!": "a RAR archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (zstd -d)",
    b"SQLite format 3": "an SQLite database; export its table as CSV",
    b"\x89PNG": "an image; move it away",
    b"\xff\xd8\xff": "an image; move it away",
}
OFFICE = {"ppt/": "a presentation; save it as plain text (.txt, UTF-8)",
          "META-INF/container.xml": "a book (EPUB); save its text as .txt in UTF-8",
          "content.xml": "an OpenDocument file; save it as CSV UTF-8 or plain text"}  # fmt: skip


class Record(NamedTuple):
    """One entry of a raw file.

    n: running number over all parts that are read together, skipped entries included
    split: "train", "val" or "test" where the name of the file or its folder says so
    data: a dict or list (JSON), a dict of columns (a table), or a line of text
    """

    n: int
    where: str
    split: str | None
    data: Any

    def skip(self, reason: str, sample: str = "", broken: bool = False, why: str = "") -> Skip:
        """The note that this record is left out."""
        return Skip(reason, self.where, sample or str(self.data), broken, why)


def as_row(record: Record, **fields: object) -> dict:
    """A row made of a record: its number as id, its official split, and the given fields."""
    return {"id": record.n, **fields} | ({"split": record.split} if record.split else {})


def split_of(path: str) -> str | None:
    """The part that a file's name states, or else the nearest of its folders."""
    names = reversed(path.replace("\\", "/").split("/"))
    return next(filter(None, map(part_of, names)), None)


def is_ignored(path: str) -> bool:
    """True if a file, or a folder that it lies in, cannot be data."""
    return any(map(IGNORED.search, path.replace("\\", "/").split("/")))


def sorted_files(raw_dir: Path, inputs: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
    """The data files under a directory (or the one file named), held-out parts first, and those
    that are left alone.

    De-duplication keeps what it sees first, so a test row is never lost to its copy in train.
    inputs: patterns of names; empty: all that can be data
    raises: DataError if there is none
    """
    if raw_dir.is_file():
        return [raw_dir], []
    files, left = [], []
    for path in sorted(raw_dir.rglob("*")):
        if path.is_file():
            wanted = not inputs or any(fnmatchcase(path.name, pattern) for pattern in inputs)
            inside = path.relative_to(raw_dir).as_posix()
            (files if wanted and not is_ignored(inside) else left).append(path)
    if not files:
        names = ", ".join(path.name for path in left[:5]) or "none"
        raise DataError(f"{shown(raw_dir)}: wanted data files{' like ' * bool(inputs)}"
                        f"{', '.join(inputs)}, found {names}; see --raw")  # fmt: skip
    return sorted(files, key=lambda p: ORDER[split_of(p.relative_to(raw_dir).as_posix())]), left


class Part(NamedTuple):
    """A file, or a piece of one that begins and ends with whole lines.

    name: how places in it are called
    layout: its format (formats.py); empty: decided by the bytes
    """

    path: Path
    name: str
    start: int = 0
    end: int | None = None
    layout: str = ""


def whole_files(raw_dir: Path, inputs: Sequence[str] = ()) -> list[Part]:
    """The data files of a place as parts, in their fixed order."""
    return [
        Part(path, path.name if path == raw_dir else path.relative_to(raw_dir).as_posix())
        for path in sorted_files(raw_dir, inputs)[0]
    ]


def records(
    raw: Path | Iterable[Part], encoding: str, layout: str = "", columns: Collection[str] = ()
) -> Iterator[Record | Skip]:
    """Every entry of a file, of a directory's files, or of some parts, in a fixed order.

    layout: of parts that do not state one
    columns: names by which the first line of a table is known
    """
    number = 0
    for part in whole_files(raw) if isinstance(raw, Path) else raw:
        try:
            with open(part.path, "rb") as file:
                for name, stream in _open(part, file):
                    split = split_of(name.split("+")[0])
                    found = _entries(name, stream, encoding, part.layout or layout, columns)
                    for place, data in found:
                        if isinstance(data, Skip):
                            yield data
                        elif isinstance(data, OfPart):
                            yield Record(number, place, data.part, data.data)
                        else:
                            yield Record(number, place, split, data)
                        number += 1
        except DAMAGED as error:
            if isinstance(error, RuntimeError) and "password" in str(error):
                raise DataError(f"{shown(part.path)}: wanted an open archive, found one that wants "
                                f"a password; unpack it first") from None  # fmt: skip
            raise DataError(
                f"{shown(part.path)}: wanted a whole file, found it cut or damaged after "
                f"{number} entries ({error}); download it again"
            ) from None


Source = io.BufferedReader | Iterator[tuple[str, Any]]


def _open(part: Part, file: io.BufferedReader) -> Iterator[tuple[str, Source]]:
    if part.end is None:
        return _streams(part.name, file)
    name = f"{part.name}+{part.start}" if part.start else part.name
    file.seek(part.start)
    return iter([(name, io.BufferedReader(io.BytesIO(file.read(part.end - part.start))))])


def _streams(name: str, file: Any, depth: int = DEPTH) -> Iterator[tuple[str, Source]]:
    """The uncompressed files inside a binary one, itself or all members of an archive: each as a
    stream of bytes, or of entries where it is a table."""
    reader: Any = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    head = reader.peek(512)
    unpack = next((UNPACK[magic] for magic in UNPACK if head.startswith(magic)), None)
    is_zip, is_tar = head.startswith(b"PK\x03\x04"), head[257:262] == b"ustar"
    if depth == 0 and (unpack or is_zip or is_tar):
        raise DataError(f"{name}: wanted data, found archives inside archives; unpack them first")
    if foreign := next((FOREIGN[magic] for magic in FOREIGN if head.startswith(magic)), None):
        raise DataError(f"{name}: wanted JSON, a table or text, found {foreign}")
    if unpack is gzip.GzipFile:
        with gzip.GzipFile(fileobj=reader) as inner:
            yield from _streams(name, inner, depth - 1)
    elif unpack:
        yield from _streams(name, io.BufferedReader(_Pieces(_unpacked(reader, unpack))), depth - 1)
    elif is_zip:
        whole = _seekable(name, reader)
        with zipfile.ZipFile(whole) as archive:
            yield from _zipped(name, archive, whole, depth)
    elif is_tar:
        with tarfile.open(fileobj=reader, mode="r|", tarinfo=_Checked) as archive:
            for entry in archive:
                if entry.sparse:  # a few bytes may claim to be petabytes of zeros
                    raise DataError(f"{name}/{entry.name}: a sparse file; unpack the archive first")
                if entry.isfile() and not is_ignored(entry.name):
                    yield from _streams(
                        f"{name}/{entry.name}", archive.extractfile(entry), depth - 1
                    )
    elif head[:4] == b"PAR1":
        yield name, parquet(name, _seekable(name, reader))
    else:
        yield name, reader


def _zipped(
    name: str, archive: zipfile.ZipFile, file: IO[bytes], depth: int
) -> Iterator[tuple[str, Source]]:
    members = archive.infolist()
    inside = {member.filename for member in members}
    if "xl/workbook.xml" in inside or (
        "[Content_Types].xml" in inside and any(n.startswith("xl/") for n in inside)
    ):
        yield name, workbook(name, file)
        return
    if "word/document.xml" in inside:
        lines = paragraphs(name, file)
        yield name, ((f"{name}:{n}", line) for n, line in enumerate(lines, 1))
        return
    for start, what in OFFICE.items():
        if any(member.startswith(start) for member in inside) and (
            inside & {"[Content_Types].xml", "mimetype"}
        ):
            raise DataError(f"{name}: wanted JSON, a table or text, found {what}")
    for member in sorted(members, key=_member_name):
        called = _member_name(member)
        if not called.endswith("/") and not is_ignored(called):
            with archive.open(member) as inner:
                yield from _streams(f"{name}/{called}", inner, depth - 1)


def _member_name(member: zipfile.ZipInfo) -> str:
    """A member's name; where it is not said to be UTF-8, Chinese Windows has written GBK."""
    called = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            called = called.encode("cp437").decode("gb18030")
    return called.replace("\\", "/")


def _seekable(name: str, reader: io.BufferedReader) -> IO[bytes]:
    """A file in which one can go back, as archives of tables and members need."""
    if reader.seekable():
        return reader
    whole = reader.read(LARGEST_TABLE)
    if len(whole) == LARGEST_TABLE:
        raise DataError(f"{name}: wanted at most {LARGEST_TABLE:,} bytes of an archive or a table "
                        f"inside an archive; unpack it first")  # fmt: skip
    return io.BytesIO(whole)


UNPACK = {
    b"\x1f\x8b": gzip.GzipFile,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
    b"BZh": bz2.BZ2Decompressor,
}
PIECE = 1 << 16


class _Pieces(io.RawIOBase):
    """The bytes that an iterator gives, as a stream."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._left = iter(pieces), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and (piece := next(self._pieces, None)) is not None:
            self._left = memoryview(piece)
        n_bytes = min(len(buffer), len(self._left))
        buffer[:n_bytes], self._left = self._left[:n_bytes], self._left[n_bytes:]
        return n_bytes


def _unpacked(packed: io.BufferedReader, new: Callable[[], Any]) -> Iterator[bytes]:
    """The bytes of a bzip2 or xz file. Python's own readers take what follows a finished stream for
    padding if it does not look like another one, and a damaged file so ends early; not here."""
    stream, n_read, start, piece = new(), 0, 0, b""
    while True:
        if stream.eof:
            piece = stream.unused_data.lstrip(b"\0")
            while not piece and (more := packed.read(PIECE)):
                n_read += len(more)
                piece = more.lstrip(b"\0")
            if not piece:
                return
            start, stream = n_read - len(piece), new()
        elif stream.needs_input:
            piece = packed.read(PIECE)
            n_read += len(piece)
            if not piece:
                raise EOFError(f"it ends inside the stream that begins at byte {start:,}")
        try:
            found = stream.decompress(piece, io.DEFAULT_BUFFER_SIZE)
        except (OSError, lzma.LZMAError) as error:
            where = f"in the stream that begins at byte {start:,}"
            raise OSError(f"{error}, {where}") from None
        piece = b""
        if found:
            yield found


class _Checked(tarfile.TarInfo):
    """A tar header. For Python a damaged one ends the archive, and a note may be of any size."""

    MOST = 1 << 20  # bytes of a long name or of a note

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Checked":
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed lacks it
            raise
        except tarfile.HeaderError as error:
            raise OSError(f"tar: {error}") from None
        if found.type in b"xgXLK" and found.size > cls.MOST:
            raise OSError(f"tar: a header that claims {found.size:,} bytes")
        return found


def _entries(
    name: str, source: Source, encoding: str, layout: str, columns: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """(place, entry or Skip) for every entry of an uncompressed file."""
    if not isinstance(source, io.BufferedReader):
        yield from source
        return
    head = source.read(HEAD)
    _check_encoding(name, head, encoding)
    whole = io.BufferedReader(_Pieces(chain([head], iter(lambda: source.read(PIECE), b""))))
    text = io.TextIOWrapper(whole, encoding, errors="surrogateescape", newline="\n")
    try:
        what = layout or format_of(head, encoding, name, columns)
        yield from entries(name, text, what, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: wanted {encoding}, found {error}; see --encoding") from None


def _check_encoding(name: str, head: bytes, encoding: str) -> None:
    """Refuse a file that is plainly written in another encoding, or is no text."""
    if head[:2] in WIDE_BOMS or head.count(b"\0") > len(head) // 10:
        wrong = not encoding.lower().replace("_", "-").startswith("utf-16")
    else:
        n_wide = len(head) - len(head.translate(None, WIDE_BYTES))
        # Single bad bytes are damaged lines; another encoding breaks most characters.
        n_bad = len(SURROGATE.findall(head.decode(encoding, "surrogateescape")))
        wrong = n_bad > 0.3 * n_wide
    if wrong and (likely := likely_encoding(head)):
        raise DataError(
            f"{name}: wanted text in {encoding}, found another encoding, likely {likely}; run "
            f"again with --encoding {likely}, or move the file away if it is no text"
        )
    if wrong:
        raise DataError(f"{name}: wanted text in {encoding}, found no text; move the file away")


# Jobs: the raw files of a set in portions of about the same size. A long file of lines is cut into
# pieces that end with a line; short files are put together. The division depends on the files
# alone, never on the number of workers.

JOB_BYTES = 64 << 20  # some ten seconds of work for one process
PACKED = (*UNPACK, b"PK\x03\x04", b"PAR1")
WIDE = ("utf16", "utf32")  # encodings in which the byte \n may be half a character


def is_packed(head: bytes) -> bool:
    """True if the first bytes are those of an archive, or of a table that is no text."""
    return head.startswith(PACKED) or head[257:262] == b"ustar"


def divide(
    files: Iterable[Part], encoding: str, layout: str = "", job_bytes: int = JOB_BYTES,
    columns: Collection[str] = (), may_cut: bool = True,
) -> list[list[Part]]:  # fmt: skip
    """Jobs, each a list of parts in their fixed order.

    may_cut: a file's records do not depend on their neighbours
    """
    jobs: list[list[Part]] = []
    room = 0
    for file in files:
        parts = _cut(file, layout, encoding, job_bytes, columns) if may_cut else (file,)
        for part in parts:
            size = (part.end or part.path.stat().st_size) - part.start
            if not jobs or size > room:
                jobs.append([])
                room = job_bytes
            jobs[-1].append(part)
            room -= size
    return jobs


def _cut(
    part: Part, layout: str, encoding: str, job_bytes: int, columns: Collection[str]
) -> Iterator[Part]:
    size = part.path.stat().st_size
    with open(part.path, "rb") as file:
        head = file.read(HEAD)
        layout = layout or format_of(head, encoding, part.name, columns)
        wide = encoding.lower().replace("-", "").startswith(WIDE)
        if size <= 1.5 * job_bytes or is_packed(head) or wide or layout not in ("lines", "text"):
            yield part
            return
        start = 0
        while start < size:
            end = min(start + job_bytes, size)
            if end < size:
                file.seek(end)  # the line that holds this byte goes to the end
                while (piece := file.readline(HEAD)) and not piece.endswith(b"\n"):
                    pass
                end = file.tell()
            yield part._replace(start=start, end=end, layout=layout)
            start = end
