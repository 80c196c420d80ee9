"""Preference tuning: pairs of a model's own replies, of which one loops, and DPO on such pairs.

    python -m babyllama.tuning.preference out/redgpt --prompts prompts.txt --out data/clean/loops/rows.jsonl
    python -m babyllama.tuning.preference --rows data/clean/mine/rows.jsonl --tokenizer data/tokenizers/x.model
    python sft.py --config configs/sft/dpo.yaml --base out/redgpt

A checkpoint answers each prompt several times, once greedily. Where one reply falls into a loop (as
sampling.py says) and others end of themselves without one, the one of these most like the others
and the looping one are a row: {id, messages, chosen, rejected}. Rows are also made into token
files, data/tokens/<tokenizer>/<set>, where <set> is the directory that they lie in; --rows does
that alone, for pairs of any origin.

`dpo` learns from such pairs to prefer one answer to another (Rafailov et al. 2023,
arXiv:2305.18290, equation 7), if wanted with the chosen answer's own likelihood beside it (Pang et
al. 2024, arXiv:2404.19733, equation 1).
"""  # noqa: E501

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.checkpoint import Loaded
from babyllama.config import from_repo, parse, require_writable, run, shown
from babyllama.decoder import Reply
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, row_kind, write_rows
from babyllama.sampling import SamplingConfig, loops
from babyllama.scoring.probes import QUESTIONS, read_prompts
from babyllama.scoring.summarise import ReadyModel, ask_all, load_answering, ranked
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


