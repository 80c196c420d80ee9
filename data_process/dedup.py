"""Decides which rows go because an earlier row that stays says the same.

Rows are visited in their global order: shard by shard, line by line. A row goes as "duplicate" if
a part of it stands in a row that stays, and as "near_duplicate" if one that shares a band key with
it has a Jaccard similarity of --dedup or more, compared exactly (sides, pieces).
So of each family the first row stays, every dropped row has a partner that stays, and a second
run over what stayed drops nothing. Rows that their publisher holds out ("split": val or test) go
as exact copies only, and later rows are compared with them.

A part is a text but for space, punctuation and case. A summary row repeats if its text or its
headline does: a headline learnt in training would give away a row of the test set. Band keys are
MinHash of the 5-character pieces of a text without space and case (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, chapter 3); they decide only what is compared. docs/data.md has the
figures.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from babyllama.config import shown
from babyllama.errors import DataError

NO_WORD = re.compile(r"[\W_]+")


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ in nothing but space, punctuation and case."""
    plain = NO_WORD.sub("", text).lower() or text
    return hashlib.blake2b(plain.encode(), digest_size=12).digest()


def parts(row: dict[str, Any]) -> tuple[str, str]:
    """The texts of a row that must not stand in another row, each with its role, or ""."""
    if "messages" in row:
        return "\n".join(f"{m['role']}:{m['content']}" for m in row["messages"]), ""
    text, summary = (row.get(key) and f"{key}:{row[key]}" for key in ("text", "summary"))
    return text or "", summary or ""


PIECE = 5  # characters
BASE = 0x9E3779B97F4A7C15  # of the rolling hash: odd, without a pattern
BANDS = (16, 6)  # keys of a row, minima of a key
TILE = 1 << 16  # hashes that stay in the processor's cache while all minima are taken


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


def band_keys(texts: Sequence[str], bands: tuple[int, int] = BANDS) -> np.ndarray:
    """The keys of bare texts, (n_bands, len(texts)) uint64; 0 where a text is too short."""
    n_bands, n_minima = bands
    keys = np.zeros((n_bands, len(texts)), np.uint64)
    long = [number for number, text in enumerate(texts) if len(text) >= PIECE]
    if long:
        smallest = minima([texts[number] for number in long], n_bands * n_minima)
        of_band = smallest.reshape(n_bands, n_minima, len(long)).astype(np.uint64)
        found = (of_band * _odd_numbers(n_minima, "<u8")[:, None]).sum(axis=1, dtype=np.uint64)
        found ^= found >> np.uint64(32)
        found *= np.uint64(0xD6E8FEB86659FD93)
        found ^= found >> np.uint64(32)
        keys[:, long] = np.maximum(found, 1)
    return keys


BATCH_BYTES = 1 << 21
HELD_OUT = ("val", "test")  # values of "split" in rows that their publisher holds out

T = TypeVar("T")
Signed = tuple[Path, Path]  # a shard, the stem of its signature


def marks_of(row: dict[str, Any]) -> list[int]:
    """A number for each part of a row that must not stand in another row, 0 for none.

    Of 200 million parts two different ones share their number with a probability of 0.1 %.
    """
    return [
        int.from_bytes(fingerprint(part)[:8], "little") or 1 if part else 0 for part in parts(row)
    ]


def each_batch(path: Path, take: Callable[[dict], T]) -> Iterator[tuple[list[int], list[T]]]:
    """(sizes of the lines, what `take` makes of the rows) of a shard, some BATCH_BYTES at a time.

    raises: DataError at the first line that is not a row
    """
    sizes, made, size = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                made.append(take(json.loads(line)))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{shown(path)}:{number}: wanted a canonical row, found {line[:60]!r} "
                    f"({type(error).__name__}); make the shard again"
                ) from None
            sizes.append(len(line))
            size += len(line)
            if size >= BATCH_BYTES:
                yield sizes, made
                sizes, made, size = [], [], 0
    if made:
        yield sizes, made


def sign_shard(source: Path, target: Path, bands: tuple[int, int] = BANDS) -> dict[str, Any]:
    """Write the signatures of a shard's rows, and count the rows.

    <target>.keys.npy    (2 + bands, N) uint64: the marks and the keys of each row, 0: none
    <target>.lines.npy   (N + 1,) int64: where each line begins in the shard, and its size
    """
    sizes, keys = [0], [np.empty((N_MARKS + bands[0], 0), np.uint64)]
    for n_bytes, made in each_batch(source, lambda row: (marks_of(row), "".join(sides(row)))):
        sizes += n_bytes
        marks, texts = zip(*made, strict=True)
        keys.append(np.concatenate((np.array(marks, np.uint64).T, band_keys(texts, bands))))
    paths = signature_paths(target)
    np.save(paths[0], np.concatenate(keys, axis=1))
    np.save(paths[1], np.cumsum(sizes, dtype=np.int64))
    return {"rows": len(sizes) - 1, "files": [path.name for path in paths]}


def signature_paths(target: Path) -> list[Path]:
    """The files of a signature: keys, lines."""
    return [target.with_name(f"{target.name}.{name}.npy") for name in ("keys", "lines")]


