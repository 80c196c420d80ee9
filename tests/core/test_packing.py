"""Packing across sources, and what a row weighs in the loss of a step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama.data import TrainData, best_fit, collate, open_data, pack, share, targets_per_row
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import TrainConfig, forward_backward
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


@pytest.mark.parametrize("micro", [1, 3, 16])
def test_by_row_the_loss_of_a_step_is_the_mean_of_the_rows_means(
    token_root, tokenizer, model, micro
):
    train = opened(token_root, tokenizer, weight_by="row")
    sums = forward_backward(model, train.batches(0, micro), WORLD, Scaler(WORLD.device, "float32"))
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    losses = []
    for row in train.rows(0):
        loss = model(**collate([[row]], tokenizer.pad_id))
        losses.append(loss.loss_sum / loss.n_targets)
    mean = sum(losses) / len(losses)
    mean.backward()
    assert sums[0] / sums[1] == pytest.approx(mean.item(), rel=1e-5)
    for weight, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-6)


def test_by_token_and_in_validation_there_are_no_weights(token_root, tokenizer):
    assert all("weights" not in b for b in opened(token_root, tokenizer).batches(0, 4))
    config = DataConfig((SourceConfig(str(token_root / "chat")),), weight_by="row")
    data = open_data(config, tokenizer, LENGTH, TrainConfig(batch_size=8))
    (name,) = data.val.names
    assert all("weights" not in batch for batch in data.val.batches(name, 4))


@pytest.mark.parametrize("ranks, micro", [(1, 4), (2, 2), (3, 1)])
def test_the_weights_of_a_step_add_up_to_its_targets_on_all_ranks(
    token_root, tokenizer, ranks, micro
):
    train = opened(token_root, tokenizer, weight_by="row")
    batches = [b for rank in range(ranks) for b in train.batches(3, micro, rank, ranks)]
    n_targets = sum(int((b["targets"] != IGNORED).sum()) for b in batches)
    total = sum(float(b["weights"][b["targets"] != IGNORED].sum()) for b in batches)
    assert total == pytest.approx(n_targets, rel=1e-5)


def row(n: int, n_learnt: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(n)
    targets = np.where(np.arange(n) < (n if n_learnt is None else n_learnt), tokens, IGNORED)
    return tokens, targets


def test_a_row_without_targets_has_no_weight_and_does_no_harm():
    sequences = [[row(4, 2), row(4, 0)], [row(6, 6)]]
    assert targets_per_row(sequences) == 4
    (batch,) = share(sequences, 2, 0, 1, 0, targets_per_row(sequences))
    learnt = batch["targets"] != IGNORED
    torch.testing.assert_close(batch["weights"][learnt], torch.tensor([2, 2, *[4 / 6] * 6]))
    assert targets_per_row([[row(3, 0)]]) == 0


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
