"""From token files to batches: sources, their mixture, one global order, packing.

The order is a pure function of (seed, epoch), the global batch of step s of (seed, s): it depends
neither on the number of processes nor on the micro-batch size, and resuming needs the step
number and nothing else. A row is a window of a text stream, a dialogue, or a summary row in a
freshly drawn wording. Every step takes the same number of rows; dialogues are then packed (best
fit) into sequences, kept apart by `segments`. Batches are dicts whose keys are the parameter
names of the model's forward.
"""

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from babyllama.cli import from_repo, shown
from babyllama.errors import ConfigError, DataError
from babyllama.prompts import SummaryPrompts
from babyllama.token_file import ROLES, TokenFile
from model import IGNORED
from tokenizer import SEPARATOR, Tokenizer

Row = tuple[np.ndarray, np.ndarray]  # tokens (n,), targets (n,), int64, n <= max_seq_len

# A summary row whose text would keep less than this is dropped.
_LEAST_TEXT = 16


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Args:
        name: a set's name (data/tokens/<tokenizer>/<name>) or a directory of token files
        weight: how often each row is seen in an epoch; 0.5: half of the rows, 2: every row twice
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Args:
        sources: the mixture
        prompts: wordings for summary rows
        max_val_rows: validation takes the first rows of each source, at most this many
    """

    # A tuple, because jsonargparse lays a list over an earlier one of the same length: the weights
    # of a config would pass on to the sets that a flag names.
    sources: tuple[SourceConfig, ...] = ()
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    max_val_rows: int = 256

    def __post_init__(self) -> None:
        if self.max_val_rows < 1:
            raise ConfigError(f"data.max_val_rows wants 1 or more, found {self.max_val_rows}")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise ConfigError(
                    f"source {source.name!r} has weight {source.weight}; wanted more than 0, "
                    f"or leave the source out"
                )


class Windows:
    """A text source: its documents in a row, cut into windows of max_seq_len targets.

    Neighbours overlap by one id, so that each id is a target exactly once; the last window of a
    file may be short. Windows cross documents.
    """

    def __init__(self, name: str, files: list[TokenFile], max_seq_len: int) -> None:
        self.name = name
        self.dropped: dict[str, int] = {}
        self.files = files
        self._length = max_seq_len
        counts = [max(0, -(-(file.n_tokens - 1) // max_seq_len)) for file in files]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, number: int, _rng: np.random.Generator) -> Row:
        place = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[place - 1]) if place else 0
        start = (number - first) * self._length
        ids = self.files[place].ids[start : start + self._length + 1].astype(np.int64)
        return ids[:-1], ids[1:]


class Dialogues:
    """A chat source. A dialogue that is too long loses whole turns from its end; one whose first
    answer does not fit is dropped. Both are counted."""

    def __init__(
        self, name: str, files: list[TokenFile], tokenizer: Tokenizer, max_seq_len: int
    ) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self.files = files
        fitting = [self._fitting(file, max_seq_len) for file in files]
        self.dropped = {
            "answer_does_not_fit": int(sum((n == 0).sum() for n, _ in fitting)),
            "turns_cut": int(sum(((n > 0) & (n < total)).sum() for n, total in fitting)),
        }
        self._rows = _kept([n for n, _ in fitting])  # file, row, pieces that fit

    def _fitting(self, file: TokenFile, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """How many pieces of each row fit, whole turns only, and how many it has."""
        # Ids that the format adds to a piece: the separator before it, its label, <eos> after it.
        frame = np.zeros(len(ROLES), dtype=np.int64)
        for role in ("system", "user", "assistant"):
            message = {"role": role, "content": [[]]}
            two = self._tokenizer.render_chat([message, message])[0]
            frame[ROLES.index(role)] = len(two) - len(self._tokenizer.render_chat([message])[0])
        separator = len(self._tokenizer.encode(SEPARATOR))
        sizes = np.diff(file.piece_ends, prepend=0) + frame[file.roles]
        n_pieces = np.diff(file.ends, prepend=0)
        first = file.ends - n_pieces  # first piece of each row
        sizes[first] -= separator
        upto = np.cumsum(sizes)
        before = np.repeat(upto[first] - sizes[first], n_pieces)
        number = np.arange(len(sizes)) - np.repeat(first, n_pieces)
        # With <bos> in front and targets shifted by one, a row takes as many positions as this.
        fits = (upto - before <= max_seq_len) & (file.roles == ROLES.index("assistant"))
        return np.maximum.reduceat(np.where(fits, number + 1, 0), first), n_pieces

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int, _rng: np.random.Generator) -> Row:
        file, place, fitting = self._rows[number].tolist()
        pieces = self.files[file].pieces(place)[:fitting]
        return _supervised(
            self._tokenizer, [{"role": role, "content": [ids]} for role, ids in pieces]
        )


class Summaries:
    """A summary source: each row in a wording drawn anew, its text cut to fit."""

    def __init__(
        self, name: str, files: list[TokenFile], prompts: SummaryPrompts, max_seq_len: int
    ) -> None:
        self.name = name
        self._prompts = prompts
        frame = prompts.tokenizer.render_chat(
            [{"role": "user", "content": [[]]}, {"role": "assistant", "content": [[]]}]
        )[0]
        self._room = max_seq_len + 1 - len(frame) - prompts.longest  # for text and summary
        self.files = files
        sizes = [_sizes(file) for file in files]
        fits = [np.minimum(s[:, 0], _LEAST_TEXT) + s[:, 1] <= self._room for s in sizes]
        cut = [f & (s.sum(axis=1) > self._room) for f, s in zip(fits, sizes, strict=True)]
        self.dropped = {
            "summary_does_not_fit": int(sum((~f).sum() for f in fits)),
            "text_cut": int(sum(c.sum() for c in cut)),
            "no_room_for_second_turn": sum(
                self._lacks_room(file, s) for file, s in zip(files, sizes, strict=True)
            ),
        }
        self._rows = _kept(fits)  # file, row, 1

    def __len__(self) -> int:
        return len(self._rows)

    def _lacks_room(self, file: TokenFile, sizes: np.ndarray) -> int:
        """Rows whose meta some second turn asks about, none of which fits behind the text."""
        row_of = np.repeat(np.arange(file.n_docs), np.diff(file.ends, prepend=0))
        n_ids = np.diff(file.piece_ends, prepend=0)
        spare = self._room - sizes.sum(axis=1)
        asked, fits = (np.zeros(file.n_docs, dtype=bool) for _ in range(2))
        for name in self._prompts.turns:
            own = file.roles == ROLES.index(name)
            counts = np.bincount(row_of[own], minlength=file.n_docs)
            total = np.bincount(row_of[own], n_ids[own], file.n_docs)
            asked |= counts > 0
            fits |= (counts > 0) & (self._prompts.turn_size(name, counts, total) <= spare)
        return int((asked & ~fits).sum())

    def row(self, number: int, rng: np.random.Generator) -> Row:
        file, place, _ = self._rows[number].tolist()
        pieces = self.files[file].pieces(place)
        (_, text), (_, summary) = pieces[:2]
        room = self._room - len(summary)
        messages = self._prompts.messages(text, summary, rng, room, _meta(pieces))
        return _supervised(self._prompts.tokenizer, messages)


def _sizes(file: TokenFile) -> np.ndarray:
    """Ids of text and summary of each row, (n_rows, 2); the pieces of its meta come after them."""
    first = file.ends - np.diff(file.ends, prepend=0)
    return np.diff(file.piece_ends, prepend=0)[np.stack((first, first + 1), axis=1)]


def _meta(pieces: list[tuple[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """The pieces of a summary row that follow text and summary, by role."""
    meta: dict[str, list[np.ndarray]] = {}
    for role, ids in pieces[2:]:
        meta.setdefault(role, []).append(ids)
    return meta


def _kept(counts: list[np.ndarray]) -> np.ndarray:
    """The rows of several files with a count above 0: (n, 3) file, row, count."""
    parts = [
        np.stack((np.full(len(rows), number), rows, found[rows]), axis=1)
        for number, found in enumerate(counts)
        for rows in [np.flatnonzero(found)]
    ]
    return np.concatenate(parts).astype(np.int64)


def _supervised(tokenizer: Tokenizer, messages: Sequence[dict]) -> Row:
    """A dialogue as inputs and shifted targets; only the assistant's tokens are targets."""
    ids, mask = (np.array(part, dtype=np.int64) for part in tokenizer.render_chat(messages))
    return ids[:-1], np.where(mask[1:] == 1, ids[1:], IGNORED)


