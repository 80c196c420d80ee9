"""Making an index of text rows (index.py), block by block: an external sort.

Memory does not grow with the corpus but for 4 bytes a passage and 16 a term. Everything is written
beside the place where the index will be, which gets its name when it is whole; a build that was
killed is started again with the same command.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from babyllama.errors import DataError
from babyllama.retrieval.index import (
    K1,
    LONGEST,
    VERSION,
    B,
    Passage,
    normal,
    passages,
    read_info,
    sizes_of,
    terms,
    title_terms,
)
from babyllama.rows import read_rows, row_kind

BLOCK = 2_000_000  # characters sorted at once; a block takes about 100 bytes a character


def build(files: Iterable[Path], out: Path, corpus: str, longest: int = LONGEST,
          block: int = BLOCK) -> dict:  # fmt: skip
    """Make the index of text rows in `out`, whole or not at all; returns what index.json says.

    An index that was made from the same rows is left alone ("unchanged" is true then); one of the
    same corpus is replaced.

    raises: DataError if the rows are no text rows, or `out` is something else
    """
    files = list(files)
    key = _key(files, longest)
    if out.exists():
        found = read_info(out, any_version=True)
        if found["corpus"] != corpus:
            raise DataError(
                f"{out}: wanted no index there, or one of {corpus!r}; found the index of "
                f"{found['corpus']!r}; name another directory or delete this one"
            )
        same = found["version"] == VERSION and found["rows"] == key
        if same and sizes_of(out, found["sizes"]) == found["sizes"]:
            return found | {"unchanged": True}
    temporary, old = (out.with_name(f"{mark}-{out.name}") for mark in ("tmp", "old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)  # of a build that was killed
    temporary.mkdir(parents=True)
    try:
        lengths, counts = _write_runs(files, temporary, longest, block)
        counts |= _merge(temporary, lengths, 4 * block)
        info = {"version": VERSION, "corpus": corpus, "rows": key, **counts}
        info = _finish(temporary, info)
        if out.exists():
            os.rename(out, old)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return info


def _finish(place: Path, info: dict) -> dict:
    """Write index.json with the sizes of the files, and everything to the disk."""
    for run in place.glob("run-*"):
        run.unlink()
    info["sizes"] = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
    text = json.dumps(info, ensure_ascii=False, indent=1)
    (place / "index.json").write_text(text, "utf-8")
    for path in place.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    return info


def _key(files: list[Path], longest: int) -> str:
    """Stands for the bytes of the rows and for how they are cut."""
    digest = hashlib.sha256(f"{VERSION} {longest} {K1} {B}".encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise DataError(f"{path}: wanted text rows, found no such file") from None
    return digest.hexdigest()


def _blocks(files: list[Path], longest: int, block: int) -> Iterator[tuple[list[Passage], int]]:
    """Passages by blocks of so many characters, each with the number of rows read for it."""
    held, n_chars, n_rows = [], 0, 0
    for path in files:
        for row in read_rows(path):
            if row_kind(row) != "text":
                raise DataError(f"{path}: wanted text rows for an index, found {row['id']!r}, a "
                                f"{row_kind(row)} row; name a set of texts")  # fmt: skip
            n_rows += 1
            for passage in passages(row, longest):
                held.append(passage)
                n_chars += len(passage.text) + len(passage.title)
            if n_chars >= block:
                yield held, n_rows
                held, n_chars, n_rows = [], 0, 0
    if held:
        yield held, n_rows


def _write_runs(files: list[Path], place: Path, longest: int, block: int) -> tuple:
    """Write the passages, and for each block its terms in order; returns the passages' lengths."""
    lengths, starts, at = [], [np.zeros(1, np.uint64)], 0
    n = {"rows": 0, "passages": 0, "chars": 0}
    with open(place / "passages.jsonl", "wb") as file:
        for number, (held, n_rows) in enumerate(_blocks(files, longest, block)):
            lines = [_line(passage) for passage in held]
            file.writelines(lines)
            starts.append(np.cumsum([at, *map(len, lines)], dtype=np.uint64)[1:])
            at = int(starts[-1][-1])
            lengths.append(_write_run(held, n["passages"], place / f"run-{number:08}"))
            n["rows"] += n_rows
            n["passages"] += len(held)
            n["chars"] += sum(len(passage.text) for passage in held)
    if not lengths:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: wanted text, found none")
    np.save(place / "starts.npy", np.concatenate(starts))
    return np.concatenate(lengths), {f"n_{name}": count for name, count in n.items()}


