"""Look at rows: what is stored, what the model reads, and which tokens it learns to say.

    python -m data_process.tools.inspect_set data/clean/csl/train-00000.jsonl
    python -m data_process.tools.inspect_set data/tokens/sample/csl/train-00000.bin --random 7
    python -m data_process.tools.inspect_set data/clean/csl/train-00000.jsonl --row csl/17

With --wordings 10, a summary row in so many wordings. Learnt tokens are green; in a pipe, or with
NO_COLOR set, they stand in ⟦ ⟧ instead. With --pieces a | is the border of two tokens, · a token
that ends inside a character, ↵ a new line, ␣ a space. Invisible characters are spelled out
(\\u200b). Rows are numbered from 0.

What a row looks like to the model is decided by tokenizer.py and babyllama/prompts.py.
"""

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from babyllama.analysis.terminal_text import (
    BOLD,
    DIM,
    Painter,
    clipped,
    outline,
    painter_of,
    visible,
    width_of,
)
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.prompts import SummaryPrompts
from babyllama.rows import read_rows, row_kind
from babyllama.token_file import TokenFile, pair
from data_process.pretokenize import as_content, pieces_of
from tokenizer import Tokenizer

SHORT_TEXT = 12  # tokens of the text that --wordings shows


@dataclass(frozen=True)
class InspectConfig:
    """Settings of data_process.tools.inspect_set.

    Args:
        file: rows (.jsonl), or a token file: its .bin, its .idx, or the name without either
        n: how many rows
        start: number of the first row
        row: one row, by its number or its id
        random: draw the rows with this seed instead of taking the first
        grep: only rows that hold this text (id and meta included)
        tokenizer: a SentencePiece .model (default: the one in data/tokenizers, or that which fits)
        pieces: show every token by itself
        wordings: show summary rows in the wordings of this many epochs
        prompts: where the wordings come from
        seed: train.seed of the run whose wordings are shown
        epoch: the first epoch whose wordings are shown
    """

    file: Path | None = None
    n: int = 3
    start: int = 0
    row: str | None = None
    random: int | None = None
    grep: str | None = None
    tokenizer: Path | None = None
    pieces: bool = False
    wordings: int = 0
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        for name, least in {"n": 1, "start": 0, "wordings": 0, "seed": 0, "epoch": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} wants {least} or more, found {getattr(self, name)}")
        if self.row is not None and (self.random is not None or self.grep is not None):
            raise ConfigError("--row names one row; leave out --random and --grep")


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
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".bin"))
        raise DataError(
            f"{shown(path)}: wanted a file, found a directory; name a file in it: "
            f"{', '.join(inside[:6]) or 'but there is no .jsonl and no .bin'}"
        )
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"{shown(path)}: wanted rows (.jsonl) or tokens (.bin, .idx), found {path.name!r}; "
            f"raw files become rows with python -m data_process.run"
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
        f"({file.vocab_size} pieces, by its directory {file.bin_path.parent.parent.name!r}), "
        f"found {', '.join(map(shown, known)) or 'none in data/tokenizers'}; "
        f"name the right one with --tokenizer"
    )


def choose(rows: Iterable[Row], cfg: InspectConfig, tokenizer: Tokenizer | None) -> list[Row]:
    """The rows that are asked for, in the order of the file.

    raises: DataError if there are none
    """
    number, row_id, kept, n_fitting = -1, None, [], 0
    chance = random.Random(cfg.random)
    for row in rows:
        number, row_id = row.number, row.id
        if cfg.row is not None:
            if cfg.row in (str(number), row_id):
                return [row]
        elif number >= cfg.start and (cfg.grep is None or cfg.grep in _searched(row, tokenizer)):
            n_fitting += 1
            if len(kept) < cfg.n:
                kept.append(row)
            elif cfg.random is not None and (place := chance.randrange(n_fitting)) < cfg.n:
                kept[place] = row
        if cfg.random is None and len(kept) == cfg.n:
            break
    if kept:
        return sorted(kept)
    if number < 0:
        raise DataError(f"{cfg.file}: wanted rows, found an empty file; make the data set again")
    wanted = f"row {cfg.row!r}" if cfg.row is not None else f"a row from number {cfg.start} on"
    wanted += f" that holds {cfg.grep!r}" if cfg.grep is not None else ""
    ids = f"ids like {row_id!r}" if row_id else "and a token file knows no ids"
    raise DataError(
        f"{cfg.file}: wanted {wanted}, found none; its rows have the numbers 0 to {number}, {ids}"
    )


def _searched(row: Row, tokenizer: Tokenizer | None) -> str:
    unseen = [row.id, json.dumps(row.source.get("meta"), ensure_ascii=False)] if row.source else []
    return "\n".join([*unseen, *(text for _, text in row.texts(tokenizer))])


def wording(row: Row, pieces: list, prompts: SummaryPrompts, *key: int) -> list[dict]:
    """A summary row as the dialogue that a run reads whose only source is this one file.

    key: (seed, epoch)
    """
    # As Mixture.row in babyllama/data.py draws; an only source has number 0.
    rng = np.random.default_rng((*key, 0, row.number, 0))
    meta = {role: [ids for r, ids in pieces[2:] if r == role] for role, _ in pieces[2:]}
    return prompts.messages(pieces[0][1], pieces[1][1], rng, meta=meta)


