"""Decides which rows go because an earlier row that stays says the same.

Rows are visited in their global order: shard by shard, line by line. A row goes as "duplicate" if
a part of it stands in a row that stays, and as "near_duplicate" if one that shares a band key with
it has a Jaccard similarity of cfg.threshold or more, compared exactly (minhash.py: sides, pieces).
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
"""

import json
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_process.executor import write_whole
from data_process.minhash import DedupConfig, jaccard, pieces, sides
from data_process.signatures import HELD_OUT, Corpus, Signed, sign_shard

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
