"""The sources of a mixture: token files as rows of (tokens, targets).

A row is a window of a text stream or a dialogue; readers of other kinds are handed in: summary
rows in a freshly drawn wording (scoring/prompts.py), pairs of answers (tuning/preference.py). What
does not fit the context is cut by whole turns, or left out; each is counted by reason. The config
names the sets and their weights; their token files lie in data/tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from babyllama.config import shown
from babyllama.errors import ConfigError, DataError, require
from babyllama.token_file import (
    CHOICES,
    ROLES,
    TokenFile,
    token_directory,
)
from model import IGNORED
from tokenizer import LABELS, SEPARATOR, Tokenizer


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
    """Training data.

    Args:
        sources: the mixture
        prompts: wordings for summary rows
        max_val_rows: validation takes the first rows of each source, at most this many
        max_seq_len: longest sequence in tokens, where it is less than the model's context
        least_copied: leave out summaries of which less than this share of tokens stands in the text
            as it is cut: what cannot be known from it teaches a small model to invent
        supervise: what of dialogues and summary rows is a target: the assistant's answers, or all
            tokens, as in a text; for pretraining on dialogues in their final form
    """

    # A tuple, because jsonargparse lays a list over an earlier one of the same length: the weights
    # of a config would pass on to the sets that a flag names.
    sources: tuple[SourceConfig, ...] = ()
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    max_val_rows: int = 256
    max_seq_len: int | None = None
    least_copied: float = 0.0
    supervise: Literal["answers", "all"] = "answers"

    def __post_init__(self) -> None:
        fits = self.max_seq_len is None or self.max_seq_len >= 2
        wanted = {
            "max_val_rows": ("1 or more", self.max_val_rows >= 1),
            "least_copied": ("0 to 1", 0 <= self.least_copied <= 1),
        }
        require("data", self, {**wanted, "max_seq_len": ("2 or more", fits)})
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise ConfigError(
                    f"source {source.name!r} has weight {source.weight}; wanted more than 0, "
                    f"or leave the source out"
                )


Row = tuple[np.ndarray, np.ndarray]  # tokens (n,), targets (n,), int64, n <= max_seq_len


class Source:
    """The rows of a set's token files that fit, and how many do not, by reason.

    teaches: what a model learns of them to do (run_dir.TASKS)
    """

    teaches: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        files: list[TokenFile],
        tokenizer: Tokenizer,
        max_seq_len: int,
        config: DataConfig = DataConfig(),
    ) -> None:
        tokenizer.require_dialogue()
        self.name, self.files, self._tokenizer, self._config = name, files, tokenizer, config
        self.dropped: dict[str, int] = {}
        # (n, 3) file, row, and how much of it fits, where that is more than nothing
        self._rows = np.concatenate([
            np.stack((np.full(len(rows), number), rows, fitting[rows]), axis=1)
            for number, fitting in enumerate(self._fitting(max_seq_len))
            for rows in [np.flatnonzero(fitting)]
        ]).astype(np.int64)  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def _fitting(self, max_seq_len: int) -> list[np.ndarray]:
        """For each file, how much of each row fits: 0 where it is dropped. Fills `dropped`."""
        raise NotImplementedError

    def row(self, number: int, rng: np.random.Generator) -> Row | tuple[Row, ...]:
        """A row, or several that share a sequence; rng: of what is drawn for it."""
        raise NotImplementedError


class Windows(Source):
    """A text source: its documents in a row, cut into windows of max_seq_len targets.

    Neighbours overlap by one id, so that each id is a target exactly once; the last window of a
    file may be short. Windows cross documents.
    """

    teaches = ("continue",)

    def __init__(
        self, name: str, files: list[TokenFile], _: Tokenizer, max_seq_len: int, *_more: DataConfig
    ) -> None:
        self.name, self.files, self._length = name, files, max_seq_len
        self.dropped: dict[str, int] = {}
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


class Dialogues(Source):
    """A chat source. A dialogue that is too long loses whole turns from its end; one whose first
    answer does not fit is dropped. Both are counted."""

    def _fitting(self, max_seq_len: int) -> list[np.ndarray]:
        fitting = [self._pieces(file, max_seq_len) for file in self.files]
        pairs = list(zip(fitting, self.files, strict=True))
        self.dropped = {
            "answer_does_not_fit": sum(int((n == 0).sum()) for n in fitting),
            "turns_cut": sum(int(((n > 0) & (n < file.n_pieces)).sum()) for n, file in pairs),
        }
        has_reference = any((file.roles == ROLES.index("system")).any() for file in self.files)
        self.teaches = ("reference", "chat") if has_reference else ("chat",)
        return fitting

    def _pieces(self, file: TokenFile, max_seq_len: int) -> np.ndarray:
        """Number of pieces of each row that fit, whole turns only."""
        sizes = message_sizes(file, self._tokenizer)
        upto = np.cumsum(sizes)
        before = np.repeat(upto[file.first] - sizes[file.first], file.n_pieces)
        number = np.arange(len(sizes)) - np.repeat(file.first, file.n_pieces)
        # With <bos> in front and targets shifted by one, a row takes as many positions as this.
        fits = (upto - before <= max_seq_len) & (file.roles == ROLES.index("assistant"))
        return np.maximum.reduceat(np.where(fits, number + 1, 0), file.first)

    def row(self, number: int, _rng: np.random.Generator) -> Row:
        file, place, fitting = self._rows[number].tolist()
        pieces = self.files[file].pieces(place)[:fitting]
        messages = [{"role": role, "content": [ids]} for role, ids in pieces]
        return supervised(self._tokenizer, messages, self._config.supervise)


def message_sizes(file: TokenFile, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of each message in the dialogue's format."""
    # Ids that the format adds to a piece: the separator before it, its label, <eos> after it.
    frame = np.zeros(len(ROLES), dtype=np.int64)
    for role in LABELS:
        message = {"role": role, "content": [[]]}
        two = tokenizer.render_chat([message, message])[0]
        frame[ROLES.index(role)] = len(two) - len(tokenizer.render_chat([message])[0])
    for role in CHOICES:
        frame[ROLES.index(role)] = frame[ROLES.index("assistant")]
    sizes = file.sizes + frame[file.roles]
    sizes[file.roles == ROLES.index("image")] = 0  # the name of one, which is not said
    sizes[file.first] -= len(tokenizer.encode(SEPARATOR))
    return sizes