def as_read(
    row: Row, tokenizer: Tokenizer, prompts: SummaryPrompts | None, cfg: InspectConfig
) -> tuple[list[int], list[int]]:
    """What the model reads of a row, and 1 where it learns to say it: (ids, mask)."""
    pieces = row.ids(tokenizer)
    if row.kind == "text":
        return pieces[0][1], [1] * len(pieces[0][1])
    messages = [{"role": role, "content": [ids]} for role, ids in pieces]
    if row.kind == "summary":
        messages = wording(row, pieces, prompts, cfg.seed, cfg.epoch)
    return tokenizer.render_chat(messages)


def show_wordings(row: Row, prompts: SummaryPrompts, painter: Painter, cfg: InspectConfig) -> None:
    """One line an epoch, with the beginning of the text."""
    (_, text), (_, summary), *meta = row.ids(prompts.tokenizer)
    if len(text) > SHORT_TEXT:
        text = text[:SHORT_TEXT] + prompts.tokenizer.encode("…")
    for epoch in range(cfg.epoch, cfg.epoch + cfg.wordings):
        pieces = [("text", text), ("summary", summary), *meta]
        messages = wording(row, pieces, prompts, cfg.seed, epoch)
        line = painter.dialogue(prompts.tokenizer.render_chat(messages)).replace("\n", "↵")
        print(painter.ink(DIM, f"epoch {epoch:<3}"), line)


def lengths(row: Row, texts: list[tuple[str, str]], tokenizer: Tokenizer | None) -> str:
    """Characters and tokens of a row's contents by role."""
    chars, tokens = Counter(), Counter()
    for role, text in texts:
        chars[role] += len(text)
    for role, ids in row.ids(tokenizer) if tokenizer else []:
        tokens[role] += len(ids)
    each = [
        f"{role} {n:,} characters" + (f" = {tokens[role]:,} tokens" if tokenizer else "")
        for role, n in chars.items()
    ]
    if tokenizer:
        each.append(f"{chars.total() / max(1, tokens.total()):.2f} characters a token")
    return " · ".join(each)


def show(row: Row, painter: Painter, prompts: SummaryPrompts | None, cfg: InspectConfig) -> None:
    """Print one row."""
    tokenizer, texts = painter.tokenizer, row.texts(painter.tokenizer)
    title = " · ".join([row.id] * bool(row.id) + [row.kind, f"row {row.number}"])
    print(painter.ink(BOLD, title), painter.ink(DIM, "─" * (painter.width - width_of(title) - 1)))
    if row.source:
        line = visible(json.dumps(outline(row.source), ensure_ascii=False))
        print(painter.ink(DIM, clipped(line, 2 * painter.width)))
    for text in [text for _, text in texts if cfg.grep and cfg.grep in text][:1]:
        print(painter.context(text, cfg.grep))
    if cfg.wordings:
        show_wordings(row, prompts, painter, cfg)
    elif tokenizer is None:
        print("\n".join(f"{painter.ink(BOLD, role)}  {visible(text)}" for role, text in texts))
    else:
        ids, mask = as_read(row, tokenizer, prompts, cfg)
        print(painter.dialogue((ids, mask), cfg.pieces))
        print(painter.ids(ids, cfg.pieces))
        print(painter.ink(DIM, f"{len(ids):,} tokens read by the model, {sum(mask):,} learnt"))
        if row.source and [t for _, t in texts if tokenizer.decode(tokenizer.encode(t)) != t]:
            print("this tokenizer changes the row's text")
    print(painter.ink(DIM, lengths(row, texts, tokenizer)), end="\n\n")


def main(cfg: InspectConfig) -> None:
    """Show the rows that are asked for."""
    if cfg.file is None:
        raise ConfigError(
            "nothing to look at: name a file, python -m data_process.tools.inspect_set FILE"
        )
    rows, tokenizer = open_rows(from_repo(cfg.file), cfg.tokenizer)
    bar = tqdm(rows, desc="searching", unit=" rows", delay=1, leave=False, disable=None)
    chosen = choose(bar, cfg, tokenizer)
    bar.close()
    kinds, prompts = {row.kind for row in chosen}, None
    if tokenizer:
        print(f"tokens of {shown(tokenizer.path)}", file=sys.stderr)
    else:
        known = ", ".join(map(shown, known_tokenizers(from_repo(cfg.file)))) or "none"
        print(f"tokens are shown with --tokenizer FILE; there are: {known}", file=sys.stderr)
    if cfg.wordings and (kinds != {"summary"} or tokenizer is None):
        raise ConfigError(
            f"--wordings wants summary rows and a tokenizer, found {', '.join(sorted(kinds))} rows "
            f"and {'no' if tokenizer is None else 'a'} tokenizer in {cfg.file}"
        )
    if "summary" in kinds and tokenizer:
        prompts = SummaryPrompts.load(from_repo(cfg.prompts), tokenizer)
    painter = painter_of(tokenizer)
    for row in chosen:
        show(row, painter, prompts, cfg)


if __name__ == "__main__":
    run(main, parse(InspectConfig, __doc__, positional=("file",)))
