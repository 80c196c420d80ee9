"""Counts texts that stand in sets of rows: a benchmark's questions in what a model learnt from.

    python -m data_process.overlap asked.jsonl data/clean/wiki/train-*.jsonl --out found.json

asked.jsonl holds {"group": …, "text": …} lines; "\\0" parts texts of one question. A question is
found if half of its windows (windows.py: 13 characters, one in eight kept) and at least two stand
somewhere in the rows. Half, because English questions share two windows with many strangers; a
question with fewer than two windows cannot be looked up and is counted as short. Windows that more
than 20 texts share are wording and count for nothing.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babyllama.cli import from_repo, parse, run
from babyllama.errors import ConfigError
from babyllama.rows import numbered_lines
from data_process.clean import texts
from data_process.decontaminate import BATCH_BYTES
from data_process.executor import write_whole
from data_process.minhash import bare
from data_process.signatures import each_row
from data_process.windows import (
    COMMON,
    Windows,
    among,
    digests,
    is_kept,
    occurrences,
    rolling,
)

SHARE, LEAST = 0.5, 2


@dataclass(frozen=True)
class OverlapConfig:
    """Settings of data_process.overlap.

    Args:
        files: the questions, then files of rows
        out: the JSON file that is written
    """

    files: tuple[Path, ...] = ()
    out: Path | None = None


def seen_windows(known: Windows, rows: list[Path]) -> np.ndarray:
    """The windows, of those known, that stand in the rows; sorted."""
    found = [np.empty(0, np.uint64)]
    for path in rows:
        batch: list[str] = []
        size = 0
        for n_bytes, text in each_row(path, lambda row: "\0".join(texts(row))):
            batch.append(text)
            size += n_bytes
            if size >= BATCH_BYTES:
                found.append(np.unique(occurrences(batch, known)[1]))
                batch, size = [], 0
        found.append(np.unique(occurrences(batch, known)[1]))
    return np.unique(np.concatenate(found))


def windows_by_text(texts: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The windows kept of each text, with their rolling hashes; a text that comes again once."""
    found = {}
    for text in texts:
        if text not in found:
            short = bare(text)
            numbers, first = np.unique(digests(short), return_index=True)
            kept = is_kept(numbers)
            found[text] = numbers[kept], rolling(short)[first[kept]]
    return found


def overlap(asked: list[dict], rows: list[Path]) -> dict:
    """{"groups": questions found by group, "asked": all, "short": those that cannot be found}."""
    parts = [question["text"].split("\0") for question in asked]
    by_text = windows_by_text(text for texts in parts for text in texts)
    numbers = np.concatenate([numbers for numbers, _ in by_text.values()])
    hashes = np.concatenate([hashes for _, hashes in by_text.values()])
    numbers, first, n_texts = np.unique(numbers, return_index=True, return_counts=True)
    telling = n_texts <= COMMON
    known = Windows(("asked",), (numbers[telling],), hashes[first[telling]])
    seen = seen_windows(known, rows)
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


def main(cfg: OverlapConfig) -> None:
    """Read, count, write."""
    if len(cfg.files) < 2 or not cfg.out:
        raise ConfigError(
            f"wanted questions, files of rows and --out, found {len(cfg.files)} files and --out "
            f"{cfg.out}; python -m data_process.overlap asked.jsonl rows.jsonl --out found.json"
        )
    asked, *rows = map(from_repo, cfg.files)
    missing = [str(path) for path in (asked, *rows) if not path.is_file()]
    if missing:
        raise ConfigError(f"wanted files, found no {', '.join(missing[:10])}")
    found = overlap([json.loads(line) for _, line in numbered_lines(asked)], rows)
    write_whole(cfg.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main, parse(OverlapConfig, __doc__, positional=("files",)))
