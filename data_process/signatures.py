"""What rows leave on disk so that their copies can be found, and the way back to a row.

`sign_shard` reads the rows of one JSONL shard once and writes four plain .npy files; `Corpus` reads
the signatures of all shards for near_duplicates.py, which decides who goes.

Disk: 8 bytes a part, 16 x 8 of bands, 12 of places: about 150 bytes a row. Memory: one batch of
BATCH_BYTES (at least one row), some thirty times over, and 8 bytes a part of the shard.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.format import open_memmap

from babyllama.cli import shown
from babyllama.errors import DataError
from data_process.dedup import fingerprint, parts
from data_process.minhash import PIECE, DedupConfig, band_keys, sides

BATCH_BYTES = 1 << 21
SIGNATURE = ("marks", "ends", "bands", "lines")
HELD_OUT = ("val", "test")  # values of "split" in rows that their publisher holds out

T = TypeVar("T")
Signed = tuple[Path, Path]  # a shard, the stem of its signature


def marks_of(row: dict[str, Any]) -> list[int]:
    """One number for each part of a row that must not stand in another row.

    Of 200 million parts two different ones share their number with a probability of 0.1 %.
    """
    return [int.from_bytes(fingerprint(part)[:8], "little") or 1 for part in parts(row)]


@dataclass
class Batch:
    """Some rows of a shard that follow each other: what their signatures are made of.

    ends: where their lines end in the shard, in bytes
    """

    first: int
    ends: list[int] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def each_row(path: Path, take: Callable[[dict], T]) -> Iterator[tuple[int, T]]:
    """(size of its line in bytes, what `take` makes of it) for each row of a shard.

    raises: DataError at the first line that is not a row
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield len(line), take(json.loads(line))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{shown(path)}:{number}: wanted a canonical row, found {line[:60]!r} "
                    f"({type(error).__name__}); make the shard again"
                ) from None


def _marks_and_text(row: dict[str, Any]) -> tuple[list[int], str]:
    return marks_of(row), "".join(sides(row))


def read_batches(path: Path) -> Iterator[Batch]:
    """A shard's rows, about BATCH_BYTES at a time."""
    batch, begin, end = Batch(0), 0, 0
    for n_bytes, (marks, text) in each_row(path, _marks_and_text):
        end += n_bytes
        batch.ends.append(end)
        batch.marks.append(marks)
        batch.texts.append(text)
        if end - begin >= BATCH_BYTES:
            yield batch
            batch, begin = Batch(batch.first + len(batch.ends)), end
    if batch.ends:
        yield batch


def sign_shard(source: Path, target: Path, cfg: DedupConfig) -> dict[str, Any]:
    """Write the signatures of a shard's rows, and count the rows.

    <target>.marks.npy   (M,) uint64: the marks of all parts, row by row
    <target>.ends.npy    (N,) uint32: where each row's marks end
    <target>.bands.npy   (bands, N) uint64, 0: too short
    <target>.lines.npy   (N + 1,) int64: where each line begins in the shard, and its size
    """
    with open(source, "rb") as file:
        n_rows = sum(1 for _ in file)
    paths = signature_paths(target)
    ends = open_memmap(paths["ends"], "w+", np.uint32, (n_rows,))
    bands = open_memmap(paths["bands"], "w+", np.uint64, (cfg.bands, n_rows))
    lines = open_memmap(paths["lines"], "w+", np.int64, (n_rows + 1,))
    lines[0] = 0
    marks: list[np.ndarray] = []
    n_marks = n_short = 0
    for batch in read_batches(source):
        here = slice(batch.first, batch.first + len(batch.ends))
        marks.append(np.fromiter(chain.from_iterable(batch.marks), np.uint64))
        ends[here] = n_marks + np.cumsum([len(of_row) for of_row in batch.marks])
        bands[:, here] = band_keys(batch.texts, cfg)
        lines[here.start + 1 : here.stop + 1] = batch.ends
        n_marks += len(marks[-1])
        n_short += sum(len(text) < PIECE for text in batch.texts)
    np.save(paths["marks"], np.concatenate([*marks, np.empty(0, np.uint64)]))
    files = [path.name for path in paths.values()]
    return {"rows": n_rows, "marks_only": n_short, "files": files}


def signature_paths(target: Path) -> dict[str, Path]:
    """The files of a signature, by what they hold."""
    return {name: target.with_name(f"{target.name}.{name}.npy") for name in SIGNATURE}


class Corpus:
    """All rows under running numbers: their keys, and their texts at random."""

    def __init__(self, shards: Sequence[Signed], cfg: DedupConfig | None = None) -> None:
        self.shards = shards
        self.starts = [0]
        for shard, stem in shards:
            paths = signature_paths(stem)
            try:
                lines, bands = (np.load(paths[name], mmap_mode="r") for name in ("lines", "bands"))
                same = lines[-1] == shard.stat().st_size and (not cfg or len(bands) == cfg.bands)
            except (OSError, ValueError) as error:
                raise _unsigned(shard, stem, str(error)) from None
            if not same:
                raise _unsigned(shard, stem, "one of other settings or of another file")
            self.starts.append(self.starts[-1] + len(lines) - 1)
        self.n_rows = self.starts[-1]
        assert self.n_rows < 2**32 - 1
        self._lines = lru_cache(256)(self._map_lines)

    def _map_lines(self, number: int) -> np.ndarray:
        # A plain view: a memmap takes ten times as long to be sliced.
        return np.asarray(np.load(signature_paths(self.shards[number][1])["lines"], mmap_mode="r"))

    def place_of(self, row: int) -> tuple[int, int]:
        """(shard, row in it)"""
        shard = bisect_right(self.starts, row) - 1
        return shard, row - self.starts[shard]

    def row(self, row: int) -> dict[str, Any]:
        shard, number = self.place_of(row)
        begin, end = self._lines(shard)[number : number + 2].tolist()
        # Read, not mapped: the pages of a mapped shard would count as this process's memory.
        with open(self.shards[shard][0], "rb", buffering=0) as file:
            file.seek(begin)
            return json.loads(file.read(end - begin))

    def column(self, band: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, keys) of each shard: the keys of a band, or the marks."""
        for (_, stem), start in zip(self.shards, self.starts, strict=False):
            paths = signature_paths(stem)
            if band is None:
                ends = np.load(paths["ends"]).astype(np.int64)
                keys = np.load(paths["marks"], mmap_mode="r")
                rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
            else:
                keys = np.load(paths["bands"], mmap_mode="r")[band]
                rows = np.arange(len(keys))
            yield (rows + start).astype(np.uint32), keys


def _unsigned(shard: Path, stem: Path, found: str) -> DataError:
    return DataError(
        f"{shown(shard)}: wanted its signature {shown(stem)}.*.npy, found {found}; sign it again"
    )
