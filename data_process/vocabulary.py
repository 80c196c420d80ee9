"""Vocabularies: trained on canonical rows, looked at, and measured (`python tokenizer.py`).

A vocabulary is BPE with byte fallback, because other tools silently misread unigram models; text
is kept as it is (identity normalisation), digits are single pieces. It is learnt from a uniform
sample of the lines (Vitter 1985, algorithm R), so the memory is bounded. What reads a vocabulary:
tokenizer.py. Format: SentencePiece ModelProto (Kudo and Richardson 2018, arXiv:1808.06226).
"""

import io
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from jsonargparse import auto_cli
from tqdm import tqdm

from babyllama.config import (
    Parser,
    atomic_write,
    from_repo,
    require_writable,
    run,
    similar,
)  # fmt: skip
from babyllama.errors import ConfigError, DataError
from babyllama.language import Help, speak
from babyllama.rows import read_rows, texts_of
from tokenizer import Tokenizer


def train_vocabulary(
    texts: Iterable[str], out: Path, vocab_size: int, max_lines: int = 500_000, seed: int = 0
) -> None:
    """Train a vocabulary and write it to `out`, whole or not at all.

    max_lines: a uniform sample of this many lines is learnt from
    raises: ConfigError if the texts are too few for the vocabulary
    """
    require_writable(out)
    lines = _sample(_lines(texts), max_lines, seed)
    if not any(lines):
        raise ConfigError(
            f"cannot train a vocabulary of {vocab_size}: there is no text to learn from"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            # SentencePiece's sign for the space: spelled in bytes, it would not come back as one.
            required_chars="▁",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1_000_000,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"cannot train a vocabulary of {vocab_size} on this text: {_advice(str(error))}"
        ) from None
    with atomic_write(out) as temporary:
        temporary.write_bytes(model.getvalue())


def _advice(complaint: str) -> str:
    """What to do about a size that SentencePiece refuses, from its own words."""
    if found := re.search(r"required_chars\D+\d+ vs (\d+)", complaint):
        return f"its characters alone need {found[1]}; give --vocab_size {found[1]} or more"
    if found := re.search(r"<= (\d+)", complaint):
        return f"it holds {found[1]}; give --vocab_size {found[1]} or less, or more text"
    return f"{complaint.splitlines()[-1]}; give another --vocab_size or more text"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters; longer ones would take the trainer quadratic time."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]


def _sample(lines: Iterator[str], most: int, seed: int) -> list[str]:
    """A uniform sample of a stream whose length is not known."""
    chance = random.Random(seed)
    kept: list[str] = []
    for number, line in enumerate(lines):
        if number < most:
            kept.append(line)
        elif (place := chance.randrange(number + 1)) < most:
            kept[place] = line
    return kept


def _texts(rows: Path) -> Iterator[str]:
    """Every text of a canonical file, or of train-*.jsonl in a directory or those inside it."""
    place = from_repo(rows)
    files = [place]
    if place.is_dir():
        files = sorted(place.glob("train-*.jsonl")) or sorted(place.glob("*/train-*.jsonl"))
    if not files:
        raise DataError(
            f"{rows}: wanted train-*.jsonl, found none{similar(place)}; make them: "
            f"python -m data_process.run {place.name}"
        )
    for file in files:
        for row in tqdm(read_rows(file), desc=file.name, unit=" rows", leave=False):
            yield from texts_of(row)


def train(rows: Path, out: Path, vocab_size: int = 6000, max_lines: int = 500_000) -> None:
    """Train a vocabulary on the train part of canonical rows.

    Args:
        rows: a .jsonl of canonical rows, a directory of train-*.jsonl, or one of such directories
        out: the .model file to write
        vocab_size: number of tokens, control and byte tokens included
        max_lines: learn from a uniform sample of this many lines (bounds the memory)
    """
    train_vocabulary(_texts(rows), out, vocab_size, max_lines)
    print(f"{out}: vocabulary size {Tokenizer(out).vocab_size}")
    stats(out, rows)


def show(text: str, tokenizer: Path) -> None:
    """Show how a text splits, one token a line.

    Args:
        text: what to split
        tokenizer: a SentencePiece .model file
    """
    model = Tokenizer(tokenizer)
    ids = model.encode(text)
    for token in ids:
        print(f"{token:>7}  {model.sp.id_to_piece(token)!r}")
    same = "yes" if model.decode(ids) == text else f"no, {model.decode(ids)!r}"
    print(f"{len(text)} characters, {len(ids)} tokens; comes back unchanged: {same}")


def stats(tokenizer: Path, rows: Path) -> None:
    """Characters per token, round-trip rate and unused pieces of a set.

    Args:
        tokenizer: a SentencePiece .model file
        rows: a .jsonl of canonical rows, or a directory of train-*.jsonl
    """
    model = Tokenizer(tokenizer)
    n_texts = n_same = n_characters = n_tokens = n_byte_tokens = 0
    used: set[int] = set()
    for text in _texts(rows):
        ids = model.encode(text)
        n_texts += 1
        n_same += model.decode(ids) == text
        n_characters += len(text)
        n_tokens += len(ids)
        used.update(ids)
        n_byte_tokens += sum(map(model.sp.is_byte, ids))
    n_unused = sum(not model.sp.is_control(i) for i in set(range(model.vocab_size)) - used)
    print(f"{n_texts} texts, {n_characters} characters, {n_tokens} tokens")
    print(f"characters per token   {n_characters / max(n_tokens, 1):.3f}")
    print(f"come back unchanged    {n_same / max(n_texts, 1):.2%}")
    print(f"byte tokens            {n_byte_tokens / max(n_tokens, 1):.3%}")
    print(f"unused pieces          {n_unused} of {model.vocab_size}")


def main() -> None:
    """The three commands that tokenizer.py's docstring shows."""
    auto_cli(
        {"train": train, "show": show, "stats": stats}, speak(sys.argv[1:]), as_positional=False,
        parser_class=Parser, formatter_class=Help,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
