"""Decides which rows go because an earlier row that stays says the same.

Rows are visited in their global order: shard by shard, line by line. A row goes as "duplicate" if
a part of it stands in a row that stays, and as "near_duplicate" if one that shares a band key with
it has a Jaccard similarity of cfg.threshold or more, compared exactly (sides, pieces).
So of each family the first row stays, every dropped row has a partner that stays, and a second
run over what stayed drops nothing. Rows that their publisher holds out ("split": val or test) go
as exact copies only, and later rows are compared with them.

Two passes. First, column by column (the marks, then each band), the keys that more than one row
has become pairs (row, place) on disk; a place is room for the rows that stay and have the key.
Keys are taken in so many portions, by their leading bits, that one fits in cfg.memory_mb. Then the
rows that have such keys are visited, with their places in one file that the system pages in and
out. A key of boilerplate is no trouble: a place holds the first 8 and the last 8 rows that stayed,
so a row is compared with at most 16 rows a band; what is left out is counted ("not_compared").

For 100 million rows of 500 characters, by what was measured on one core of an AMD EPYC: signatures
15 GB; signing (18,000 rows/s) 1.5 hours of one core, less on many, as shards are independent. First
pass: 17 columns at 150 ns a key, 5 minutes, and each column's 0.8 GB is read once for every
memory_mb that 48 bytes a key would fill. If 30 rows in 100 share 8 keys each, 3 GB of pairs and
1 GB of places on disk, and the second pass takes 80 microseconds for each of them, the comparison
included: 40 minutes, and what the disk takes to find the partners. It is one process, since who
stays depends on who stayed.

A part is a text but for space, punctuation and case. A summary row repeats if its text or its
headline does: a headline learnt in training would give away a row of the test set.

Band keys are MinHash of Chinese text. After Broder (1997) and Leskovec et al., Mining of Massive
Datasets, chapter 3: two rows whose sets of 5-character pieces have Jaccard similarity J agree in
all 6 minima of at least one of 16 bands with probability 1 - (1 - J^6)^16: 0.992 at 0.8, 0.9995 at
0.85, 0.22 at 0.5. Pairs found so are compared exactly afterwards, so the bands decide only what is
compared. White space and case do not count; rows with fewer than 5 characters left have no keys.

What rows leave on disk so that their copies can be found: `sign_shard` reads the rows of one JSONL
shard once and writes four plain .npy files; `Corpus` reads the signatures of all shards.

Disk: 8 bytes a part, 16 x 8 of bands, 12 of places: about 150 bytes a row. Memory: one batch of
BATCH_BYTES (at least one row), some thirty times over, and 8 bytes a part of the shard.
"""

import hashlib
import json
import re
import shutil
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.format import open_memmap

from babyllama.config import shown
from babyllama.errors import ConfigError, DataError
from data_process.executor import write_whole