Source = Windows | Dialogues | Summaries


def open_source(
    config: SourceConfig, split: str, tokenizer: Tokenizer, data: DataConfig, max_seq_len: int
) -> Source:
    """One source's token files, checked.

    raises: DataError with the command that makes them, where there are none
    """
    where = from_repo(Path("data/tokens") / tokenizer.path.stem / config.name)
    if "/" in config.name or "\\" in config.name:
        where = from_repo(config.name)
    stems = sorted(where.glob(f"{split}-*.idx"))
    if not stems:
        raise DataError(
            f"{shown(where)}: wanted token files {split}-*.idx, found none; make them: "
            f"python -m data_process.run {where.name} --tokenizer {shown(tokenizer.path)}"
        )
    files = [TokenFile(stem, tokenizer.fingerprint) for stem in stems]
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise DataError(f"{shown(where)}: files of several kinds {sorted(kinds)} in one directory")
    source: Source
    if kinds == {"text"}:
        source = Windows(config.name, files, max_seq_len)
    elif kinds == {"chat"}:
        tokenizer.require_dialogue()
        source = Dialogues(config.name, files, tokenizer, max_seq_len)
    else:
        tokenizer.require_dialogue()
        prompts = SummaryPrompts.load(from_repo(data.prompts), tokenizer)
        source = Summaries(config.name, files, prompts, max_seq_len)
    if len(source) == 0:
        raise DataError(
            f"{shown(where)}: no row of {split} can be trained on in {max_seq_len} tokens "
            f"{source.dropped or '(the files are empty)'}; use a longer model.max_seq_len "
            f"or make the set again"
        )
    return source


