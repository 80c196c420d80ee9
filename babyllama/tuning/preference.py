"""Pairs of answers for preference tuning, made of a model's own replies: those that loop and those
that do not, or titles that are more and less like the true one.

    python -m babyllama.tuning.preference out/redgpt --prompts prompts.txt --out data/clean/loops/rows.jsonl
    python -m babyllama.tuning.preference out/csl --data data/clean/csl --loop_length 4 --loop_times 2
    python -m babyllama.tuning.preference out/csl --data data/clean/csl --by rouge --n 16 --out data/clean/drafts/rows.jsonl
    python -m babyllama.tuning.preference --rows data/clean/mine/rows.jsonl --tokenizer data/tokenizers/x.model
    python sft.py --config configs/sft/dpo.yaml --base out/redgpt

A checkpoint answers each prompt several times, once greedily. Where one reply falls into a loop (as
sampling.py says, or --loop_length and --loop_times) and others end of themselves without one, the
one of these most like the others and the looping one are a row: {id, messages, chosen, rejected}.
With --by rouge the best of the replies by ROUGE-1 and ROUGE-2 and the middle one are: what a
summariser could have said, and what it usually says. Rows are also made into token files,
data/tokens/<tokenizer>/<set>, where <set> is the directory that they lie in; --rows does that
alone, for pairs of any origin.

`dpo` learns from such pairs to prefer one answer to another (Rafailov et al. 2023,
arXiv:2305.18290, equation 7), if wanted with the chosen answer's own likelihood beside it (Pang et
al. 2024, arXiv:2404.19733, equation 1).
"""  # noqa: E501

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from babyllama.checkpoint import Loaded, load_answering
from babyllama.config import from_repo, parse, require_writable, run, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.generate import Reply, generate_replies
from babyllama.prompts import PROMPTS, read_prompts
from babyllama.rows import read_rows, row_kind, write_rows
from babyllama.sampling import LOOP_LENGTH, LOOP_TIMES, SamplingConfig, repeats, squeeze
from babyllama.scoring.rouge import clipped_f
from babyllama.scoring.summarise import ranked, templates
from babyllama.scoring.test_sets import read_pairs
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
        sizes, first, _ = message_sizes(file, self._tokenizer)
        is_choice = np.isin(file.roles, [ROLES.index(role) for role in CHOICES])
        # All that comes before the answers is read twice.
        return np.add.reduceat(np.where(is_choice, sizes, 2 * sizes), first)

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
LEAST_GAP = 0.15  # of the sum of ROUGE-1 and ROUGE-2: replies nearer than that are alike


