"""Preference tuning: rows with a better and a worse answer as token files, and DPO on them.

    python -m babyllama.tuning.preference data/clean/mine/rows.jsonl --tokenizer data/tokenizers/x.model
    python sft.py --config configs/sft/dpo.yaml --base out/redgpt

A row is {id, messages, chosen, rejected}: messages end with a question, the other two are its
answers. The token files, data/tokens/<tokenizer>/<set>, are named after the rows' directory.

`dpo` learns from such pairs to prefer one answer to another (Rafailov et al. 2023,
arXiv:2305.18290, equation 7).
"""  # noqa: E501

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, row_kind
from babyllama.sources import Reader, Row, Source, message_sizes, supervised
from babyllama.token_file import CHOICES, ROLES, TokenFile, TokenFileWriter
from babyllama.trainer import Batch, Objective
from model import IGNORED, Loss
from tokenizer import Tokenizer


class Pair(NamedTuple):
    """Two dialogues that differ in their last answer, of which alone the tokens are targets."""

    chosen: Row
    rejected: Row


class Pairs(Source):
    """A source of preferences. Both dialogues of a row share a sequence; a row whose two do not
    fit together is dropped, and counted."""

    def _fitting(self, max_seq_len: int) -> list[np.ndarray]:
        fits = [self._sizes(file) <= max_seq_len for file in self.files]
        self.dropped = {"pair_does_not_fit": int(sum((~f).sum() for f in fits))}
        return fits

    def _sizes(self, file: TokenFile) -> np.ndarray:
        """Positions that the two dialogues of each row take together."""
        sizes = message_sizes(file, self._tokenizer)
        is_choice = np.isin(file.roles, [ROLES.index(role) for role in CHOICES])
        # All that comes before the answers is read twice.
        return np.add.reduceat(np.where(is_choice, sizes, 2 * sizes), file.first)

    def row(self, number: int, _rng: np.random.Generator) -> Pair:
        file, place, _ = self._rows[number].tolist()
        *before, chosen, rejected = self.files[file].pieces(place)
        asked = [{"role": role, "content": [ids]} for role, ids in before]
        return Pair(*(self._answered(asked, ids) for _, ids in (chosen, rejected)))

    def _answered(self, asked: list[dict], answer: np.ndarray) -> Row:
        tokens, targets = supervised(
            self._tokenizer, [*asked, {"role": "assistant", "content": [answer]}]
        )
        targets[: len(self._tokenizer.render_prompt(asked)) - 1] = IGNORED  # earlier answers
        return tokens, targets


READERS: dict[str, Reader] = {"preference": Pairs}


def dpo(reference: nn.Module, beta: float = 0.1) -> Objective:
    """Raise the chosen answer above the rejected one, as seen from a reference that stays.

    The figures count pairs: the loss begins at log 2; `accuracy` is the share of pairs whose chosen
    answer has gained on the other.

    reference: the model at the beginning, whole, on the device
    beta: how dear it is to leave the reference
    raises: ConfigError if beta is no positive number
    """
    if not 0 < beta < math.inf:
        raise ConfigError(f"dpo_beta wants a number above 0, found {beta}; 0.1 is usual")
    reference = reference.eval().requires_grad_(False)

    def preference(model: nn.Module, batch: Batch) -> Loss:
        with torch.no_grad():
            before = answer_log_probs(reference, batch)
        after = answer_log_probs(model, batch)  # (B, pairs, 2)
        gains = after - before
        margins = beta * (gains[..., 0] - gains[..., 1])
        exists = _pairs_of(batch)[:, None] > torch.arange(margins.shape[1], device=margins.device)
        losses = torch.where(exists, -F.logsigmoid(margins), 0.0)
        return Loss(losses.sum(), exists.sum(), ((margins > 0) & exists).sum())

    return Objective(
        preference, lambda batch: _pairs_of(batch).sum(), preference, is_of_tokens=False
    )


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probabilities of the chosen and the rejected answer of each pair.

    returns: (B, pairs, 2) float32; 0 for pairs that a sequence has fewer than the others
    """
    values = -model(**batch, per_position=True)
    segments = _segments(batch)
    n_pairs = int(_pairs_of(batch).max())
    sums = values.new_zeros(len(segments), 2 * n_pairs + 1)
    sums = sums.scatter_add(1, segments, values)
    return sums[:, 1:].unflatten(1, (n_pairs, 2))


def _segments(batch: Batch) -> Tensor:
    # A rank that has run out of sequences gets empty ones, without segments.
    return batch.get("segments", torch.zeros_like(batch["tokens"]))


def _pairs_of(batch: Batch) -> Tensor:
    """Number of pairs in each sequence, (B,): the segments 1 and 2, 3 and 4, ..."""
    return _segments(batch).amax(dim=1) // 2


VAL_SHARE = 20  # one row in so many is for validation


@dataclass(frozen=True)
class PairsConfig:
    """Pairs that become token files.

    Args:
        rows: file of preference rows; its directory gives the set's name
        tokenizer: the .model of the run to be tuned
        tokens: root of the token files
    """

    rows: Path | None = None
    tokenizer: Path | None = None
    tokens: Path = Path("data/tokens")

    def __post_init__(self) -> None:
        if self.rows is None or self.tokenizer is None:
            raise ConfigError(
                "wanted rows and the tokenizer of the run to be tuned: "
                "python -m babyllama.tuning.preference ROWS --tokenizer MODEL"
            )


def write_tokens(rows: Sequence[dict], tokenizer: Tokenizer, place: Path) -> dict[str, int]:
    """Token files of preference rows, one row in twenty for validation; rows of each part.

    raises: DataError if there are fewer than two rows, or rows of another kind
    """
    wrong = [row["id"] for row in rows if row_kind(row) != "preference"]
    if len(rows) < 2 or wrong:
        raise DataError(
            f"{shown(place)}: wanted two rows or more of messages, chosen and rejected, found "
            f"{len(rows)} rows" + (f", of other kinds {', '.join(wrong[:5])}" if wrong else "")
        )
    parts = {
        "val": [row for n, row in enumerate(rows) if n % VAL_SHARE == 0],
        "train": [row for n, row in enumerate(rows) if n % VAL_SHARE],
    }
    for split, own in parts.items():
        with TokenFileWriter(place / f"{split}-00000", "preference", tokenizer) as writer:
            for row in own:
                pieces = [(m["role"], m["content"]) for m in row["messages"]]
                pieces += [(choice, row[choice]) for choice in CHOICES]
                writer.add_row([(r, tokenizer.encode_content(text)) for r, text in pieces])
    return {split: len(own) for split, own in parts.items()}


def main(cfg: PairsConfig) -> None:
    """Read the rows, write their token files."""
    assert cfg.rows and cfg.tokenizer
    path, tokenizer = from_repo(cfg.rows), Tokenizer(from_repo(cfg.tokenizer))
    place = from_repo(cfg.tokens) / tokenizer.name / path.parent.name
    parts = write_tokens(list(read_rows(path)), tokenizer, place)
    print(f"tokens: {shown(place)} ({', '.join(f'{split} {n}' for split, n in parts.items())})")


if __name__ == "__main__":
    run(main, parse(PairsConfig, __doc__, positional=["rows"]))