class Corpus:
    """All rows under running numbers: their keys, and their texts at random."""

    def __init__(self, shards: Sequence[Signed]) -> None:
        self.shards = shards
        self._lines = [np.load(signature_paths(stem)[1]) for _, stem in shards]
        self.n_columns = len(np.load(signature_paths(shards[0][1])[0], mmap_mode="r"))
        self.starts = [0, *accumulate(len(lines) - 1 for lines in self._lines)]
        assert self.starts[-1] < 2**32 - 1

    def place_of(self, row: int) -> tuple[int, int]:
        """(shard, row in it)"""
        shard = bisect_right(self.starts, row) - 1
        return shard, row - self.starts[shard]

    def row(self, row: int) -> dict[str, Any]:
        shard, number = self.place_of(row)
        begin, end = self._lines[shard][number : number + 2].tolist()
        with open(self.shards[shard][0], "rb", buffering=0) as file:
            file.seek(begin)
            return json.loads(file.read(end - begin))

    def column(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have a key in a column, and their keys."""
        paths = [signature_paths(stem)[0] for _, stem in self.shards]
        keys = np.concatenate([np.load(path, mmap_mode="r")[number] for path in paths])
        rows = np.flatnonzero(keys).astype(np.uint32)
        return rows, keys[rows]


DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
N_MARKS = 2  # columns of marks, before those of the bands
FIRST, LAST = 8, 8  # rows that a place holds
CACHED = 256  # partners whose pieces are kept ready
Drop = tuple[int, str, str]  # row of a shard, reason, remark


def drops_path(target: Path, shard: int = 0) -> Path:
    """Where a job's list of the rows of a shard that go lies."""
    return target.with_name(f"{target.name}-{shard:05d}.jsonl")


def write_drops(path: Path, drops: Iterable[Drop]) -> None:
    """The rows of a shard that go, as JSON lines."""
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(drop) + "\n" for drop in drops)


def load_drops(path: Path) -> dict[int, tuple[str, str]]:
    """What `write_drops` wrote: row -> (reason, remark)."""
    with open(path, encoding="utf-8") as lines:
        return {row: (reason, remark) for row, reason, remark in map(json.loads, lines)}


@dataclass(frozen=True)
class FindConfig:
    """Whose copies are looked for, and the Jaccard similarity from which a row is one."""

    shards: tuple[Signed, ...]
    threshold: float


def find_duplicates(source: Path, target: Path, cfg: FindConfig) -> dict[str, Any]:
    """Write <target>-00000.jsonl …, one for each shard in order: its rows that go.

    Counts: rows, each reason, pairs compared and not.
    """
    corpus = Corpus(cfg.shards)
    rows, places, n_places, n_marks = _shared_keys(corpus)
    stayed = Stayed(np.zeros(max(1, n_places), np.uint32), n_marks)
    compare = Comparison(corpus, cfg.threshold)
    gone: list[list[Drop]] = [[] for _ in cfg.shards]
    counts = Counter(dict.fromkeys((DUPLICATE, NEAR_DUPLICATE, "not_compared"), 0))
    for begin, end in pairwise([*np.flatnonzero(_is_new(rows)).tolist(), len(rows)]):
        row, its_places = int(rows[begin]), places[begin:end].tolist()
        reason, partner = DUPLICATE, stayed.owner(its_places)
        if partner is None:
            candidates, n_left_out = stayed.candidates(its_places)
            reason, partner = NEAR_DUPLICATE, compare.first_similar(row, candidates)
            counts["not_compared"] += n_left_out
        if partner is None:
            stayed.add(row, its_places)
        else:
            (shard, number), (its_shard, its_number) = map(corpus.place_of, (row, partner))
            gone[shard].append((number, reason, f"[as row {its_number} of shard {its_shard}]"))
            counts[reason] += 1
    paths = [drops_path(target, number) for number in range(len(gone))]
    for path, drops in zip(paths, gone, strict=True):
        write_drops(path, drops)
    done = {"rows": corpus.starts[-1], **counts, "compared": compare.n_compared}
    return done | {"files": [path.name for path in paths]}


def _shared_keys(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The rows that share keys, ascending and once for each key; the keys' places; the size of
    all places, and of those for marks. A place is a counter and room for rows; for marks one row.
    """
    found, at, n_marks = [], 0, 0
    for column in range(corpus.n_columns):
        room = 1 if column < N_MARKS else FIRST + LAST
        rows, keys = corpus.column(column)
        order = np.argsort(keys)
        rows, keys = rows[order], keys[order]
        sizes = np.diff(np.flatnonzero(_is_new(keys)), append=len(keys))
        is_shared = sizes > 1
        n_rows = sizes[is_shared]
        width = np.minimum(n_rows, room) + (room > 1)
        places = np.repeat(at + np.cumsum(width) - width, n_rows)
        found.append((rows[np.repeat(is_shared, sizes)], places))
        at += int(width.sum())
        n_marks = at if column < N_MARKS else n_marks
    rows, places = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], places[order], at, n_marks


def _is_new(ordered: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it."""
    return np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(ordered)]


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
        self._corpus, self._threshold, self.n_compared = corpus, threshold, 0
        self._pieces = lru_cache(CACHED)(lambda row: tuple(map(pieces, sides(corpus.row(row)))))

    def first_similar(self, row: int, candidates: list[int]) -> int | None:
        """The first of the candidates that is similar to a row, unless the row is held out."""
        content = self._corpus.row(row) if candidates else {}
        if not candidates or content.get("split") in HELD_OUT:
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
