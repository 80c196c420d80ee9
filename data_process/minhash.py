"""MinHash of Chinese text: how alike two rows are, and keys that like rows are likely to share.

After Broder (1997) and Leskovec et al., Mining of Massive Datasets, chapter 3: two rows whose sets
of 5-character pieces have Jaccard similarity J agree in all 6 minima of at least one of 16 bands
with probability 1 - (1 - J^6)^16: 0.992 at 0.8, 0.9995 at 0.85, 0.22 at 0.5. Pairs found so are
compared exactly afterwards, so the bands decide only what is compared. White space and case do not
count; rows with fewer than 5 characters left have no keys.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from babyllama.errors import ConfigError

PIECE = 5  # characters
BASE = 0x9E3779B97F4A7C15  # of the rolling hash: odd, without a pattern
TILE = 1 << 16  # hashes that stay in the processor's cache while all minima are taken


@dataclass(frozen=True)
class DedupConfig:
    """How near-duplicates are looked for.

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
