"""Finds rows that share text with evaluation texts, which must not be trained on.

    python -m data_process.decontaminate data/raw/csl/ts/test.tsv bench/*.jsonl --out list.u64

A row that holds two or more different windows (13 characters, one in eight kept) of one list is a
leak: of 30 characters in common two windows are kept with a probability of 0.68, of 60
with 0.98. The command writes such a list, so that a publisher can say what must not be trained on
without showing it.

Files whose name ends in .u64 are lists; in all others every string counts as a text. A text of
fewer than 13 characters has no window and is not protected; a window that more than 20 texts of one
list have in common is wording, not content. Both are counted.

With --out NAME.json the command counts a benchmark's questions in what a model learnt from:

    python -m data_process.decontaminate asked.jsonl data/clean/wiki/train-*.jsonl --out found.json

asked.jsonl holds {"group": …, "text": …} lines; "\\0" parts texts of one question. A question is
found if half of its windows and at least two stand somewhere in the rows. Half, because English
questions share two windows with many strangers; a question with fewer than two windows cannot be
looked up and is counted as short. Windows that more than 20 texts share are wording and count for
nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.config import atomic_write, from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import numbered_lines
from data_process.clean import texts
from data_process.dedup import (
    HELD_OUT,
    bare,
    code_points,
    drops_path,
    each_batch,
    rolling_hash,
    write_drops,
)
from data_process.executor import write_whole
from data_process.raw import Skip, records

WINDOW = 13  # characters
ONE_IN = 8  # windows that are kept
COMMON = 20  # texts with a window in common, from which on it is wording
LEAST = 2  # different windows of one list from which a row is a leak
EMPTY = hashlib.blake2b(digest_size=8)
EMPTY_ROLLING = np.empty(0, np.uint32)


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
        """Number of bits of a rolling hash that the table leaves out."""
        assert self.rolling is not None
        return np.uint32(32 - min(30, max(10, (32 * len(self.rolling)).bit_length())))

    def save(self, path: Path) -> None:
        known = {} if self.rolling is None else {"rolling": self.rolling}
        lists = {f"list{n}": numbers for n, numbers in enumerate(self.lists)}
        with atomic_write(path) as temporary:
            np.savez(temporary, names=np.array(self.names, np.str_), **lists, **known)


@lru_cache(2)
def load_windows(path: Path) -> Windows:
    """What `Windows.save` wrote; a process reads it once."""
    with np.load(path) as stored:
        names = tuple(map(str, stored["names"]))
        lists = tuple(stored[f"list{n}"] for n in range(len(names)))
        return Windows(names, lists, stored.get("rolling"))


def digests(text: str) -> np.ndarray:
    """The numbers of all windows of a bare text: BLAKE2b digests of 8 bytes of their UTF-8."""
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
    """Number of different windows of each list in each text, (len(texts), number of lists)."""
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


def kept_windows(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the windows kept of a bare text, each once, and their rolling hashes."""
    numbers, first = np.unique(digests(text), return_index=True)
    kept = is_kept(numbers)
    return numbers[kept], (rolling(text)[first[kept]] if kept.any() else EMPTY_ROLLING)


def telling(windows: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, int]:
    """The windows of several texts, each once, without wording, and how many were wording."""
    numbers, hashes = zip((np.empty(0, np.uint64), EMPTY_ROLLING), *windows, strict=True)
    numbers, first, n_texts = np.unique(
        np.concatenate(numbers), return_index=True, return_counts=True
    )
    is_telling = n_texts <= COMMON
    return (
        numbers[is_telling],
        np.concatenate(hashes)[first[is_telling]],
        int((~is_telling).sum()),
    )


