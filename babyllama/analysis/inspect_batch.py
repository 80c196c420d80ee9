"""The first batch of a run, readable: `python sft.py --dataset csl --inspect`.

The sequences of the first micro-batch, each with its segments: source, row, and the text with what
is learnt in green (in ⟦ ⟧ where there are no colours). Nothing is computed or written.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from babyllama.analysis.terminal_text import GREEN, RESET, visible
from babyllama.data import TrainData, pack
from babyllama.sources import Row
from model import IGNORED
from tokenizer import Tokenizer


def shown_batch(
    data: TrainData, n_sequences: int, tokenizer: Tokenizer, colours: bool
) -> Iterator[str]:
    """The lines that show the first `n_sequences` of step 0."""
    rows = data.rows(0)
    labels = _labels(data, rows)
    sequences = pack(rows, data.max_seq_len)
    yield _summary(data, labels, sequences)
    for number, sequence in enumerate(sequences[:n_sequences], 1):
        n_used = sum(len(tokens) for tokens, _ in sequence)
        yield ""
        yield (
            f"sequence {number} · {n_used} of {data.max_seq_len} positions · "
            f"{len(sequence)} segments"
        )
        for segment, row in enumerate(sequence, 1):
            n_learnt = int((row[1] != IGNORED).sum())
            yield f"[{segment}] {labels[id(row[0])]}: {len(row[0])} tokens, {n_learnt} learnt"
            yield dialogue(tokenizer, read_of(row), colours)
    left = len(sequences) - n_sequences
    if left > 0:
        yield f"\n{left} more sequences in this step"


def dialogue(tokenizer: Tokenizer, read: tuple[list[int], list[int]], colours: bool) -> str:
    """The text of (ids, mask), what is learnt marked; control tokens by name."""
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    begin, end = (GREEN, RESET) if colours else "⟦⟧"
    found = ""
    for is_learnt, run_of in groupby(zip(*read, strict=True), key=lambda pair: pair[1]):
        decode, text = tokenizer.stream_decoder(), ""
        for token, _ in run_of:
            has_text = tokenizer.n_bytes([token])
            text += visible(decode(token)) if has_text else names.get(token, f"<{token}>")
        found += f"{begin}{text}{end}" if is_learnt else text
    return found


def _labels(data: TrainData, rows: list[Row | tuple[Row, ...]]) -> dict[int, str]:
    """Source and number of each row, by the identity of its tokens."""
    found = {}
    for position, row in enumerate(rows):
        _, source, number, copy = data.mixture.place(position)
        again = f" copy {copy + 1}" if copy else ""
        name = f"{data.mixture.sources[source].name} row {number}{again}"
        if parts := getattr(row, "_fields", ()):  # several that belong together
            for part, (ids, _) in zip(parts, row, strict=True):
                found[id(ids)] = f"{name} {part}"
        else:
            found[id(row[0])] = name
    return found


def _summary(data: TrainData, labels: dict[int, str], sequences: list[list[Row]]) -> str:
    """Rows by source, fill, and the share of positions that are learnt."""
    sources = Counter(label.partition(" row ")[0] for label in labels.values())
    tokens = [row for sequence in sequences for row in sequence]
    n_tokens = sum(len(ids) for ids, _ in tokens)
    n_learnt = sum(int((targets != IGNORED).sum()) for _, targets in tokens)
    room = len(sequences) * data.max_seq_len
    return (
        f"step 1: {', '.join(f'{name} {n}' for name, n in sources.items())}; {len(sequences)} "
        f"sequences of {data.max_seq_len} positions, {n_tokens / room:.1%} filled; {n_learnt:,} of "
        f"{n_tokens:,} tokens learnt"
    )


def read_of(row: Row) -> tuple[list[int], list[int]]:
    """A row as (ids, mask), where 1 marks what is learnt."""
    tokens, targets = row
    last = [] if targets[-1] == IGNORED else [int(targets[-1])]
    mask = np.where(targets == IGNORED, 0, 1)
    return tokens.tolist() + last, [0, *mask.tolist()][: len(tokens) + len(last)]