def _line(passage: Passage) -> bytes:
    content = [passage.row, passage.title, passage.paragraph, passage.text]
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _write_run(held: list[Passage], first: int, stem: Path) -> np.ndarray:
    """The postings of a block, sorted by term and passage; returns the passages' lengths."""
    texts = [normal(f"{passage.title}\n{passage.text}\n") for passage in held]
    begins = np.cumsum([0, *map(len, texts)])
    codes, places = terms("".join(texts))
    docs = np.searchsorted(begins, places, side="right") - 1
    lengths = np.bincount(docs, minlength=len(held))
    titles = [
        (code, doc) for doc, passage in enumerate(held) for code in title_terms(passage.title)
    ]
    codes = np.append(codes, np.array([code for code, _ in titles], np.uint64))
    docs = np.append(docs, np.array([doc for _, doc in titles], np.int64))
    order = np.lexsort((docs, codes))
    codes, docs = codes[order], docs[order]
    is_first = np.ones(len(codes), bool)
    is_first[1:] = (codes[1:] != codes[:-1]) | (docs[1:] != docs[:-1])
    kept = np.flatnonzero(is_first)
    counts = np.diff(np.append(kept, len(codes)))
    np.save(f"{stem}-codes.npy", codes[kept])
    np.save(f"{stem}-docs.npy", (docs[kept] + first).astype(np.uint32))
    np.save(f"{stem}-counts.npy", counts.clip(max=255).astype(np.uint8))
    return lengths.astype(np.uint32)


def _merge(place: Path, lengths: np.ndarray, most: int) -> dict:
    """Bring the runs together, a range of terms after the other, of about `most` postings each."""
    runs = [
        [np.load(path.with_name(path.name.replace("codes", part)), mmap_mode="r")
         for part in ("codes", "docs", "counts")]
        for path in sorted(place.glob("run-*-codes.npy"))
    ]  # fmt: skip
    norm = (K1 * (1 - B + B * lengths / max(lengths.mean(), 1))).astype(np.float32)
    found, ends, at = [], [np.zeros(1, np.uint64)], 0
    with open(place / "docs.u32", "wb") as docs_file, open(place / "weights.u8", "wb") as weights:
        for slices in _ranges([codes for codes, _, _ in runs], most):
            parts = [[a[s] for a in run] for run, s in zip(runs, slices, strict=True)]
            codes, docs, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(codes, kind="stable")  # passages ascend from run to run
            codes, docs, counts = codes[order], docs[order], counts[order].astype(np.float32)
            last = np.flatnonzero(np.append(codes[1:] != codes[:-1], True))
            found.append(codes[last])
            ends.append((at + last + 1).astype(np.uint64))
            at += len(codes)
            docs.tofile(docs_file)
            np.rint(255 * counts / (counts + norm[docs])).clip(1).astype(np.uint8).tofile(weights)
    np.save(place / "terms.npy", np.concatenate(found))
    np.save(place / "ends.npy", np.concatenate(ends))
    return {"n_terms": sum(map(len, found)), "n_postings": at}


def _ranges(runs: list[np.ndarray], most: int) -> Iterator[list[slice]]:
    """Slices of the sorted runs that hold the same terms, about `most` together, none empty."""
    step = max(most // 64 // max(len(runs), 1), 1)
    sample = np.sort(np.concatenate([codes[::step] for codes in runs]))
    # Each run adds up to one step more than the sample shows.
    borders = np.unique(sample[:: max(most // step - len(runs), 1)][1:])
    before = [0] * len(runs)
    for border in [*borders, None]:
        here = [len(c) if border is None else int(np.searchsorted(c, border)) for c in runs]
        if here != before:
            yield [slice(a, b) for a, b in zip(before, here, strict=True)]
        before = here
