"""Rows laid into sequences, and sequences into batches.

Best fit decreasing (Johnson 1974): rows that share a sequence are kept apart by `segments`, and
attention does not cross them. Batches are dicts whose keys are the parameter names of the model's
forward.
"""

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from babyllama.sources import Pair, Row
from model import IGNORED


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


def pack(rows: Sequence[Row | Pair], max_seq_len: int) -> list[list[Row]]:
    """Rows laid into sequences of at most max_seq_len positions, the two of a pair side by side."""
    parts = [tuple(row) if isinstance(row, Pair) else (row,) for row in rows]
    bins = best_fit([sum(len(tokens) for tokens, _ in part) for part in parts], max_seq_len)
    return [[row for item in items for row in parts[item]] for items in bins]


def targets_per_row(sequences: list[list[Row]]) -> float:
    """The mean number of targets of the rows that have any."""
    counts = [n for rows in sequences for _, targets in rows if (n := (targets != IGNORED).sum())]
    return float(sum(counts) / max(1, len(counts)))


def collate(
    sequences: list[list[Row]], pad_id: int, row_targets: float | None = None
) -> dict[str, Tensor]:
    """Packed sequences as one batch, as wide as the longest.

    row_targets: give every row the weight of so many targets
    returns: tokens, targets and, where rows share a sequence, segments; (B, T) int64; with
        row_targets the weight of each target too, (B, T) float32
    """
    width = max((sum(len(tokens) for tokens, _ in rows) for rows in sequences), default=0) or 1
    shape = (len(sequences), width)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for line, rows in enumerate(sequences):
        start = 0
        for number, (ids, goal) in enumerate(rows, 1):
            end = start + len(ids)
            tokens[line, start:end] = ids
            targets[line, start:end] = goal
            segments[line, start:end] = number
            n_targets = (goal != IGNORED).sum()
            weights[line, start:end] = (row_targets or 0) / max(1, n_targets)
            start = end
    batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
    # Filler comes after everything that counts, so causality alone keeps single rows clean.
    if any(len(rows) > 1 for rows in sequences):
        batch["segments"] = torch.from_numpy(segments)
    if row_targets is not None:
        batch["weights"] = torch.from_numpy(weights)
    return batch


def share(
    sequences: list[list[Row]],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_id: int,
    row_targets: float | None = None,
) -> list[dict[str, Tensor]]:
    """This rank's part of the sequences in micro-batches; every rank gets as many of them.

    A rank that would run out gets empty sequences, without targets.

    row_targets: as in collate
    """
    mine = sequences[rank::world_size]
    n_mine = -(-len(sequences) // world_size)
    mine = mine + [[] for _ in range(n_mine - len(mine))]
    return [
        collate(mine[start : start + micro_batch_size], pad_id, row_targets)
        for start in range(0, n_mine, micro_batch_size)
    ]
