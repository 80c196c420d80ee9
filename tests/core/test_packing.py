"""Packing across sources, and what a row weighs in the loss of a step."""

from pathlib import Path

import numpy as np
import torch

from babyllama.data import TrainData, best_fit, collate, open_data, pack
from babyllama.distributed import World
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import TrainConfig
from babyllama.tuning.preference import Pair
from conftest import SMALL_PROMPTS
from model import IGNORED
from tokenizer import Tokenizer

LENGTH = 128
WORLD = World(0, 1, torch.device("cpu"))


def opened(token_root: Path, tokenizer: Tokenizer, **changes: object) -> TrainData:
    sources = tuple(SourceConfig(str(token_root / name)) for name in ("chat", "summary"))
    config, order = DataConfig(sources, SMALL_PROMPTS, **changes), TrainConfig(batch_size=16)
    return open_data(config, tokenizer, LENGTH, order, READERS).train


def lengths(rows: list) -> list[int]:
    return [len(tokens) for tokens, _ in rows]


def test_rows_of_different_sources_share_sequences(token_root, tokenizer):
    train = opened(token_root, tokenizer)
    mixed, together, apart = 0, 0, 0
    for step in range(6):
        rows = train.rows(step)
        of = {id(row[0]): train.mixture.place(16 * step + n)[1] for n, row in enumerate(rows)}
        sequences = pack(rows, LENGTH)
        kinds = [{of[id(tokens)] for tokens, _ in sequence} for sequence in sequences]
        mixed += sum(len(kind) == 2 for kind in kinds)
        together += len(sequences)
        for source in (0, 1):
            alone = [row for row in rows if of[id(row[0])] == source]
            apart += len(best_fit(lengths(alone), LENGTH))
    assert mixed > 0 and together < apart


def row(n: int, n_learnt: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(n)
    targets = np.where(np.arange(n) < (n if n_learnt is None else n_learnt), tokens, IGNORED)
    return tokens, targets


def test_the_two_of_a_pair_stand_side_by_side():
    rows = [Pair(row(n), row(m)) for n, m in ((9, 20), (14, 2), (5, 6), (1, 1))]
    sequences = pack(rows, 32)
    found = {id(tokens): (line, place) for line, sequence in enumerate(sequences)
             for place, (tokens, _) in enumerate(sequence)}  # fmt: skip
    for pair in rows:
        line, place = found[id(pair.chosen[0])]
        assert place % 2 == 0 and found[id(pair.rejected[0])] == (line, place + 1)
    assert len(sequences) == 2
    assert all(sum(lengths(sequence)) <= 32 for sequence in sequences)
    assert collate(sequences, 0)["segments"].max() == 4