NO_WORD = re.compile(r"[\W_]+")


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ in nothing but space, punctuation and case."""
    plain = NO_WORD.sub("", text).lower() or text
    return hashlib.blake2b(plain.encode(), digest_size=12).digest()


def parts(row: dict[str, Any]) -> list[str]:
    """The texts of a row that must not stand in another row, each with its role."""
    if "messages" in row:
        return ["\n".join(f"{m['role']}:{m['content']}" for m in row["messages"])]
    return [f"{key}:{row[key]}" for key in ("text", "summary") if row.get(key)]


PIECE = 5  # characters
BASE = 0x9E3779B97F4A7C15  # of the rolling hash: odd, without a pattern
TILE = 1 << 16  # hashes that stay in the processor's cache while all minima are taken


@dataclass(frozen=True)
class DedupConfig:
    """Search for near-duplicates.

    Args:
        threshold: Jaccard similarity of two rows' 5-character pieces from which the later one goes
        bands: keys per row; more find more of the pairs near the threshold, at 8 bytes each
        band_rows: minima per key; more save comparisons of unlike rows
        memory_mb: working memory of find_duplicates, beside 60 MB for the process itself
    """

    threshold: float = 0.8
    bands: int = 16
    band_rows: int = 6
    memory_mb: int = 512

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("bands", "band_rows", "memory_mb")}
        if not 0 < self.threshold <= 1 or min(counts.values()) < 1:
            raise ConfigError(
                f"wanted a dedup threshold above 0 and up to 1, and {', '.join(counts)} of 1 or "
                f"more; found {self.threshold} and {', '.join(map(str, counts.values()))}"
            )


def bare(text: str) -> str:
    """A text without white space, in lower case: what is compared."""
    return "".join(text.split()).lower()


def sides(row: dict[str, Any]) -> tuple[str, ...]:
    """The bare texts that must all be similar in two rows, for the later one to go.

    A dialogue has two, what is asked and what is answered: many questions about one text are no
    copies, nor are many questions with one answer. What the system says is left out. Of a summary
    row only the text counts.
    """
    if "messages" not in row:
        return (bare(row["text"]),)
    return tuple(
        bare("".join(turn["content"] for turn in row["messages"] if turn["role"] == role))
        for role in ("user", "assistant")
    )


def rolling_hash(codes: np.ndarray, width: int) -> np.ndarray:
    """Hashes of all windows of `width` neighbours: a polynomial modulo 2^32 or 2^64.

    codes: (N,) uint32 or uint64, N >= width
    returns: (N - width + 1,) of the same type
    """
    n_values = 2 ** (8 * codes.itemsize)
    found, size = codes, 1
    # As in fast powers: the width's binary digits say when to double and when to add one.
    for digit in f"{width:b}"[1:]:
        found = found[:-size] * codes.dtype.type(pow(BASE, size, n_values)) + found[size:]
        size *= 2
        if digit == "1":
            found = found[:-1] * codes.dtype.type(BASE % n_values) + codes[size:]
            size += 1
    return found


def code_points(text: str, dtype: type = np.uint32) -> np.ndarray:
    """The characters of a text as numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(dtype)


def pieces(text: str) -> np.ndarray:
    """The set of a bare text's 5-character pieces, as sorted 64-bit hashes.

    Two different pieces share a hash with a probability below 2^-40. A shorter text is one piece.
    """
    hashes = np.sort(rolling_hash(code_points(text.ljust(PIECE, "\0"), np.uint64), PIECE))
    return hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Similarity of two sets of pieces: what they share of what they have."""
    both = np.concatenate((left, right))
    both.sort()
    n_shared = np.count_nonzero(both[1:] == both[:-1])
    return n_shared / (len(both) - n_shared)


def minima(texts: list[str], n_hashes: int) -> np.ndarray:
    """The smallest hash of each text's pieces under each of several hash functions.

    texts: bare, of PIECE characters or more
    returns: (n_hashes, len(texts)) uint32
    """
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.cumsum(lengths) - lengths
    codes = code_points("".join(texts))
    hashes = np.empty_like(codes)
    hashes[: len(codes) - PIECE + 1] = _mixed(rolling_hash(codes, PIECE))
    # Pieces that would run over a text's end repeat its last one, which no minimum notices.
    last = (starts + lengths - PIECE)[:, None]
    hashes[last + np.arange(1, PIECE)] = hashes[last]
    # Texts are cut where tiles end, and the minima of their parts joined afterwards.
    cuts = np.union1d(starts, np.arange(0, len(codes), TILE))
    found = np.empty((n_hashes, len(cuts)), np.uint32)
    multipliers = _odd_numbers(n_hashes, "<u4")
    product = np.empty(TILE, np.uint32)
    for begin in range(0, len(codes), TILE):
        tile = hashes[begin : begin + TILE]
        first, end = np.searchsorted(cuts, (begin, begin + TILE))
        for number, multiplier in enumerate(multipliers):
            np.multiply(tile, multiplier, out=product[: len(tile)])
            np.minimum.reduceat(
                product[: len(tile)], cuts[first:end] - begin, out=found[number, first:end]
            )
    return np.minimum.reduceat(found, np.searchsorted(cuts, starts), axis=1)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """32-bit hashes whose every bit depends on every bit (the finalizer of MurmurHash3)."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(multiplier)
    return hashes


