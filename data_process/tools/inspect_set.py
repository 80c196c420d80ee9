"""Look into token files: what the model reads of a row, and which tokens it learns to say.

    python -m data_process.tools.inspect_set data/tokens/sample/csl/train-00000
    python -m data_process.tools.inspect_set data/tokens/sample/csl/train-00000 --start 17 --pieces

Learnt tokens are green; in a pipe, or with NO_COLOR set, they stand in ⟦ ⟧ instead. With --pieces a
| is the border of two tokens, · a token that ends inside a character, ↵ a new line, ␣ a space.
Invisible characters are spelled out (\\u200b). Rows are numbered from 0. A summary row is shown in
the wording of the first epoch.

What a row looks like to the model is decided by tokenizer.py and babyllama/prompts.py.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babyllama.analysis.terminal_text import BOLD, DIM, painter_of
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.prompts import SummaryPrompts
from babyllama.token_file import TokenFile
from tokenizer import Tokenizer

PROMPTS = Path("configs/prompts/summary_zh.yaml")


@dataclass(frozen=True)
class InspectConfig:
    """Settings of data_process.tools.inspect_set.

    Args:
        file: a token file: its .bin, its .idx, or the name without either
        n: how many rows
        start: number of the first row
        tokenizer: a SentencePiece .model (default: the one in data/tokenizers that fits)
        pieces: show every token by itself
    """

    file: Path | None = None
    n: int = 3
    start: int = 0
    tokenizer: Path | None = None
    pieces: bool = False


def tokenizer_of(file: TokenFile, named: Path | None) -> Tokenizer:
    """The tokenizer that made a file: the named one, or one of the data directory it lies in.

    raises: DataError if there is none
    """
    roots = [*file.bin_path.resolve().parents[1:4], from_repo("data")]
    known = [path for root in roots for path in sorted(root.glob("tokenizers/*.model"))]
    known = [from_repo(named)] if named else known
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


def as_read(
    file: TokenFile, number: int, tokenizer: Tokenizer, prompts: SummaryPrompts | None
) -> tuple[list[int], list[int]]:
    """What the model reads of a row, and 1 where it learns to say it: (ids, mask)."""
    if file.kind == "text":
        ids = file.doc(number).tolist()
        return ids, [1] * len(ids)
    pieces = [(role, ids.tolist()) for role, ids in file.pieces(number) if role != "image"]
    messages = [{"role": role, "content": [ids]} for role, ids in pieces]
    if file.kind == "summary":
        # As Mixture.row in babyllama/data.py draws at seed 0, in epoch 0, of an only source.
        rng = np.random.default_rng((0, 0, 0, number, 0))
        meta = {role: [ids for r, ids in pieces[2:] if r == role] for role, _ in pieces[2:]}
        assert prompts
        messages = prompts.messages(pieces[0][1], pieces[1][1], rng, meta=meta)
    return tokenizer.render_chat(messages)


def main(cfg: InspectConfig) -> None:
    """Show the rows that are asked for."""
    if cfg.file is None:
        raise ConfigError(
            "nothing to look at: name a file, python -m data_process.tools.inspect_set FILE"
        )
    file = TokenFile(from_repo(cfg.file))
    if cfg.n < 1 or not 0 <= cfg.start < file.n_docs:
        raise ConfigError(
            f"{cfg.file}: wanted --n of 1 or more and --start below its {file.n_docs} rows, found "
            f"{cfg.n} and {cfg.start}"
        )
    tokenizer = tokenizer_of(file, cfg.tokenizer)
    print(f"tokens of {shown(tokenizer.path)}", file=sys.stderr)
    is_summary = file.kind == "summary"
    prompts = SummaryPrompts.load(from_repo(PROMPTS), tokenizer) if is_summary else None
    painter = painter_of(tokenizer)
    for number in range(cfg.start, min(cfg.start + cfg.n, file.n_docs)):
        ids, mask = as_read(file, number, tokenizer, prompts)
        print(painter.ink(BOLD, f"{file.kind} · row {number}"))
        print(painter.dialogue((ids, mask), cfg.pieces))
        print(painter.ids(ids, cfg.pieces))
        print(painter.ink(DIM, f"{len(ids):,} tokens read by the model, {sum(mask):,} learnt"))
        print()


if __name__ == "__main__":
    run(main, parse(InspectConfig, __doc__, positional=("file",)))