def permuted(number: int, n: int, *key: int) -> int:
    """Where `number` lands in a random permutation of range(n) that belongs to `key`.

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

    def __init__(self, sources: list[Source], weights: list[float], seed: int) -> None:
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

    def row(self, position: int) -> Row:
        """The n-th row of the whole training."""
        epoch, source, number, copy = self.place(position)
        rng = np.random.default_rng((self.seed, epoch, source, number, copy))
        return self.sources[source].row(number, rng)


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


def pack(rows: list[Row], max_seq_len: int) -> list[list[Row]]:
    """Rows laid into sequences of at most max_seq_len positions."""
    bins = best_fit([len(tokens) for tokens, _ in rows], max_seq_len)
    return [[rows[item] for item in items] for items in bins]


def collate(sequences: list[list[Row]], pad_id: int) -> dict[str, Tensor]:
    """Packed sequences as one batch, as wide as the longest.

    returns: tokens, targets and, where rows share a sequence, segments; (B, T) int64
    """
    width = max((sum(len(tokens) for tokens, _ in rows) for rows in sequences), default=0) or 1
    shape = (len(sequences), width)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    for line, rows in enumerate(sequences):
        start = 0
        for number, (row_tokens, row_targets) in enumerate(rows, 1):
            end = start + len(row_tokens)
            tokens[line, start:end] = row_tokens
            targets[line, start:end] = row_targets
            segments[line, start:end] = number
            start = end
    batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
    # Filler comes after everything that counts, so causality alone keeps single rows clean.
    if any(len(rows) > 1 for rows in sequences):
        batch["segments"] = torch.from_numpy(segments)
    return batch


def share(
    sequences: list[list[Row]], micro_batch_size: int, rank: int, world_size: int, pad_id: int
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


class TrainData:
    """The training rows of a mixture, step by step."""

    def __init__(self, mixture: Mixture, batch_size: int, max_seq_len: int, pad_id: int) -> None:
        self.mixture, self.batch_size = mixture, batch_size
        self.max_seq_len, self.pad_id = max_seq_len, pad_id

    @property
    def steps_per_epoch(self) -> float:
        return len(self.mixture) / self.batch_size

    @property
    def fingerprint(self) -> str:
        """Of all token files of the mixture: another one where a set was made anew."""
        digests = (file.digest for source in self.mixture.sources for file in source.files)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def sequences(self, step: int) -> list[list[Row]]:
        """The global batch of a step, packed."""
        first = step * self.batch_size
        rows = [self.mixture.row(first + i) for i in range(self.batch_size)]
        return pack(rows, self.max_seq_len)

    def batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step."""
        return share(self.sequences(step), micro_batch_size, rank, world_size, self.pad_id)


class ValData:
    """The first validation rows of each source, always the same and in the same wording."""

    def __init__(self, sources: list[Source], max_rows: int, max_seq_len: int, pad_id: int) -> None:
        self.pad_id = pad_id
        self._sequences = {}
        for source in sources:
            rows = [source.row(i, np.random.default_rng((0, i)))
                    for i in range(min(max_rows, len(source)))]  # fmt: skip
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
    """What a run reads."""

    train: TrainData
    val: ValData


class Order(Protocol):
    """The settings of the loop that decide which rows a step takes."""

    batch_size: int
    seed: int


def open_data(config: DataConfig, tokenizer: Tokenizer, max_seq_len: int, order: Order) -> Data:
    """Training and validation data of a run.

    raises: DataError or ConfigError where a source cannot be used
    """
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one set to train on")
    train, val = (
        [open_source(s, split, tokenizer, config, max_seq_len) for s in config.sources]
        for split in ("train", "val")
    )
    mixture = Mixture(train, [source.weight for source in config.sources], order.seed)
    return Data(
        TrainData(mixture, order.batch_size, max_seq_len, tokenizer.pad_id),
        ValData(val, config.max_val_rows, max_seq_len, tokenizer.pad_id),
    )