def _odd_numbers(n: int, dtype: str) -> np.ndarray:
    """Fixed numbers without a pattern, the same on every machine."""
    data = hashlib.shake_256(b"minhash").digest(n * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype) | 1


def band_keys(texts: list[str], cfg: DedupConfig) -> np.ndarray:
    """The keys of bare texts, (cfg.bands, len(texts)) uint64; 0 where a text is too short."""
    keys = np.zeros((cfg.bands, len(texts)), np.uint64)
    long = [number for number, text in enumerate(texts) if len(text) >= PIECE]
    if long:
        smallest = minima([texts[number] for number in long], cfg.bands * cfg.band_rows)
        bands = smallest.reshape(cfg.bands, cfg.band_rows, len(long)).astype(np.uint64)
        found = (bands * _odd_numbers(cfg.band_rows, "<u8")[:, None]).sum(axis=1, dtype=np.uint64)
        found ^= found >> np.uint64(32)
        found *= np.uint64(0xD6E8FEB86659FD93)
        found ^= found >> np.uint64(32)
        keys[:, long] = np.maximum(found, 1)
    return keys


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


__all__ = ["DedupConfig", "dedup_shards", "find_duplicates", "load_drops", "pairs", "sign_shard"]

REASONS = ("duplicate", "near_duplicate")
FIRST, LAST = 8, 8  # rows that a place holds
KEY_BYTES = 48  # of working memory for each key of a portion
BLOCK = 1 << 16  # rows that are visited together
CACHE_PIECES = 1 << 22  # of partners that are kept ready
DROP = np.dtype([("row", "<u4"), ("reason", "u1"), ("kept_shard", "<u4"), ("kept_row", "<u4")])