def dpo(reference: nn.Module, beta: float = 0.1, nll: float = 0.0) -> Objective:
    """Raise the chosen answer above the rejected one, as seen from a reference that stays.

    The figures count pairs: without `nll` the loss begins at log 2; `accuracy` is the share of
    pairs whose chosen answer has gained on the other. Validation measures the preference alone.

    reference: the model at the beginning, whole, on the device
    beta: how dear it is to leave the reference
    nll: how much the chosen answer's own loss, a mean over its tokens, counts beside it
    raises: ConfigError if beta is no positive number or nll a negative one
    """
    if not 0 < beta < math.inf:
        raise ConfigError(f"dpo_beta wants a number above 0, found {beta}; 0.1 is usual")
    if not 0 <= nll < math.inf:
        raise ConfigError(f"dpo_nll wants 0 or more, found {nll}; 1 is usual, 0 leaves it out")
    reference = reference.eval().requires_grad_(False)

    def preference(model: nn.Module, batch: Batch, nll: float = 0.0) -> Loss:
        with torch.no_grad():
            before = answer_log_probs(reference, batch)
        after = answer_log_probs(model, batch)  # (B, pairs, 2)
        gains = after - before
        margins = beta * (gains[..., 0] - gains[..., 1])
        exists = _pairs_of(batch)[:, None] > torch.arange(margins.shape[1], device=margins.device)
        losses = -F.logsigmoid(margins)
        if nll:
            losses = losses - nll * after[..., 0] / answer_lengths(batch)[..., 0].clamp(min=1)
        losses = torch.where(exists, losses, 0.0)
        return Loss(losses.sum(), exists.sum(), ((margins > 0) & exists).sum())

    return Objective(
        partial(preference, nll=nll),
        lambda batch: _pairs_of(batch).sum(),
        preference,
        is_of_tokens=False,
    )


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probabilities of the chosen and the rejected answer of each pair.

    returns: (B, pairs, 2) float32; 0 for pairs that a sequence has fewer than the others
    """
    return _by_answer(-model(**batch, per_position=True), batch)


def answer_lengths(batch: Batch) -> Tensor:
    """How many tokens of each answer are learnt, (B, pairs, 2) float32."""
    return _by_answer((batch["targets"] >= 0).float(), batch)


def _by_answer(values: Tensor, batch: Batch) -> Tensor:
    """Sums of a value of each token (B, T) over each answer, (B, pairs, 2)."""
    segments = _segments(batch)
    n_pairs = int(_pairs_of(batch).max())
    sums = values.new_zeros(len(segments), 2 * n_pairs + 1)
    sums = sums.scatter_add(1, segments, values)
    return sums[:, 1:].unflatten(1, (n_pairs, 2))


def _segments(batch: Batch) -> Tensor:
    # A rank that has run out of sequences gets empty ones, without segments.
    return batch.get("segments", torch.zeros_like(batch["tokens"]))


def _pairs_of(batch: Batch) -> Tensor:
    """How many pairs each sequence holds, (B,): the segments 1 and 2, 3 and 4, ..."""
    return _segments(batch).amax(dim=1) // 2


VAL_SHARE = 20  # one row in so many is for validation


@dataclass(frozen=True)
class PairsConfig(SamplingConfig):
    """What is asked of which checkpoint, and where the pairs go.

    Args:
        checkpoint: a fine-tuned run (its newest step) or one of its steps
        prompts: a text file with a question on each line; if absent two dozen built-in ones
        out: file for the rows; its directory gives the set's name
        rows: make token files of these rows instead
        tokenizer: of the token files of --rows
        tokens: root of the token files
        batch_size: prompts answered at once
        device: auto, cpu, cuda or mps
        n: drawn replies to each prompt, beside the greedy one
        max_new_tokens: longest reply; a pair has to fit the context together
        seed: of the drawn replies
    """

    checkpoint: Path | None = None
    prompts: Path | None = None
    out: Path = Path("data/clean/loops/rows.jsonl")
    rows: Path | None = None
    tokenizer: Path | None = None
    tokens: Path = Path("data/tokens")
    batch_size: int = 8
    device: Device = "auto"
    n: int = 7
    max_new_tokens: int = 96
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.temperature == 0 or self.loop_guard != "off":
            raise ConfigError(
                f"wanted a batch_size of at least 1, a temperature above 0 and loop_guard off, "
                f"found {self.batch_size}, {self.temperature:g} and {self.loop_guard}"
            )
        if (self.checkpoint is None) == (self.rows is None):
            raise ConfigError(
                "wanted a checkpoint that answers, or --rows with pairs, and not both: "
                "python -m babyllama.tuning.preference out/redgpt --prompts FILE --out ROWS"
            )
        if self.rows is not None and self.tokenizer is None:
            raise ConfigError("--rows wants --tokenizer, the .model of the run to be tuned")


def pair_of(replies: Sequence[Reply]) -> tuple[str, str] | str:
    """(chosen, rejected) out of the replies to one prompt, or the reason why there is none."""
    looping = [reply.text for reply in replies if loops(reply.text)]
    good = [
        reply.text
        for reply in replies
        if not loops(reply.text) and reply.reason == "eos" and reply.text.strip()
    ]
    if not looping:
        return "no_loop"
    return (ranked(good)[0], looping[0]) if good else "no_reply_without_loop"


def answers(loaded: Loaded, prompts: Sequence[str], cfg: PairsConfig) -> list[list[Reply]]:
    """The greedy reply and the drawn ones to each prompt."""
    drawn = cfg.alone
    model = ReadyModel.of(loaded, "float32")
    asked = [loaded.tokenizer.render_prompt([{"role": "user", "content": p}]) for p in prompts]
    first, more = (
        ask_all(model, asked, way, cfg.batch_size)
        for way in (replace(drawn, temperature=0.0, n=1), drawn)
    )
    return [[*one, *others] for one, others in zip(first, more, strict=True)]


def make_rows(
    prompts: Sequence[str], pairs: Sequence[tuple[str, str] | str], name: str
) -> tuple[list[dict], Counter[str]]:
    """Preference rows, and how many prompts gave none, by reason.

    pairs: for each prompt what pair_of found
    """
    rows, without = [], Counter()
    for prompt, found in zip(prompts, pairs, strict=True):
        if isinstance(found, str):
            without[found] += 1
            continue
        asked = [{"role": "user", "content": prompt}]
        rows.append({"id": f"{name}/{len(rows)}", "messages": asked,
                     "chosen": found[0], "rejected": found[1]})  # fmt: skip
    return rows, without


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
    """Ask, sort, write."""
    if cfg.rows is not None:
        path, tokenizer = from_repo(cfg.rows), Tokenizer(from_repo(cfg.tokenizer))
        rows = list(read_rows(path))
    else:
        path = from_repo(cfg.out)
        require_writable(path)
        loaded = load_answering(from_repo(cfg.checkpoint), pick_device(cfg.device))
        tokenizer = loaded.tokenizer
        asked = read_prompts(from_repo(cfg.prompts or QUESTIONS))
        # With an answer they may take half of the context: a pair is read side by side.
        room = loaded.config.max_seq_len // 2 - 1
        prompts = [text for text in asked if len(tokenizer.encode(text)) < room]
        pairs = list(map(pair_of, answers(loaded, prompts, cfg)))
        rows, without = make_rows(prompts, pairs, path.parent.name)
        n_long = len(asked) - len(prompts)
        without.update({"longer_than_half_the_context": n_long} if n_long else {})
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(without.items()))
        print(f"{len(asked)} prompts gave {len(rows)} pairs{reasons}")
        if len(rows) < 2:
            raise DataError(
                f"wanted two pairs or more, found {len(rows)}{reasons}; ask more prompts, or draw "
                f"more replies (--n), or this checkpoint needs no such tuning"
            )
        write_rows(path, rows)
        print(f"rows: {shown(path)}")
    place = from_repo(cfg.tokens) / tokenizer.name / path.parent.name
    parts = write_tokens(rows, tokenizer, place)
    print(f"tokens: {shown(place)} ({', '.join(f'{split} {n}' for split, n in parts.items())})")


if __name__ == "__main__":
    run(main, parse(PairsConfig, __doc__, positional=["checkpoint"]))