@dataclass(frozen=True)
class PairsConfig(SamplingConfig):
    """What is asked of which checkpoint, and where the pairs go.

    Args:
        checkpoint: a fine-tuned run (its newest step) or one of its steps
        prompts: a text file with a question on each line; if absent two dozen built-in ones
        data: texts instead whose titles are asked for, in a file as eval_rouge.py takes it or the
            train part of a folder of rows
        by: loops: a reply without a loop before one that loops; rouge: of replies to --data the one
            most like the row's title before the middle one
        limit: only so many prompts or texts, the first
        wordings: template file with the question that asks for a title
        loop_length: a reply loops where a run of so many characters stands in it
        loop_times: so many times
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
    data: Path | None = None
    by: Literal["loops", "rouge"] = "loops"
    limit: int | None = None
    wordings: Path = Path("configs/prompts/summary_zh.yaml")
    loop_length: int = LOOP_LENGTH
    loop_times: int = LOOP_TIMES
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
        limit = 1 if self.limit is None else self.limit
        if min(self.loop_length, self.loop_times - 1, limit) < 1:
            raise ConfigError(
                f"wanted a loop_length of 1 or more, loop_times of 2 or more and a limit of 1 or "
                f"more, found {self.loop_length}, {self.loop_times} and {self.limit}"
            )
        if self.prompts is not None and self.data is not None:
            raise ConfigError("wanted --prompts or --data, found both; leave one out")
        if self.by == "rouge" and self.data is None:
            raise ConfigError("--by rouge wants --data, texts with their titles, found none")
        if (self.checkpoint is None) == (self.rows is None):
            raise ConfigError(
                "wanted a checkpoint that answers, or --rows with pairs, and not both: "
                "python -m babyllama.tuning.preference out/redgpt --prompts FILE --out ROWS"
            )
        if self.rows is not None and self.tokenizer is None:
            raise ConfigError("--rows wants --tokenizer, the .model of the run to be tuned")


def pair_of(
    replies: Sequence[Reply], length: int = LOOP_LENGTH, times: int = LOOP_TIMES
) -> tuple[str, str] | str:
    """(chosen, rejected) out of the replies to one prompt, or the reason why there is none.

    length, times: a reply loops where a run of so many characters stands in it so many times
    """
    does_loop = [repeats(squeeze(reply.text), length, times) for reply in replies]
    looping = [reply.text for reply, loops in zip(replies, does_loop, strict=True) if loops]
    good = [
        reply.text
        for reply, loops in zip(replies, does_loop, strict=True)
        if not loops and reply.reason == "eos" and reply.text.strip()
    ]
    if not looping:
        return "no_loop"
    return (ranked(good)[0], looping[0]) if good else "no_reply_without_loop"


def ranked_pair(replies: Sequence[Reply], title: str) -> tuple[str, str] | str:
    """(chosen, rejected) by likeness to a title, or the reason why there is none.

    Of the different replies that ended the best, and the one in the middle.
    """
    ended = dict.fromkeys(r.text for r in replies if r.reason == "eos" and r.text.strip())
    scores = {text: sum(clipped_f(text, title, n, 1.0) for n in (1, 2)) for text in ended}
    order = sorted(scores, key=lambda text: -scores[text])
    if len(order) < 2:
        return "one_reply_alone"
    best, middle = order[0], order[len(order) // 2]
    return (best, middle) if scores[best] - scores[middle] >= LEAST_GAP else "replies_alike"


def questions(loaded: Loaded, cfg: PairsConfig) -> tuple[list[tuple[str, str]], int]:
    """What is asked, each with the title that it wants ("" where none is known), and how many
    prompts are left out: with an answer they would take more than half of the context, and a pair
    is read side by side."""
    if cfg.data is None:
        asked = read_prompts(from_repo(cfg.prompts)) if cfg.prompts else list(PROMPTS)
        titles = [""] * len(asked)
    else:
        place = from_repo(cfg.data)
        files = sorted(place.glob("train-*.jsonl")) if place.is_dir() else [place]
        if not files:
            raise DataError(
                f"{shown(place)}: wanted train-*.jsonl, found none; name a file, or make the set: "
                f"python -m data_process.run {place.name}"
            )
        question = templates(cfg.wordings, loaded.tokenizer).eval_question
        rows = [row for file in files for row in read_pairs(file)][: cfg.limit]
        asked = [question.replace("{text}", row["text"]) for row in rows]
        titles = [row["summary"] for row in rows]
    both = list(zip(asked, titles, strict=True))[: cfg.limit]
    room = loaded.config.max_seq_len // 2 - 1
    fitting = [one for one in both if len(loaded.tokenizer.encode(one[0])) < room]
    return fitting, len(both) - len(fitting)


def answers(loaded: Loaded, prompts: Sequence[str], cfg: PairsConfig) -> list[list[Reply]]:
    """The greedy reply and the drawn ones to each prompt."""
    ways = {f.name: getattr(cfg, f.name) for f in fields(SamplingConfig)}
    drawn = SamplingConfig(**ways)
    greedy = replace(drawn, temperature=0.0, n=1)
    tokenizer, decoder = loaded.tokenizer, make_decoder(loaded.model)
    asked = [tokenizer.render_prompt([{"role": "user", "content": text}]) for text in prompts]
    found: list[list[Reply]] = []
    for start in tqdm(range(0, len(asked), cfg.batch_size), desc="answering", leave=False):
        batch = asked[start : start + cfg.batch_size]
        first, more = (
            generate_replies(decoder, batch, way, tokenizer.eos_id, tokenizer)
            for way in (greedy, drawn)
        )
        found += [[first[i], *more[i * cfg.n : (i + 1) * cfg.n]] for i in range(len(batch))]
    return found


def make_rows(
    prompts: Sequence[str], pairs: Sequence[tuple[str, str] | str], name: str
) -> tuple[list[dict], Counter[str]]:
    """Preference rows, and how many prompts gave none, by reason.

    pairs: for each prompt what pair_of or ranked_pair found
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
                writer.add_row([(role, tokenizer.encode(text)) for role, text in pieces])
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
        asked, n_long = questions(loaded, cfg)
        prompts, titles = [text for text, _ in asked], [title for _, title in asked]
        replies = answers(loaded, prompts, cfg)
        if cfg.by == "rouge":
            pairs = list(map(ranked_pair, replies, titles))
        else:
            pairs = [pair_of(given, cfg.loop_length, cfg.loop_times) for given in replies]
        rows, without = make_rows(prompts, pairs, path.parent.name)
        without.update({"longer_than_half_the_context": n_long} if n_long else {})
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(without.items()))
        print(f"{len(prompts) + n_long} prompts gave {len(rows)} pairs{reasons}")
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
