"""Canonical rows become token files: ids and roles, nothing that depends on a template.

    text     ids of the text, then <eos>
    chat     one piece a message with its role; labels and <eos> are added at load time
    summary  a piece "text" and a piece "summary"; of its meta a piece for each keyword, and one for
             discipline and category

Streams in batches: memory does not grow with the shard, but for 8 bytes a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babyllama.errors import DataError
from babyllama.rows import read_rows, row_kind
from babyllama.token_file import META, TokenFileWriter, pair
from data_process.executor import Counts
from tokenizer import Tokenizer, defused

BATCH_CHARS = 200_000


@dataclass(frozen=True)
class PretokenizeConfig:
    """What decides the bytes of a token file, next to its rows."""

    tokenizer: Path
    kind: str


def pieces_of(row: dict) -> list[tuple[str, str]]:
    """The texts of a row with their roles."""
    if "messages" in row:
        pieces = [("image", row["image"])] if "image" in row else []
        return pieces + [(message["role"], message["content"]) for message in row["messages"]]
    pieces = [(key, row[key]) for key in ("text", "summary") if key in row]
    for key in META:
        value = row.get("meta", {}).get(key, [])
        words = value if isinstance(value, list) else [value]
        pieces += [(key, word) for word in words if isinstance(word, str) and word.strip()]
    return pieces


def as_content(text: str, kind: str) -> str:
    """A text as rows of this kind hold it: what is laid into a dialogue begins no turn there."""
    return text if kind == "text" else defused(text, "\n" if kind == "summary" else "")


def batches(source: Path, kind: str) -> Iterator[list[list[tuple[str, str]]]]:
    """The rows of a file as pieces, in lists of about BATCH_CHARS characters.

    raises: DataError at a row of another kind
    """
    batch, n_chars = [], 0
    for row in read_rows(source):
        if row_kind(row) != kind:
            raise DataError(f"{source}: wanted {kind} rows only, found {row['id']!r}; "
                            f"make the set again: python -m data_process.run")  # fmt: skip
        batch.append(pieces_of(row))
        n_chars += sum(len(text) for _, text in batch[-1])
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def pretokenize_shard(source: Path, target: Path, cfg: PretokenizeConfig) -> Counts:
    """Write target.bin and target.idx from a file of canonical rows."""
    tokenizer = Tokenizer(cfg.tokenizer)
    counts = {"rows": 0, "tokens": 0}
    with TokenFileWriter(target, cfg.kind, tokenizer) as writer:
        for batch in batches(source, cfg.kind):
            texts = [as_content(text, cfg.kind) for row in batch for _, text in row]
            encoded = iter(tokenizer.encode_batch(texts))
            for row in batch:
                pieces = [(role, next(encoded)) for role, _ in row]
                if cfg.kind == "text":
                    pieces = [("text", np.append(pieces[0][1], tokenizer.eos_id))]
                    writer.add_text(pieces[0][1])
                else:
                    writer.add_row(pieces)
                counts["rows"] += 1
                counts["tokens"] += sum(len(ids) for _, ids in pieces)
    return counts | {"files": [path.name for path in pair(target)]}