def find_duplicates(shards: Sequence[Signed], target: Path, cfg: DedupConfig) -> dict[str, int]:
    """Write <target>/00000.npy …, one for each shard in order: its rows that go, as DROP.

    The directory is replaced as a whole. Counts: rows, each reason, pairs compared and not.
    raises: DataError if a signature is missing, or of other settings or another shard
    """
    fresh = target.with_name(f"tmp-{target.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "work").mkdir(parents=True)
    try:
        corpus = Corpus(shards, cfg)
        n_places, n_marks, files = _shared_keys(corpus, fresh / "work", cfg)
        shape = (max(1, n_places),)
        places = np.memmap(fresh / "work" / "places", np.uint32, "w+", shape=shape)
        counts = _visit(corpus, files, places, n_marks, fresh, cfg)
        del files, places  # a mapped file cannot be removed on Windows
        shutil.rmtree(fresh / "work")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return counts


def dedup_shards(
    shards: Sequence[Signed], target: Path, cfg: DedupConfig, key: str
) -> dict[Path, Path]:
    """`find_duplicates`, if it was not done before with the same key; each shard's list."""
    done = target / "done.json"
    try:
        stands = json.loads(done.read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, LookupError, TypeError):
        stands = False
    if not stands:
        counts = find_duplicates(shards, target, cfg)
        write_whole(done, json.dumps({"key": key, "counts": counts}))
    return {shard: target / f"{number:05d}.npy" for number, (shard, _) in enumerate(shards)}


def load_drops(path: Path) -> dict[int, tuple[str, str]]:
    """The rows of a shard that go: row -> (reason, which row stays)."""
    return {
        int(drop["row"]): (
            REASONS[drop["reason"]],
            f"[as row {drop['kept_row']} of shard {drop['kept_shard']}]",
        )
        for drop in np.load(path)
    }


def pairs(shards: Sequence[Signed], target: Path) -> Iterator[tuple[str, dict, dict]]:
    """(reason, row that goes, row that stays) for all that find_duplicates dropped."""
    corpus = Corpus(shards)
    for number in range(len(shards)):
        for drop in np.load(target / f"{number:05d}.npy"):
            gone = corpus.row(corpus.starts[number] + int(drop["row"]))
            kept = corpus.row(corpus.starts[drop["kept_shard"]] + int(drop["kept_row"]))
            yield REASONS[drop["reason"]], gone, kept


def _shared_keys(
    corpus: Corpus, work: Path, cfg: DedupConfig
) -> tuple[int, int, list[tuple[np.ndarray, np.ndarray]]]:
    """Who shares keys: size of all places, size of those for marks, and for each portion of
    each column the mapped arrays (rows, ascending; their places)."""
    n_places, n_marks, files = 0, 0, []
    n_keys = max(corpus.n_rows, sum(len(keys) for _, keys in corpus.column(None)))
    n_bits = max(0, int(n_keys * KEY_BYTES / (cfg.memory_mb << 20)).bit_length())
    for band in (None, *range(cfg.bands)):
        room = 1 if band is None else FIRST + LAST
        for portion in range(1 << n_bits):
            rows, places, n_places = _shared(corpus.column(band), portion, n_bits, room, n_places)
            if len(rows):
                paths = [work / f"{len(files)}.{name}.npy" for name in ("rows", "places")]
                np.save(paths[0], rows)
                np.save(paths[1], places)
                files.append(tuple(np.load(path, mmap_mode="r") for path in paths))
        n_marks = n_places if band is None else n_marks
    return n_places, n_marks, files


def _shared(
    column: Iterator[tuple[np.ndarray, np.ndarray]], portion: int, n_bits: int, room: int, at: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows of a portion's keys that several rows have, the keys' places from `at` on, and
    where the places end. A place is a counter and room for rows; for marks (room 1) one row."""
    picked = []
    for rows, keys in column:
        mine = keys != 0
        if n_bits:
            mine &= keys >> np.uint64(64 - n_bits) == portion
        picked.append((rows[mine], keys[mine]))
    rows, keys = (np.concatenate(arrays) for arrays in zip(*picked, strict=True))
    del picked
    order = np.argsort(keys)
    rows, keys = rows[order], keys[order]
    del order
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])[: len(keys) + 1]))
    sizes = np.diff(first, append=len(keys))
    shared = sizes > 1
    sizes_shared = sizes[shared]
    width = np.minimum(sizes_shared, room) + (room > 1)
    places = np.repeat(at + np.cumsum(width) - width, sizes_shared)
    rows = rows[np.repeat(shared, sizes)]
    order = np.argsort(rows)
    return rows[order], places[order], at + int(width.sum())


def _visit(
    corpus: Corpus,
    files: list[tuple[np.ndarray, np.ndarray]],
    places: np.ndarray,
    n_marks: int,
    out: Path,
    cfg: DedupConfig,
) -> dict[str, int]:
    """Go through the rows that share keys, in order, and write who goes."""
    stayed, compare = Stayed(places, n_marks), Comparison(corpus, cfg.threshold)
    counts = Counter(rows=corpus.n_rows, **dict.fromkeys((*REASONS, "compared", "not_compared"), 0))
    shard, gone = 0, []
    for row, its_places in _by_row(files, corpus.n_rows):
        while row >= corpus.starts[shard + 1]:
            np.save(out / f"{shard:05d}.npy", np.array(gone, DROP))
            shard, gone = shard + 1, []
        reason, partner = 0, stayed.owner(its_places)
        if partner is None:
            candidates, n_left_out = stayed.candidates(its_places)
            reason, partner = 1, compare.first_similar(row, candidates)
            counts["not_compared"] += n_left_out
        if partner is None:
            stayed.add(row, its_places)
        else:
            gone.append((row - corpus.starts[shard], reason, *corpus.place_of(partner)))
            counts[REASONS[reason]] += 1
    for number in range(shard, len(corpus.shards)):
        np.save(out / f"{number:05d}.npy", np.array(gone, DROP))
        gone = []
    counts["compared"] = compare.n_compared
    return dict(counts)


def _by_row(
    files: list[tuple[np.ndarray, np.ndarray]], n_rows: int
) -> Iterator[tuple[int, list[int]]]:
    """(row, its places) in the order of rows, from arrays that each are in that order."""
    at = [0] * len(files)
    for block in range(0, n_rows, BLOCK):
        # An uint32, or searchsorted would copy the array to compare it.
        ends = [int(np.searchsorted(rows, np.uint32(block + BLOCK))) for rows, _ in files]
        cut = [slice(*bounds) for bounds in zip(at, ends, strict=True)]
        at = ends
        if not any(part.stop > part.start for part in cut):
            continue
        rows = np.concatenate([f[0][part] for f, part in zip(files, cut, strict=True)])
        places = np.concatenate([f[1][part] for f, part in zip(files, cut, strict=True)])
        order = np.argsort(rows, kind="stable")
        rows, places = rows[order], places[order].tolist()
        first = np.flatnonzero(np.diff(rows, prepend=rows[0] + 1)).tolist()
        for begin, end in zip(first, [*first[1:], len(rows)], strict=True):
            yield int(rows[begin]), places[begin:end]


class Stayed:
    """The rows that stayed, by the keys that they share with others.

    A mark's place holds 1 + the row that has it, or 0. A band key's place holds how many rows
    came, then the first FIRST of them and, going round, the LAST ones.
    """

    def __init__(self, places: np.ndarray, n_marks: int) -> None:
        self._held, self._n_marks = memoryview(places), n_marks

    def owner(self, its_places: list[int]) -> int | None:
        """The first row that stayed and has a part in common."""
        owners = [self._held[p] for p in its_places if p < self._n_marks and self._held[p]]
        return min(owners) - 1 if owners else None

    def candidates(self, its_places: list[int]) -> tuple[list[int], int]:
        """Rows to be compared, those with the most keys in common first; how many were left out."""
        shared: Counter[int] = Counter()
        n_left_out = 0
        for place in its_places:
            if place >= self._n_marks and (n_came := self._held[place]):
                n_held = min(n_came, FIRST + LAST)
                shared.update(self._held[place + 1 : place + 1 + n_held].tolist())
                n_left_out += n_came - n_held
        return sorted(shared, key=lambda row: (-shared[row], row)), n_left_out

    def add(self, row: int, its_places: list[int]) -> None:
        held = self._held
        for place in its_places:
            if place < self._n_marks:
                held[place] = row + 1
                continue
            n_came = held[place]
            slot = n_came if n_came < FIRST + LAST else FIRST + (n_came - FIRST) % LAST
            held[place + 1 + slot] = row
            held[place] = n_came + 1


class Comparison:
    """Compares rows by their texts; keeps the pieces of some recent partners."""

    def __init__(self, corpus: Corpus, threshold: float) -> None:
        self._corpus, self._threshold = corpus, threshold
        self._recent: OrderedDict[int, tuple[np.ndarray, ...]] = OrderedDict()
        self._n_pieces = self.n_compared = 0

    def first_similar(self, row: int, candidates: list[int]) -> int | None:
        """The first of the candidates that is similar to a row, unless the row is held out."""
        if not candidates:
            return None
        content = self._corpus.row(row)
        if content.get("split") in HELD_OUT:
            return None
        mine = tuple(map(pieces, sides(content)))
        for candidate in candidates:
            self.n_compared += 1
            if self._similar(mine, self._pieces(candidate)):
                return candidate
        return None

    def _similar(self, left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...]) -> bool:
        if len(left) != len(right):
            return False
        sizes = [sorted((len(a), len(b))) for a, b in zip(left, right, strict=True)]
        if any(small / large < self._threshold for small, large in sizes):
            return False
        return all(jaccard(a, b) >= self._threshold for a, b in zip(left, right, strict=True))

    def _pieces(self, row: int) -> tuple[np.ndarray, ...]:
        found = self._recent.pop(row, None)
        if found is None:
            found = tuple(map(pieces, sides(self._corpus.row(row))))
            self._n_pieces += sum(map(len, found))
        self._recent[row] = found
        while self._n_pieces > CACHE_PIECES and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            self._n_pieces -= sum(map(len, oldest))
        return found
