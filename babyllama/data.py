"""From sources to batches: their mixture, one global order, rows packed into sequences.

The order is a pure function of (seed, epoch), the global batch of step s of (seed, s): it depends
neither on the number of processes nor on the micro-batch size, and resuming needs the step
number and nothing else. Every step takes the same number of rows, whatever their source
(sources.py); dialogues are then packed into sequences by best fit decreasing (Johnson 1974). Rows
that share a sequence are kept apart by `segments`, and attention does not cross them. Batches are
dicts whose keys are the parameter names of the model's forward.
"""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from babyllama.errors import ConfigError
from babyllama.sources import READERS, DataConfig, Reader, Row, Source, open_source
from babyllama.token_file import require_token_files
from model import IGNORED
from tokenizer import Tokenizer


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into few bins: longest first, each into the fullest bin that still holds it.

    returns: the items of each bin, by index
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, (lengths[item], -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        bisect.insort(rooms, (room - lengths[item], number))
    return bins


def pack(rows: Sequence[Row | tuple[Row, ...]], max_seq_len: int) -> list[list[Row]]:
    """Rows packed into at most max_seq_len positions each; those of a tuple stay together."""
    parts: list[tuple] = [row if isinstance(row[0], tuple) else (row,) for row in rows]
    bins = best_fit([sum(len(tokens) for tokens, _ in part) for part in parts], max_seq_len)
    return [[row for item in items for row in parts[item]] for items in bins]


def collate(sequences: list[list[Row]], pad_id: int) -> dict[str, Tensor]:
    """Packed sequences as one batch, as wide as the longest.

    returns: tokens, targets and, where rows share a sequence, segments; (B, T) int64
    """
    width = max((sum(len(tokens) for tokens, _ in rows) for rows in sequences), default=0) or 1
    shape = (len(sequences), width)
    tokens, targets, segments = (np.full(shape, x, np.int64) for x in (pad_id, IGNORED, 0))
    for line, rows in enumerate(sequences):
        start = 0
        for number, (ids, goal) in enumerate(rows, 1):
            place = line, slice(start, start + len(ids))
            tokens[place], targets[place], segments[place] = ids, goal, number
            start += len(ids)
    batch = {"tokens": tokens, "targets": targets}
    # Padding comes after everything that counts, so causality alone keeps single rows clean.
    if any(len(rows) > 1 for rows in sequences):
        batch["segments"] = segments
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def share(
    sequences: list[list[Row]],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_id: int,
) -> list[dict[str, Tensor]]:
    """This rank's part of the sequences in micro-batches; every rank gets as many of them.

    A rank that would run out gets empty sequences, without targets.
    """
    mine = sequences[rank::world_size]
    n_mine = -(-len(sequences) // world_size)
    mine = mine + [[] for _ in range(n_mine - len(mine))]
    return [
        collate(mine[start : start + micro_batch_size], pad_id)
        for start in range(0, n_mine, micro_batch_size)
    ]


def permuted(number: int, n: int, *key: int) -> int:
    """Place of `number` in a random permutation of range(n) that belongs to `key`.

    A Feistel network over the next power of four, walked until it lands inside (Black and
    Rogaway 2002): any place of the permutation in constant time and no memory.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64).tolist()
    while True:
        left, right = number >> half, number & mask
        for secret in rounds:
            mixed = ((right ^ secret) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 32) & mask)
        number = left << half | right
        if number < n:
            return number


class Mixture:
    """Several sources in one global order.

    In an epoch each source gives round(weight * rows) rows: whole rounds through the source, and
    for the fraction a random part of it.
    """

    def __init__(self, sources: Sequence[Source], weights: list[float], seed: int) -> None:
        self.sources, self.seed = sources, seed
        counts = [max(1, round(w * len(s))) for s, w in zip(sources, weights, strict=True)]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, position: int) -> tuple[int, int, int, int]:
        """(epoch, source, row of the source, copy of the row in this epoch) of the n-th row of the
        whole training."""
        epoch, number = divmod(position, len(self))
        number = permuted(number, len(self), self.seed, epoch)
        source = int(np.searchsorted(self._ends, number, side="right"))
        number -= int(self._ends[source - 1]) if source else 0
        n = len(self.sources[source])
        turn, number = divmod(number, n)
        return epoch, source, permuted(number, n, self.seed, epoch, source + 1, turn), turn

    def row(self, position: int) -> Row | tuple[Row, ...]:
        """The n-th row of the whole training."""
        epoch, source, number, copy = self.place(position)
        rng = np.random.default_rng((self.seed, epoch, source, number, copy))
        return self.sources[source].row(number, rng)


@dataclass
class TrainData:
    """The training rows of a mixture, step by step."""

    mixture: Mixture
    batch_size: int
    max_seq_len: int
    pad_id: int

    @property
    def steps_per_epoch(self) -> float:
        return len(self.mixture) / self.batch_size

    @property
    def fingerprint(self) -> str:
        """Of all token files of the mixture: another one where a set was made anew."""
        digests = (file.digest for source in self.mixture.sources for file in source.files)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @property
    def teaches(self) -> list[str]:
        """Tasks that a model learns from the mixture, by its sources (run_dir.TASKS)."""
        return list(dict.fromkeys(task for one in self.mixture.sources for task in one.teaches))

    def rows(self, step: int) -> list[Row | tuple[Row, ...]]:
        """The rows of a step, as they are drawn."""
        first = step * self.batch_size
        return [self.mixture.row(place) for place in range(first, first + self.batch_size)]

    def sequences(self, step: int) -> list[list[Row]]:
        """The global batch of a step, packed."""
        return pack(self.rows(step), self.max_seq_len)

    def names(self, step: int, most: int = 32) -> str:
        """The rows of a step by source and number, to look them up; not more than `most`."""
        first = step * self.batch_size
        places = map(self.mixture.place, range(first, first + self.batch_size))
        names = [f"{self.mixture.sources[source].name} {row}" for _, source, row, _ in places]
        more = len(names) - most
        return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

    def batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step."""
        return share(self.sequences(step), micro_batch_size, rank, world_size, self.pad_id)


class ValData:
    """The first validation rows of each source, always the same and in the same wording."""

    def __init__(self, sources: list[Source], max_rows: int, max_seq_len: int, pad_id: int) -> None:
        self.pad_id = pad_id
        self._sequences: dict[str, list] = {}
        for source in sources:
            numbers = range(min(max_rows, len(source)))
            rows = [source.row(i, np.random.default_rng((0, i))) for i in numbers]
            self._sequences[source.name] = pack(rows, max_seq_len)

    @property
    def names(self) -> list[str]:
        return list(self._sequences)

    def batches(
        self, name: str, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's part of a source's validation rows."""
        return share(self._sequences[name], micro_batch_size, rank, world_size, self.pad_id)


class Data(NamedTuple):
    """Training and validation data of a run."""

    train: TrainData
    val: ValData


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_seq_len: int,
    order: Any,
    readers: Mapping[str, Reader] = READERS,
) -> Data:
    """Training and validation data of a run.

    max_seq_len: the model's context
    order: settings of the loop, whose batch_size and seed decide which rows a step takes
    readers: of the kinds of rows that the objective learns from
    raises: DataError or ConfigError where a source cannot be used
    """
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one set to train on")
    max_seq_len = min(config.max_seq_len or max_seq_len, max_seq_len)
    require_token_files([source.name for source in config.sources], tokenizer)
    train, val = (
        [open_source(s, split, tokenizer, config, max_seq_len, readers) for s in config.sources]
        for split in ("train", "val")
    )
    mixture = Mixture(train, [source.weight for source in config.sources], order.seed)
    return Data(
        TrainData(mixture, order.batch_size, max_seq_len, tokenizer.pad_id),
        ValData(val, config.max_val_rows, max_seq_len, tokenizer.pad_id),
    )
