"""The files of a benchmark as their publisher packed them: plain, .xz, .gz, in a tar or a zip.

A parquet file is seen as JSON lines, a row each.

A folder is seen through its archives: `mmlu/mmlu.tar.xz` and an unpacked `mmlu/dev/…` both hold
"dev/anatomy_dev.csv". Names are compared from the end, so an outer folder more does no harm.
"""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from babyllama.cli import shown
from babyllama.errors import ConfigError, DataError

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile,
           UnicodeDecodeError)  # fmt: skip


OWN = ("translated.jsonl", "failed.jsonl")  # what translate.py keeps beside its files


def find(folder: Path, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of the files that the first pattern with any match names, by name.

    raises: DataError if a file is damaged or no UTF-8 text; [] if nothing matches
    """
    for pattern in patterns:
        found = []
        for name, read in _inside(folder):
            if name in OWN:
                continue
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}"):
                found.append((name, _text(folder, name, read)))
        if found:
            return sorted(found)
    return []


def _text(folder: Path, name: str, read: Callable[[], bytes]) -> str:
    try:
        return read().decode("utf-8-sig")
    except DAMAGED as error:
        raise DataError(
            f"{shown(folder)}: wanted {name} as whole UTF-8 text, found {error}; get it again"
        ) from None


def _inside(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every file below a folder with a way to read it, while the archive it is in is open."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder).as_posix())
        if not path.is_file():
            continue
        try:
            yield from _entries(name, path)
        except DAMAGED as error:
            raise DataError(f"{shown(path)}: damaged, {error}; get the file again") from None


def _entries(name: str, path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if name.endswith((".tar", ".tar.xz", ".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, lambda m=member: archive.extractfile(m).read()
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                yield entry.filename, lambda e=entry: archive.read(e)
    elif name.endswith(".xz"):
        yield name[:-3], lambda: lzma.decompress(path.read_bytes())
    elif name.endswith(".gz"):
        yield name[:-3], lambda: gzip.decompress(path.read_bytes())
    elif name.endswith(".parquet"):
        yield name, lambda: _json_lines(path)
    else:
        yield name, path.read_bytes


def _json_lines(path: Path) -> bytes:
    """The rows of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            f"wanted pyarrow to read {shown(path)}, found it not installed; "
            f"pip install -c constraints.txt -r requirements/bench.txt"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())[:200]) from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def lines(text: str) -> io.StringIO:
    """A text line by line: only a line feed ends one, for texts hold U+2028 and the like."""
    return io.StringIO(text, newline="\n")