def supervised(tokenizer: Tokenizer, messages: Sequence[dict], supervise: str = "answers") -> Row:
    """A dialogue as inputs and shifted targets; see DataConfig.supervise."""
    ids, mask = (np.array(part, dtype=np.int64) for part in tokenizer.render_chat(messages))
    if supervise == "all":
        return ids[:-1], ids[1:]
    return ids[:-1], np.where(mask[1:] == 1, ids[1:], IGNORED)


Reader = Callable[[str, list[TokenFile], Tokenizer, int, DataConfig], Source]
READERS: dict[str, Reader] = {"text": Windows, "chat": Dialogues}


def open_source(
    config: SourceConfig,
    split: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    max_seq_len: int,
    readers: Mapping[str, Reader] = READERS,
) -> Source:
    """One source's token files, checked.

    readers: of the kinds that the objective learns from
    raises: DataError where they cannot be used, ConfigError for rows of another kind
    """
    where = token_directory(config.name, tokenizer)
    stems = sorted(where.glob(f"{split}-*.idx"))
    files = [TokenFile(stem, tokenizer.fingerprint) for stem in stems]
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise DataError(f"{shown(where)}: files of several kinds {sorted(kinds)} in one directory")
    if kinds == {"vqa"}:
        raise DataError(f"{shown(where)}: its rows are about images; use python -m vqa.train")
    (kind,) = kinds
    if kind not in readers:
        raise ConfigError(
            f"data.sources: wanted {' or '.join(readers)} rows for this objective, found {kind} "
            f"rows in {config.name}; objective dpo and preference rows belong together"
        )
    source = readers[kind](config.name, files, tokenizer, max_seq_len, data)
    if len(source) == 0:
        raise DataError(
            f"{shown(where)}: no row of {split} can be trained on in {max_seq_len} tokens "
            f"{source.dropped or '(the files are empty)'}; use a longer model.max_seq_len "
            f"or make the set again"
        )
    return source
