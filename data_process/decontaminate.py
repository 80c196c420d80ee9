"""Finds rows that share text with evaluation texts, which must not be trained on.

    python -m data_process.decontaminate data/raw/csl/ts/test.tsv bench/*.jsonl --out list.u64

A row that holds two or more different windows (windows.py: 13 characters, one in eight kept) of one
list is a leak: of 30 characters in common two windows are kept with a probability of 0.68, of 60
with 0.98. The command writes such a list, so that a publisher can say what must not be trained on
without showing it.

- Files whose name ends in .u64 are lists; all others are evaluation files as raw.py opens them, and
  every string in them counts as a text: questions, answers, abstracts, titles.
- A text of fewer than 13 characters has no window and is not protected; the counts say how many.
- A window that more than 20 texts of one list have in common is wording, not content ("阅读下面的
  短文，回答问题"): it is left out and counted.
- Tasks made of the same papers, as CSL's four are, protect each other: they share the windows.
- 13 characters are two English words. Of 1,000 training questions of GSM8K 362 have two windows in
  common with its test questions, 55 have five: for English raise `min_hits`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from babyllama.cli import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from data_process.clean import texts
from data_process.executor import write_whole
from data_process.layouts import Skip
from data_process.raw import records
from data_process.signatures import HELD_OUT, each_row
from data_process.windows import TextWindows, Windows, hits, load_windows, read_list, windows_of

BATCH_BYTES = 1 << 20
LEAK = "leak"


@dataclass(frozen=True)
class FlagConfig:
    """What is searched for in the rows of a shard.

    windows: file made by make_windows
    min_hits: different windows of one list from which a row is a leak
    """

    windows: Path
    min_hits: int = 2


def flag_shard(source: Path, target: Path, cfg: FlagConfig) -> dict[str, Any]:
    """Write <target>.leaks.jsonl: row, hits and the list with the most, for each row that leaks.

    Rows that their publisher holds out ("split": val or test) are what is protected.
    """
    windows, n_rows, n_leaks = load_windows(cfg.windows), 0, 0
    path = _leaks_path(target)
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for first, rows in _batches(source):
            n_rows += len(rows)
            found = hits(rows, windows)
            for number in np.flatnonzero((found >= cfg.min_hits).any(axis=1)).tolist():
                most = int(found[number].argmax())
                leak = {"row": first + number, "hits": int(found[number, most])}
                out.write(json.dumps(leak | {"list": windows.names[most]}) + "\n")
                n_leaks += 1
    return {"rows": n_rows, "leaks": n_leaks, "files": [path.name]}


def load_flags(target: Path) -> dict[int, tuple[str, str]]:
    """The rows of a shard that leak: row -> (reason, what was hit)."""
    with open(_leaks_path(target), encoding="utf-8") as lines:
        leaks = map(json.loads, lines)
        return {
            leak["row"]: (LEAK, f"[{leak['hits']} windows of {leak['list']}]") for leak in leaks
        }


def _leaks_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.leaks.jsonl")


def _joined(row: dict[str, Any]) -> str:
    # No window holds a NUL, so none runs over from a text into the next.
    return "" if row.get("split") in HELD_OUT else "\0".join(texts(row))


def _batches(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the first row, the rows' texts), some rows at a time."""
    first, size, rows = 0, 0, []
    for n_bytes, row in each_row(path, _joined):
        rows.append(row)
        size += n_bytes
        if size >= BATCH_BYTES:
            yield first, rows
            first, size, rows = first + len(rows), 0, []
    if rows:
        yield first, rows


def make_windows(
    evaluation: Sequence[Path], held_out: Sequence[Path], directory: Path
) -> Path | None:
    """Gather all that must not be trained on into one file of the directory; None if it is nothing.

    The file's name changes with its content. Beside it lies a .json that says what each list holds.
    evaluation: .u64 lists and evaluation files
    held_out: shards of rows, of which those with "split": val or test count, as one list
    """
    names, lists, rolling, notes = [], [], [], {}
    for path in evaluation:
        numbers, known, notes[shown(path)] = _list_of(path)
        names.append(shown(path))
        lists.append(numbers)
        rolling.append(known)
    found = windows_of(_held_out_texts(held_out))
    if found.n_texts:
        names.append("held-out rows")
        lists.append(found.numbers)
        rolling.append(found.rolling)
        notes["held-out rows"] = _note(found)
    if not names:
        return None
    known = None if any(r is None for r in rolling) else np.unique(np.concatenate(rolling))
    digest = hashlib.sha256(json.dumps(names).encode())
    for numbers in lists:
        digest.update(numbers.tobytes())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{digest.hexdigest()[:16]}.npz"
    Windows(tuple(names), tuple(lists), known).save(path)
    write_whole(path.with_suffix(".json"), json.dumps(notes, ensure_ascii=False, indent=1) + "\n")
    return path


def _list_of(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
    """(numbers, rolling hashes if the texts are known, what to say about it) of a file."""
    if path.suffix == ".u64":
        numbers = read_list(path)
        return numbers, None, {"windows": len(numbers)}
    n_skipped: Counter[str] = Counter()
    found = windows_of(strings(path, n_skipped))
    if not len(found.numbers):
        raise DataError(
            f"{shown(path)}: wanted evaluation texts of 13 characters or more, found none in "
            f"{found.n_texts} texts; look at the file"
        )
    return found.numbers, found.rolling, _note(found) | dict(n_skipped)


def _note(found: TextWindows) -> dict[str, int]:
    return {
        "texts": found.n_texts,
        "protected": found.n_protected,
        "too_short": found.n_too_short,
        "windows": len(found.numbers),
        "wording": found.n_wording,
    }


def _held_out_texts(shards: Sequence[Path]) -> Iterator[str]:
    for shard in shards:
        for _, strings_of_row in each_row(shard, _held_out_strings):
            yield from strings_of_row


def _held_out_strings(row: dict[str, Any]) -> list[str]:
    return list(texts(row)) if row.get("split") in HELD_OUT else []


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
        files: evaluation files, or lists to be joined
        out: the list that is written
    """

    files: tuple[Path, ...] = ()
    out: Path = Path("list.u64")


def main(cfg: ListConfig) -> None:
    """Write the list, then say what each file holds."""
    if not cfg.files or cfg.out.suffix != ".u64":
        raise ConfigError(
            f"wanted evaluation files and --out NAME.u64, found {len(cfg.files)} files and --out "
            f"{cfg.out}; python -m data_process.decontaminate FILES --out list.u64"
        )
    missing = [str(path) for path in cfg.files if not from_repo(path).exists()]
    if missing:
        raise ConfigError(f"wanted evaluation files, found no {', '.join(missing[:10])}")
    lists = []
    for path in map(from_repo, cfg.files):
        numbers, _, note = _list_of(path)
        lists.append(numbers)
        print(f"{shown(path)}: " + ", ".join(f"{name} {n:,}" for name, n in note.items()))
    numbers = np.unique(np.concatenate(lists))
    temporary = cfg.out.with_name(f"tmp-{cfg.out.name}")
    numbers.astype("<u8").tofile(temporary)
    temporary.replace(cfg.out)
    print(f"{cfg.out}: {len(numbers):,} windows, {8 * len(numbers):,} bytes")


if __name__ == "__main__":
    run(main, parse(ListConfig, __doc__, positional=("files",)))
