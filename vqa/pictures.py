"""Pictures of a set in tar files that are read in one direction, or by name at once.

    data/pictures/<set>/pictures-00000.tar      the pictures' own bytes, in the order of the rows
                        pictures-00000.index    bytes of the .tar, then "place size name" a line
                        counts.json             what pack.py took and what it left, with reasons

A tar file is what every tool opens and what a network disk likes: one long file, members of which
are whole encoded pictures behind 512 bytes of head. The index saves reading the heads; where it is
missing or old they are read. Formats of the user's own pictures are found by `Finder`.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from babyllama.config import atomic_write, from_repo, shown
from babyllama.errors import ConfigError, DataError

SHARD_BYTES = 1 << 30
COCO = "COCO_train2014_"


class Member(NamedTuple):
    shard: int
    place: int
    size: int


class Pictures:
    """The pictures of a packed set.

    names: in the order of the shards; a picture's number is its place here
    """

    def __init__(self, place: Path) -> None:
        """raises: DataError if there are none, or a shard is cut off"""
        self.place = from_repo(place)
        self._shards = sorted(self.place.glob("pictures-*.tar"))
        if not self._shards:
            raise DataError(
                f"{shown(self.place)}: wanted pictures-*.tar, found none; pack them: "
                f"python -m vqa.pack {self.place.name} --images DIRECTORY"
            )
        self._members: list[Member] = []
        self.number: dict[str, int] = {}
        for shard, path in enumerate(self._shards):
            for name, start, size in members(path):
                self.number[name] = len(self._members)
                self._members.append(Member(shard, start, size))
        self.names = list(self.number)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, number: int) -> bytes:
        """The bytes of a picture."""
        shard, start, size = self._members[number]
        return read_piece(self._shards[shard], start, size)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """All pictures with their names, in one pass over the files."""
        yield from ((name, self.read(number)) for name, number in self.number.items())


def read_piece(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file; safe from several threads."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def members(tar: Path) -> list[tuple[str, int, int]]:
    """(name, place, size) of each picture of a shard.

    raises: DataError if the file is cut off or no tar file
    """
    size, index = tar.stat().st_size, tar.with_suffix(".index")
    if index.is_file():
        head, *lines = index.read_text("utf-8").splitlines() or [""]
        if head == str(size):
            parts = [line.split(" ", 2) for line in lines]
            return [(name, int(start), int(n)) for start, n, name in parts]
    try:
        with tarfile.open(tar) as archive:
            found = [(m.name, m.offset_data, m.size) for m in archive.getmembers() if m.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown(tar)}: wanted a tar file, found {error}; pack it again") from None
    if found and found[-1][1] + found[-1][2] > size:
        raise DataError(f"{shown(tar)}: cut off inside {found[-1][0]!r}; pack or copy it again")
    return found


def write_index(tar: Path) -> None:
    """Write the index beside a finished shard."""
    index = tar.with_suffix(".index")
    index.unlink(missing_ok=True)
    lines = [f"{start} {size} {name}" for name, start, size in members(tar)]
    with atomic_write(index) as temporary:
        temporary.write_text("\n".join([str(tar.stat().st_size), *lines]) + "\n", "utf-8")


class Finder:
    """Finds the pictures that rows name: in a directory, in its tar files, in parquet rows.

    A name may lack or have the prefix that COCO's 2014 edition puts before numbers, and may have
    folders where the directory is flat. "file.parquet#7" is the picture of a parquet file's row 7,
    "file.parquet#7.1" the second one of a row that has several.
    """

    def __init__(self, root: Path) -> None:
        self.root = from_repo(root).resolve()
        if not self.root.is_dir():
            raise DataError(f"{root}: wanted the directory of the pictures, found none there")
        self._in_tars = {
            name: (tar, start, size)
            for tar in sorted(self.root.glob("*.tar"))
            for name, start, size in members(tar)
        }
        self._table: tuple[str, list] = ("", [])

    def find(self, name: str) -> bytes | Path | None:
        """The picture's bytes or its file; None if there is none.

        raises: DataError if the name leads out of the directory
        """
        file, _, row = name.partition("#")
        if row and file.endswith(".parquet"):
            return self._from_parquet(file, row)
        flat = name.rsplit("/", 1)[-1]
        bare = flat.removeprefix(COCO)
        folder = name[: -len(flat)]
        for tried in (name, folder + COCO + bare, folder + bare, flat, COCO + bare, bare):
            if tried in self._in_tars:
                return read_piece(*self._in_tars[tried])
            path = (self.root / tried).resolve()
            if not path.is_relative_to(self.root):
                raise DataError(f"{name!r} leads out of {shown(self.root)}")
            if path.is_file():
                return path
        return None

    def _from_parquet(self, file: str, row: str) -> bytes | None:
        if self._table[0] != file:
            path = (self.root / file).resolve()
            if not path.is_relative_to(self.root) or not path.is_file():
                return None
            self._table = (file, read_column(path, "image_bytes"))
        number, _, part = row.partition(".")
        held = self._table[1][int(number)] if int(number) < len(self._table[1]) else None
        if isinstance(held, list):
            held = held[int(part or 0)] if int(part or 0) < len(held) else None
        return held


def read_column(path: Path, name: str) -> list:
    """A column of a parquet file as Python objects.

    raises: ConfigError if pyarrow is missing, DataError if the file or the column is
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            "wanted pyarrow to read parquet, found it not installed; "
            "pip install -c constraints.txt -r requirements/vqa.txt"
        ) from None
    try:
        return parquet.read_table(path, columns=[name]).column(name).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{shown(path)}: wanted a column {name}, found {error}") from None
