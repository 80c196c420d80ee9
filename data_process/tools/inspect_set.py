"""Look at rows: what is stored, what the model reads, and which tokens it learns to say.

    python -m data_process.tools.inspect_set data/clean/csl/train-00000.jsonl
    python -m data_process.tools.inspect_set data/tokens/sample/csl/train-00000.bin --start 70
    python -m data_process.tools.inspect_set data/clean/csl/train-00000.jsonl --row csl/17

Learnt tokens are green; in a pipe, or with NO_COLOR set, they stand in ⟦ ⟧ instead. With --pieces a
| is the border of two tokens, · a token that ends inside a character, ↵ a new line, ␣ a space.
Invisible characters are spelled out (\\u200b). Rows are numbered from 0. A summary row is shown in
the wording of the first epoch.

What a row looks like to the model is decided by tokenizer.py and babyllama/prompts.py.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len
from tqdm import tqdm

from babyllama.analysis.terminal_text import (
    BOLD,
    DIM,
    Painter,
    clipped,
    outline,
    painter_of,
    visible,
)
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.prompts import SummaryPrompts
from babyllama.rows import read_rows, row_kind
from babyllama.token_file import TokenFile, pair
from data_process.pretokenize import as_content, pieces_of
from tokenizer import Tokenizer

PROMPTS = Path("configs/prompts/summary_zh.yaml")


@dataclass(frozen=True)
class InspectConfig:
    """Settings of data_process.tools.inspect_set.

    Args:
        file: rows (.jsonl), or a token file: its .bin, its .idx, or the name without either
        n: how many rows
        start: number of the first row
        row: one row, by its number or its id
        tokenizer: a SentencePiece .model (default: the one in data/tokenizers, or that which fits)
        pieces: show every token by itself
    """

    file: Path | None = None
    n: int = 3
    start: int = 0
    row: str | None = None
    tokenizer: Path | None = None
    pieces: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.start < 0:
            raise ConfigError(
                f"wanted --n of 1 or more and --start of 0 or more, found {self.n} and {self.start}"
            )


class Row(NamedTuple):
    """A row of either kind of file: contents are strings, or the stored ids.

    source: the JSON object, where there is one
    """

    number: int
    kind: str
    pieces: Sequence[tuple[str, str | np.ndarray]]
    source: dict | None = None

    @property
    def id(self) -> str | None:
        return self.source["id"] if self.source else None

    def texts(self, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
        """Every content as text."""
        if tokenizer is None:
            return [(role, str(content)) for role, content in self.pieces]
        return [(r, c if isinstance(c, str) else tokenizer.decode(c)) for r, c in self.pieces]

    def ids(self, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
        """Every content as a token file holds it; a text ends with <eos>."""
        eos, as_ids = self.kind == "text", tokenizer.encode
        return [
            (r, as_ids(as_content(c, self.kind), eos=eos) if isinstance(c, str) else c.tolist())
            for r, c in self.pieces
        ]


def open_rows(path: Path, named: Path | None) -> tuple[Iterator[Row], Tokenizer | None]:
    """The rows of a file, and the tokenizer to read them with.

    named: the tokenizer the user wants
    returns: no tokenizer for rows without a named one, where there are several or none
    raises: DataError if the file holds neither rows nor tokens, or no tokenizer fits its ids
    """
    if path.suffix in (".bin", ".idx") or (not path.exists() and pair(path)[1].is_file()):
        file = TokenFile(path)
        return _token_rows(file), _tokenizer_of(file, named)
    if not path.exists():
        raise DataError(
            f"{shown(path)}: no such file; wanted rows (.jsonl) or tokens (.bin and .idx), "
            f"as python -m data_process.run writes them to data/clean and data/tokens"
        )
    if path.suffix not in (".jsonl", ".json"):
        inside = [p.name for p in sorted(path.glob("*")) if p.suffix in (".jsonl", ".bin")]
        raise DataError(
            f"{shown(path)}: wanted rows (.jsonl) or tokens (.bin, .idx), as data_process.run "
            f"writes them, found another file or a directory of: {', '.join(inside[:6]) or '-'}"
        )
    rows = (Row(n, row_kind(row), pieces_of(row), row) for n, row in enumerate(read_rows(path)))
    known = [from_repo(named)] if named else known_tokenizers(path)
    return rows, Tokenizer(known[0]) if len(known) == 1 else None


def _token_rows(file: TokenFile) -> Iterator[Row]:
    for number in range(file.n_docs):
        is_text = file.kind == "text"
        pieces = [("text", file.doc(number))] if is_text else file.pieces(number)
        yield Row(number, file.kind, pieces)


def known_tokenizers(path: Path) -> list[Path]:
    """The .model files of the data directory that a file lies in, else those of data/tokenizers."""
    near = [
        model for root in path.resolve().parents[1:4] for model in root.glob("tokenizers/*.model")
    ]
    return sorted(near or from_repo("data").glob("tokenizers/*.model"))


def _tokenizer_of(file: TokenFile, named: Path | None) -> Tokenizer:
    known = [from_repo(named)] if named else known_tokenizers(file.bin_path)
    for path in known:
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == file.fingerprint:
            return Tokenizer(path)
    raise DataError(
        f"{shown(file.bin_path)}: wanted the tokenizer that made it, {file.fingerprint[:12]}… "
        f"(vocabulary size {file.vocab_size}, by its directory "
        f"{file.bin_path.parent.parent.name!r}), "
        f"found {', '.join(map(shown, known)) or 'none in data/tokenizers'}; "
        f"name the right one with --tokenizer"
    )


def choose(rows: Iterable[Row], cfg: InspectConfig) -> list[Row]:
    """The rows that are asked for, in the order of the file.

    raises: DataError if there are none
    """
    number, row_id, kept, n = -1, None, [], 1 if cfg.row is not None else cfg.n
    for row in rows:
        number, row_id = row.number, row.id
        if number >= cfg.start and cfg.row in (None, str(number), row_id):
            kept.append(row)
        if len(kept) == n:
            break
    if kept:
        return kept
    if number < 0:
        raise DataError(f"{cfg.file}: wanted rows, found an empty file; make the data set again")
    wanted = f"row {cfg.row!r}" if cfg.row is not None else f"a row from number {cfg.start} on"
    ids = f"ids like {row_id!r}" if row_id else "and a token file knows no ids"
    raise DataError(
        f"{cfg.file}: wanted {wanted}, found none; its rows have the numbers 0 to {number}, {ids}"
    )


def as_read(
    row: Row, tokenizer: Tokenizer, prompts: SummaryPrompts | None
) -> tuple[list[int], list[int]]:
    """What the model reads of a row, and 1 where it learns to say it: (ids, mask)."""
    pieces = row.ids(tokenizer)
    if row.kind == "text":
        return pieces[0][1], [1] * len(pieces[0][1])
    messages = [{"role": role, "content": [ids]} for role, ids in pieces]
    if row.kind == "summary":
        # As Mixture.row in babyllama/data.py draws at seed 0, in epoch 0, of an only source.
        rng = np.random.default_rng((0, 0, 0, row.number, 0))
        meta = {role: [ids for r, ids in pieces[2:] if r == role] for role, _ in pieces[2:]}
        assert prompts
        messages = prompts.messages(pieces[0][1], pieces[1][1], rng, meta=meta)
    return tokenizer.render_chat(messages)


def show(row: Row, painter: Painter, prompts: SummaryPrompts | None, pieces: bool) -> None:
    """Print one row."""
    tokenizer, texts = painter.tokenizer, row.texts(painter.tokenizer)
    title = " · ".join([*filter(None, [row.id]), row.kind, f"row {row.number}"])
    print(painter.ink(BOLD, title), painter.ink(DIM, "─" * (painter.width - cell_len(title) - 1)))
    if row.source:
        line = visible(json.dumps(outline(row.source), ensure_ascii=False))
        print(painter.ink(DIM, clipped(line, 2 * painter.width)))
    if tokenizer is None:
        print("\n".join(f"{painter.ink(BOLD, role)}  {visible(text)}" for role, text in texts))
    else:
        ids, mask = as_read(row, tokenizer, prompts)
        print(painter.dialogue((ids, mask), pieces))
        print(painter.ids(ids, pieces))
        print(painter.ink(DIM, f"{len(ids):,} tokens read by the model, {sum(mask):,} learnt"))
        if row.source and [t for _, t in texts if tokenizer.decode(tokenizer.encode(t)) != t]:
            print("this tokenizer changes the row's text")
    print()


def main(cfg: InspectConfig) -> None:
    """Show the rows that are asked for."""
    if cfg.file is None:
        raise ConfigError(
            "nothing to look at: name a file, python -m data_process.tools.inspect_set FILE"
        )
    rows, tokenizer = open_rows(from_repo(cfg.file), cfg.tokenizer)
    bar = tqdm(rows, desc="searching", unit=" rows", delay=1, leave=False, disable=None)
    chosen, prompts = choose(bar, cfg), None
    bar.close()
    if tokenizer:
        print(f"tokens of {shown(tokenizer.path)}", file=sys.stderr)
    else:
        known = ", ".join(map(shown, known_tokenizers(from_repo(cfg.file)))) or "none"
        print(f"tokens are shown with --tokenizer FILE; there are: {known}", file=sys.stderr)
    if tokenizer and any(row.kind == "summary" for row in chosen):
        prompts = SummaryPrompts.load(from_repo(PROMPTS), tokenizer)
    painter = painter_of(tokenizer)
    for row in chosen:
        show(row, painter, prompts, cfg.pieces)


if __name__ == "__main__":
    run(main, parse(InspectConfig, __doc__, positional=("file",)))
