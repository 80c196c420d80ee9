"""Windows of 13 characters: which of an evaluation's texts stand in other texts.

A window's number is the 8-byte BLAKE2b digest of its UTF-8 bytes, read little-endian; white space
is removed before and case lowered; only numbers divisible by 8 are kept. If the texts are known, a
rolling hash says which windows are worth a digest (35 MB/s of rows on one core); if only their
numbers are, every window needs one (4 MB/s). Both find the same. Where texts come from:
decontaminate.py.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from babyllama.cli import shown
from babyllama.errors import DataError
from data_process.minhash import bare, code_points, rolling_hash

WINDOW = 13  # characters
ONE_IN = 8  # windows that are kept
COMMON = 20  # texts with a window in common, from which on it is wording
EMPTY = hashlib.blake2b(digest_size=8)


@dataclass(frozen=True)
class Windows:
    """The numbers of evaluation texts' windows, as named lists.

    lists: sorted uint64, each without repeats
    rolling: rolling hashes of the same windows; None if some were only given as numbers
    """

    names: tuple[str, ...]
    lists: tuple[np.ndarray, ...]
    rolling: np.ndarray | None

    @cached_property
    def numbers(self) -> np.ndarray:
        return np.unique(np.concatenate([*self.lists, np.empty(0, np.uint64)]))

    @cached_property
    def table(self) -> np.ndarray:
        """True where the leading bits of a rolling hash are those of a window: 1 entry in 64."""
        table = np.zeros(1 << (32 - int(self.shift)), bool)
        table[self.rolling >> self.shift] = True
        return table

    @property
    def shift(self) -> np.uint32:
        """How many bits of a rolling hash the table leaves out."""
        return np.uint32(32 - min(30, max(10, (32 * len(self.rolling)).bit_length())))

    def save(self, path: Path) -> None:
        known = {} if self.rolling is None else {"rolling": self.rolling}
        lists = {f"list{n}": numbers for n, numbers in enumerate(self.lists)}
        temporary = path.with_name(f"tmp-{path.name}")
        np.savez(temporary, names=np.array(self.names, np.str_), **lists, **known)
        temporary.replace(path)


@lru_cache(2)
def load_windows(path: Path) -> Windows:
    """What `Windows.save` wrote; a process reads it once."""
    with np.load(path) as stored:
        names = tuple(map(str, stored["names"]))
        lists = tuple(stored[f"list{n}"] for n in range(len(names)))
        return Windows(names, lists, stored.get("rolling"))


def digests(text: str) -> np.ndarray:
    """The numbers of all windows of a bare text."""
    data = text.encode("utf-8", "surrogatepass")
    bounds = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80).tolist()
    bounds.append(len(data))
    return _numbers(data[a:b] for a, b in zip(bounds, bounds[WINDOW:], strict=False))


def _numbers(windows: Iterable[bytes]) -> np.ndarray:
    found, copy = [], EMPTY.copy
    for window in windows:
        # Cheaper than making a new hash: its settings need not be read again.
        digest = copy()
        digest.update(window)
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), "<u8")


def rolling(text: str) -> np.ndarray:
    """32-bit hashes of all windows of a bare text."""
    return rolling_hash(code_points(text), WINDOW)


def is_kept(numbers: np.ndarray) -> np.ndarray:
    return numbers % np.uint64(ONE_IN) == 0


def hits(texts: Sequence[str], windows: Windows) -> np.ndarray:
    """How many different windows of each list each text holds, (len(texts), number of lists)."""
    counts = np.zeros((len(texts), len(windows.lists)), np.int64)
    which, numbers = occurrences(texts, windows)
    for n, of_list in enumerate(windows.lists):
        counts[:, n] = np.bincount(which[among(numbers, of_list)], minlength=len(texts))
    return counts


def occurrences(texts: Sequence[str], windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Which text holds which window, each pair once: two arrays of one length."""
    bare_texts = [bare(text) for text in texts]
    # No window holds a NUL, so none runs over from a text into the next.
    whole = "\0".join(bare_texts)
    if len(whole) < WINDOW or not len(windows.numbers):
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    if windows.rolling is None:
        at, numbers = np.arange(len(whole) - WINDOW + 1), digests(whole)
    else:
        at = np.flatnonzero(windows.table[rolling(whole) >> windows.shift])
        numbers = _numbers(
            whole[n : n + WINDOW].encode("utf-8", "surrogatepass") for n in at.tolist()
        )
    known = is_kept(numbers)
    known[known] = among(numbers[known], windows.numbers)
    starts = np.cumsum([0, *(len(text) + 1 for text in bare_texts[:-1])])
    which, numbers = np.searchsorted(starts, at[known], side="right") - 1, numbers[known]
    order = np.lexsort((numbers, which))
    which, numbers = which[order], numbers[order]
    again = (np.diff(which, prepend=-1) == 0) & (np.diff(numbers, prepend=0) == 0)
    return which[~again], numbers[~again]


def among(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of the numbers stand in a sorted list, (len(numbers),) bool."""
    at = np.minimum(np.searchsorted(ordered, numbers), len(ordered) - 1)
    return ordered[at] == numbers if len(ordered) else np.zeros(len(numbers), bool)


def read_list(path: Path) -> np.ndarray:
    """The numbers in a .u64 file: uint64, little-endian, ascending.

    raises: DataError if it is no such list
    """
    if path.stat().st_size % 8 == 0:
        numbers = np.fromfile(path, "<u8")
        if len(numbers) and np.all(numbers[1:] > numbers[:-1]) and is_kept(numbers).all():
            return numbers
    raise DataError(
        f"{shown(path)}: wanted ascending 8-byte numbers divisible by {ONE_IN}, found something "
        f"else; get the list again, or make one: python -m data_process.decontaminate FILES "
        f"--out list.u64"
    )


@dataclass
class TextWindows:
    """The windows that are kept of some texts, and how the texts fared.

    protected: texts with two windows or more, so that each alone is recognised
    n_wording: windows left out because more than COMMON texts have them
    """

    numbers: np.ndarray
    rolling: np.ndarray
    n_texts: int = 0
    n_protected: int = 0
    n_too_short: int = 0
    n_wording: int = 0


def windows_of(texts: Iterable[str]) -> TextWindows:
    """The windows of texts; a text that comes again counts once."""
    found = TextWindows(np.empty(0, np.uint64), np.empty(0, np.uint32))
    seen: set[bytes] = set()
    all_numbers, all_rolling = [found.numbers], [found.rolling]
    for text in map(bare, texts):
        mark = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if not text or mark in seen:
            continue
        seen.add(mark)
        found.n_texts += 1
        if len(text) < WINDOW:
            found.n_too_short += 1
            continue
        numbers, first = np.unique(digests(text), return_index=True)
        kept = is_kept(numbers)
        all_numbers.append(numbers[kept])
        all_rolling.append(rolling(text)[first[kept]])
        found.n_protected += int(kept.sum() >= 2)
    numbers, first, n_texts = np.unique(
        np.concatenate(all_numbers), return_index=True, return_counts=True
    )
    telling = n_texts <= COMMON
    found.numbers = numbers[telling]
    found.rolling = np.concatenate(all_rolling)[first[telling]]
    found.n_wording = int((~telling).sum())
    return found