def windows_of(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The numbers of the windows kept of texts, their rolling hashes, and how the texts fared; one
    that comes again counts once, and one with two windows or more is recognised alone (protected).
    """
    seen: set[bytes] = set()
    windows, n_too_short = [], 0
    for text in map(bare, texts):
        mark = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if not text or mark in seen:
            continue
        seen.add(mark)
        n_too_short += len(text) < WINDOW
        windows.append(kept_windows(text))
    numbers, hashes, n_wording = telling(windows)
    n_protected = sum(len(of_text) >= LEAST for of_text, _ in windows)
    return numbers, hashes, {"texts": len(windows), "protected": n_protected,
                             "too_short": n_too_short, "windows": len(numbers),
                             "wording": n_wording}  # fmt: skip


LEAK = "leak"


def flag_shard(source: Path, target: Path, windows: Path) -> dict[str, Any]:
    """Write <target>-00000.jsonl: each row that leaks, with the list it hits most.

    Rows that their publisher holds out ("split": val or test) are what is protected.
    windows: file made by make_windows
    """
    known, n_rows = load_windows(windows), 0
    path, drops = drops_path(target), []
    for _, rows in each_batch(source, lambda row: "" if _is_held_out(row) else _joined(row)):
        found = hits(rows, known)
        for number in np.flatnonzero((found >= LEAST).any(axis=1)).tolist():
            most = int(found[number].argmax())
            remark = f"[{found[number, most]} windows of {known.names[most]}]"
            drops.append((n_rows + number, LEAK, remark))
        n_rows += len(rows)
    write_drops(path, drops)
    return {"rows": n_rows, "leaks": len(drops), "files": [path.name]}


def _is_held_out(row: dict[str, Any]) -> bool:
    return row.get("split") in HELD_OUT


def _joined(row: dict[str, Any]) -> str:
    # No window holds a NUL, so none runs over from a text into the next.
    return "\0".join(texts(row))


def make_windows(
    evaluation: Sequence[Path], held_out: Sequence[Path], directory: Path
) -> tuple[Path, dict] | None:
    """Gather all that must not be trained on into one file of the directory, and say what each of
    its lists holds; None if it is nothing. The file's name changes with its content.

    evaluation: .u64 lists and evaluation files
    held_out: shards of rows, of which those with "split": val or test count, as one list
    """
    found = {shown(path): _list_of(path) for path in evaluation}
    held = windows_of(_held_out_texts(held_out))
    found |= {"held-out rows": held} if held[2]["texts"] else {}
    if not found:
        return None
    lists, rolling, notes = zip(*found.values(), strict=True)
    names = tuple(found)
    known = None if any(r is None for r in rolling) else np.unique(np.concatenate(rolling))
    digest = hashlib.sha256(json.dumps(names).encode())
    for numbers in lists:
        digest.update(numbers.tobytes())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{digest.hexdigest()[:16]}.npz"
    Windows(names, lists, known).save(path)
    return path, dict(zip(names, notes, strict=True))


def _list_of(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
    """(numbers, rolling hashes if the texts are known, what to say about it) of a file."""
    if path.suffix == ".u64":
        numbers = read_list(path)
        return numbers, None, {"windows": len(numbers)}
    n_skipped: Counter[str] = Counter()
    numbers, hashes, note = windows_of(strings(path, n_skipped))
    if not len(numbers):
        raise DataError(
            f"{shown(path)}: wanted evaluation texts of 13 characters or more, found none in "
            f"{note['texts']} texts; look at the file"
        )
    return numbers, hashes, note | dict(n_skipped)


def _held_out_texts(shards: Sequence[Path]) -> Iterator[str]:
    for _, rows in chain.from_iterable(each_batch(shard, lambda row: row) for shard in shards):
        yield from (text for row in rows if _is_held_out(row) for text in texts(row))


def strings(path: Path, n_skipped: Counter[str]) -> Iterator[str]:
    """Every string in an evaluation file; entries that cannot be read are counted by reason."""
    layout = "csv" if ".csv" in path.suffixes else ""
    for record in records(path, "utf-8-sig", layout):
        if isinstance(record, Skip):
            n_skipped[record.reason] += 1
        elif isinstance(record.data, str):
            yield from record.data.split("\t")
        else:
            yield from _inside(record.data)


def _inside(value: Any) -> Iterator[str]:
    """The strings of a JSON value. Keys too: a table without a head has its first row there."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain(value, value.values() if isinstance(value, dict) else ()):
            yield from _inside(item)


@dataclass(frozen=True)
class ListConfig:
    """Settings of data_process.decontaminate.

    Args:
        files: evaluation files, or lists to be joined; for an overlap the questions, then rows
        out: the list that is written (.u64), or the counts of an overlap (.json)
    """

    files: tuple[Path, ...] = ()
    out: Path = Path("list.u64")


def write_list(files: list[Path], out: Path) -> None:
    """Write the list, then say what each file holds."""
    lists = []
    for path in files:
        numbers, _, note = _list_of(path)
        lists.append(numbers)
        print(f"{shown(path)}: " + ", ".join(f"{name} {n:,}" for name, n in note.items()))
    numbers = np.unique(np.concatenate(lists))
    with atomic_write(out) as temporary:
        numbers.astype("<u8").tofile(temporary)
    print(f"{out}: {len(numbers):,} windows, {8 * len(numbers):,} bytes")


SHARE = 0.5  # of a question's windows, from which on it is found


def overlap(asked: list[dict], rows: list[Path]) -> dict:
    """{"groups": questions found by group, "asked": all, "short": those that cannot be found}."""
    parts = [question["text"].split("\0") for question in asked]
    by_text = {text: kept_windows(bare(text)) for texts in parts for text in texts}
    numbers, hashes, _ = telling(by_text.values())
    known = Windows(("asked",), (numbers,), hashes)
    found = [np.unique(occurrences(texts, known)[1])
             for path in rows for _, texts in each_batch(path, _joined)]  # fmt: skip
    seen = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    counts = {"groups": Counter(), "asked": Counter(), "short": Counter()}
    for question, its_texts in zip(asked, parts, strict=True):
        group = question["group"]
        counts["asked"][group] += 1
        own = np.unique(np.concatenate([by_text[text][0] for text in its_texts]))
        own = own[among(own, known.numbers)]
        n_seen = int(among(own, seen).sum())
        counts["short"][group] += len(own) < LEAST
        counts["groups"][group] += n_seen >= LEAST and n_seen >= SHARE * len(own)
    return {name: dict(found) for name, found in counts.items()}


def main(cfg: ListConfig) -> None:
    """Write a list, or where --out says so the counts of an overlap."""
    is_overlap = cfg.out.suffix == ".json"
    if len(cfg.files) < 1 + is_overlap or cfg.out.suffix not in (".u64", ".json"):
        raise ConfigError(
            f"wanted evaluation files and --out NAME.u64, or questions, files of rows and --out "
            f"NAME.json, found {len(cfg.files)} files and --out {cfg.out}"
        )
    files = list(map(from_repo, cfg.files))
    if missing := [str(path) for path in files if not path.exists()]:
        raise ConfigError(f"wanted files, found no {', '.join(missing[:10])}")
    if is_overlap:
        found = overlap([json.loads(line) for _, line in numbered_lines(files[0])], files[1:])
        write_whole(cfg.out, json.dumps(found, indent=1) + "\n")
    else:
        write_list(files, cfg.out)


if __name__ == "__main__":
    run(main, parse(ListConfig, __doc__, positional=("files",)))
