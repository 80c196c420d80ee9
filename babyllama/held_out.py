"""Held-out sets for language modelling: documents with their targets, from rows or token files.

A document of text is predicted whole, its <eos> included, after the <eos> that stands before it in
training. Of a dialogue the assistant's tokens are targets, of a summary row the summary, after the
one question that scoring asks (prompts.py). Bytes are those of the targets' text: of the original
for rows, of what the ids stand for in token files, which is the same for a tokenizer that changes
nothing.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from babyllama.cli import from_repo, shown
from babyllama.errors import DataError
from babyllama.prompts import SummaryPrompts
from babyllama.rows import read_rows, row_kind
from babyllama.token_file import TokenFile
from tokenizer import Tokenizer

# A summary row whose text would keep less than this is left out.
_LEAST_TEXT = 16

Pieces = list[tuple[str, Sequence[int]]]


class Document(NamedTuple):
    """What a model reads of one document, and what of it is predicted.

    ids: (N,) int64; is_target: (N,) bool, the first is False
    text: the targets' text
    """

    ids: np.ndarray
    is_target: np.ndarray
    n_bytes: int
    text: str


@dataclass
class HeldOut:
    """One set.

    sha256: of its files; with n_rows it says which documents these are
    counts: what was cut, left out or changed, by reason
    """

    name: str
    files: list[str]
    sha256: str
    documents: list[Document]
    counts: dict[str, int]


def find_files(item: str, split: str, tokenizer: Tokenizer) -> list[Path]:
    """The files of one set: rows where there are some, for their bytes are the original's.

    item: a file of rows, one of a pair of token files, a folder with either, or a set's name
    raises: DataError if there is nothing
    """
    path = from_repo(item)
    if path.is_file():
        return [path.with_suffix(".idx") if path.suffix == ".bin" else path]
    folders = [path] if path.is_dir() else []
    if "/" not in item and "\\" not in item:
        tokens = Path("data/tokens") / tokenizer.path.stem
        folders += [from_repo(root / item) for root in (Path("data/clean"), tokens)]
    for folder in folders:
        for ending in ("jsonl", "idx"):
            files = sorted(folder.glob(f"{split}-*.{ending}"))
            if files:
                return files
    raise DataError(
        f"wanted {split}-*.jsonl or {split}-*.idx of {item!r}, found none in "
        f"{', '.join(map(shown, folders)) or shown(path)}; name a file or folder, or make the set: "
        f"python -m data_process.run {Path(item).name}"
    )


def open_held_out(
    item: str,
    split: str,
    max_rows: int | None,
    tokenizer: Tokenizer,
    prompts: Path,
    max_seq_len: int,
) -> HeldOut:
    """The first rows of a set as documents.

    raises: DataError if it is missing, damaged or of another tokenizer, or holds no target
    """
    files = find_files(item, split, tokenizer)
    reader = _Reader(tokenizer, prompts, max_seq_len)
    documents = list(reader.documents(files, max_rows))
    if not documents:
        raise DataError(
            f"{item}: no row of {split} can be scored in {max_seq_len} tokens {reader.counts}; "
            f"name another set or a model with a longer context"
        )
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    counts = {reason: n for reason, n in reader.counts.items() if n}
    return HeldOut(item, [shown(f) for f in files], digest.hexdigest(), documents, counts)


class _Reader:
    """Turns rows and the contents of token files into documents, and counts what it changes."""

    def __init__(self, tokenizer: Tokenizer, prompts: Path, max_seq_len: int) -> None:
        self.tokenizer, self._path, self._length = tokenizer, prompts, max_seq_len
        self.counts = {"text_cut": 0, "summary_does_not_fit": 0, "changed_by_tokenizer": 0}
        self._prompts: SummaryPrompts | None = None
        self._lossy = False

    def documents(self, files: Sequence[Path], max_rows: int | None) -> Iterator[Document]:
        n_rows = 0
        for path in files:
            rows = self._token_rows(path) if path.suffix == ".idx" else self._text_rows(path)
            for kind, pieces, text, n_bytes in rows:
                if n_rows == max_rows:
                    return
                n_rows += 1
                ids, mask = self._laid_out(kind, pieces)
                if ids is None:
                    self.counts["summary_does_not_fit"] += 1
                    continue
                self.counts["changed_by_tokenizer"] += self._lossy
                yield Document(np.array(ids, np.int64), np.array(mask, bool), n_bytes, text)

    def _text_rows(self, path: Path) -> Iterator[tuple[str, Pieces, str, int]]:
        for row in read_rows(path):
            kind = row_kind(row)
            if kind == "chat":
                contents = [(m["role"], m["content"]) for m in row["messages"]]
            else:
                contents = [(key, row[key]) for key in ("text", "summary") if key in row]
            pieces = [(role, self.tokenizer.encode(content)) for role, content in contents]
            targets = [i for i, (role, _) in enumerate(contents) if role in _TARGETS[kind]]
            self._lossy = any(
                self.tokenizer.decode(pieces[i][1]) != contents[i][1] for i in targets
            )
            text = "".join(contents[i][1] for i in targets)
            yield kind, pieces, text, len(text.encode())

    def _token_rows(self, path: Path) -> Iterator[tuple[str, Pieces, str, int]]:
        file, self._lossy = TokenFile(path, self.tokenizer.fingerprint), False
        for number in range(file.n_docs):
            if file.kind == "text":
                ids = file.doc(number).tolist()
                # The document's own <eos> is laid round it again.
                pieces = [("text", ids[:-1] if ids[-1:] == [self.tokenizer.eos_id] else ids)]
            else:
                pieces = [(role, ids.tolist()) for role, ids in file.pieces(number)]
            said = [ids for role, ids in pieces if role in _TARGETS[file.kind]]
            text = "".join(map(self.tokenizer.decode, said))
            yield file.kind, pieces, text, sum(map(self.tokenizer.n_bytes, said))

    def _laid_out(self, kind: str, pieces: Pieces) -> tuple[list[int] | None, list[int]]:
        """The ids of a document, and which of them are targets; no ids if it cannot fit."""
        if kind == "text":
            ids = [self.tokenizer.eos_id, *pieces[0][1], self.tokenizer.eos_id]
            return ids, [0] + [1] * (len(ids) - 1)
        self.tokenizer.require_dialogue()
        if kind == "chat":
            return self._chat([(role, ids) for role, ids in pieces])
        if self._prompts is None:
            self._prompts = SummaryPrompts.load(from_repo(self._path), self.tokenizer)
        (_, text), (_, summary) = pieces[:2]
        frame = self._asked([], None, summary)[0]
        room = self._length + 1 - len(frame)
        if room < min(len(text), _LEAST_TEXT):
            return None, []
        self.counts["text_cut"] += len(text) > room
        return self._asked(text, room, summary)

    def _asked(self, text: Sequence[int], room: int | None, summary: Sequence[int]):
        answer = {"role": "assistant", "content": [summary]}
        question = self._prompts.eval_messages(text, room)
        return self.tokenizer.render_chat([*question, answer])

    def _chat(self, pieces: Pieces) -> tuple[list[int], list[int]]:
        messages = [{"role": role, "content": [ids]} for role, ids in pieces]
        return self.tokenizer.render_chat(messages)


_TARGETS = {"text": ("text",), "chat": ("assistant",), "summary": ("summary",)}


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 of the targets' texts: the same documents for any tokenizer have the same."""
    texts = json.dumps([document.text for document in documents], ensure_ascii=False)
    return hashlib.sha256(texts.encode()).hexdigest()
