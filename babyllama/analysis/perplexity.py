"""Perplexity, bits per byte and token accuracy of checkpoints on held-out text.

    python -m babyllama.analysis.perplexity out/csl         the sets of its training
    python -m babyllama.analysis.perplexity out/a out/b --data wiki,data/clean/csl,held_out.jsonl
    python -m babyllama.analysis.perplexity out/csl --steps true    what training does, step by step
    torchrun --nproc_per_node 2 -m babyllama.analysis.perplexity out/a --data wiki

Bits per byte compare models of different tokenizers, perplexity and accuracy only those of one.
The figures depend neither on batch size nor on packing nor on the number of processes. A document
longer than the context is read in windows that overlap by half: each token is predicted once, with
at least half a context before it, or all there is.

Of several checkpoints the table shows the change since the first, and how much of each set was
forgotten: the last figure above the lowest before it (Chaudhry et al. 2018, arXiv:1801.10112, there
with accuracy).

A document of text is predicted whole, its <eos> included, after the <eos> that stands before it in
training. Of a dialogue the assistant's tokens are targets, of a summary row the summary, after the
one question that scoring asks (prompts.py). Bytes are those of the targets' text.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from babyllama.checkpoint import Loaded, load_model
from babyllama.config import from_repo, parse, plain, require_writable, run, shown
from babyllama.data import best_fit, collate
from babyllama.device import Device, pick_device
from babyllama.distributed import World, start
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.log import perplexity
from babyllama.rows import read_rows, row_kind
from babyllama.run_dir import find_checkpoint, list_checkpoints, read_config, read_info
from babyllama.scoring.prompts import SummaryPrompts
from babyllama.scoring.tables import table
from babyllama.scoring.test_sets import beside, checksums, write_json
from babyllama.sources import Row
from model import IGNORED, Transformer, token_losses
from tokenizer import Tokenizer

# A summary row whose text would keep less than this is left out.
_LEAST_TEXT = 16
_TARGETS = {"text": "text", "chat": "assistant", "summary": "summary"}


class Document(NamedTuple):
    """What a model reads of one document, and what of it is predicted.

    ids: (N,) int64; is_target: (N,) bool, the first is False
    text: the targets' text
    """

    ids: np.ndarray
    is_target: np.ndarray
    text: str


@dataclass
class HeldOut:
    """One set.

    counts: what was cut or left out, by reason
    """

    name: str
    files: list[str]
    documents: list[Document]
    counts: dict[str, int]

    @property
    def about(self) -> dict:
        """Which documents these are; the same ones have the same hash for any tokenizer."""
        texts = "\0".join(document.text for document in self.documents)
        found = hashlib.sha256(texts.encode()).hexdigest()
        return {"files": self.files, "sha256": found, "n_documents": len(self.documents)}


def find_files(item: str, split: str) -> list[Path]:
    """The rows of one set.

    item: a file, a folder, or a set's name; for a folder of token files the rows they were made of
    raises: DataError if there is nothing
    """
    path = from_repo(item)
    if path.is_file():
        return [path]
    folders = [path, from_repo(Path("data/clean") / path.name)]
    for folder in folders:
        if files := sorted(folder.glob(f"{split}-*.jsonl")):
            return files
    raise DataError(
        f"wanted {split}-*.jsonl of {item!r}, found none in {', '.join(map(shown, folders))}; name "
        f"a file or folder, or make the set: python -m data_process.run {path.name}"
    )


def open_held_out(
    item: str,
    split: str,
    max_rows: int | None,
    tokenizer: Tokenizer,
    prompts: Path,
    max_seq_len: int,
) -> HeldOut:
    """The first rows of a set as documents.

    raises: DataError if it is missing or damaged, or holds no target
    """
    files = find_files(item, split)
    reader = _Reader(tokenizer, prompts, max_seq_len)
    rows = islice((row for path in files for row in read_rows(path)), max_rows)
    documents = [document for row in rows if (document := reader.document(row))]
    if not documents:
        raise DataError(
            f"{item}: no row of {split} can be scored in {max_seq_len} tokens {reader.counts}; "
            f"name another set or a model with a longer context"
        )
    counts = {reason: n for reason, n in reader.counts.items() if n}
    return HeldOut(item, [shown(f) for f in files], documents, counts)


class _Reader:
    """Turns rows into documents, and counts what it cuts."""

    def __init__(self, tokenizer: Tokenizer, prompts: Path, max_seq_len: int) -> None:
        self.tokenizer, self._path, self._length = tokenizer, prompts, max_seq_len
        self.counts = {"text_cut": 0, "summary_does_not_fit": 0}

    def document(self, row: dict) -> Document | None:
        """None if a row cannot fit.

        raises: DataError if it is of a kind without targets
        """
        kind = row_kind(row)
        if kind not in _TARGETS:
            raise DataError(
                f"wanted rows of {', '.join(_TARGETS)}, found {kind} in {row['id']!r}; name "
                f"another set"
            )
        parts = [(message["role"], message["content"]) for message in row.get("messages", ())]
        parts = parts or [(key, row[key]) for key in ("text", "summary") if key in row]
        pieces = [(role, self.tokenizer.encode(text)) for role, text in parts]
        ids, mask = self._laid_out(kind, pieces)
        if ids is None:
            self.counts["summary_does_not_fit"] += 1
            return None
        text = "".join(text for role, text in parts if role == _TARGETS[kind])
        return Document(np.array(ids, np.int64), np.array(mask, bool), text)

    def _laid_out(
        self, kind: str, pieces: list[tuple[str, list[int]]]
    ) -> tuple[list[int] | None, list[int]]:
        """The ids of a document, and which of them are targets; no ids if it cannot fit."""
        if kind == "text":
            ids = [self.tokenizer.eos_id, *pieces[0][1], self.tokenizer.eos_id]
            return ids, [0] + [1] * (len(ids) - 1)
        self.tokenizer.require_dialogue()
        if kind == "chat":
            messages = [{"role": role, "content": [ids]} for role, ids in pieces]
            return self.tokenizer.render_chat(messages)
        (_, text), (_, summary) = pieces[:2]
        room = self._length + 1 - len(self._asked([], None, summary)[0])
        if room < min(len(text), _LEAST_TEXT):
            return None, []
        self.counts["text_cut"] += len(text) > room
        return self._asked(text, room, summary)

    @cached_property
    def _prompts(self) -> SummaryPrompts:
        return SummaryPrompts.load(from_repo(self._path), self.tokenizer)

    def _asked(
        self, text: Sequence[int], room: int | None, summary: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        answer = {"role": "assistant", "content": [summary]}
        question = self._prompts.eval_messages(text, room)
        return self.tokenizer.render_chat([*question, answer])


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of a measurement of perplexity.

    Args:
        checkpoints: runs (their newest steps) or steps
        data: sets, separated by commas: files of rows, folders with them, or names of sets; if
            absent the sets that the first checkpoint's run was trained on
        steps: of each run all steps, after the checkpoint that it began with
        split: the part of a folder or set
        max_rows: the first rows of each set, at most this many; if absent all
        prompts: wordings; summary rows are asked for with the `eval` question
        batch_size: sequences computed at a time
        out: the figures as JSON; if absent evaluate.json in the first checkpoint's run
        device: auto, cpu, cuda or mps
    """

    checkpoints: tuple[Path, ...] = ()
    data: str = ""
    steps: bool = False
    split: Literal["val", "test"] = "val"
    max_rows: int | None = None
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    batch_size: int = 16
    out: Path | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} wants 1 or more, found {value}")


def chosen_steps(runs: Sequence[Path], every: bool) -> list[Path]:
    """The newest checkpoint of each run, or every one and what the run began with, each once."""
    found = []
    for run_path in runs:
        place = from_repo(run_path).resolve()
        steps = list_checkpoints(place) if every else []
        parent = read_info(steps[0]).get("parent") if steps else None
        if parent and from_repo(parent).exists():
            found.append(find_checkpoint(from_repo(parent).resolve()))
        found += steps or [find_checkpoint(place)]
    return list(dict.fromkeys(found))


def chosen_sets(names: str, checkpoint: Path) -> list[str]:
    """The sets that are named, or those that a checkpoint's run was trained on.

    raises: ConfigError if there are none
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    config = checkpoint.parent / "config.yaml"
    if not found and config.is_file():
        with suppress(KeyError, TypeError):
            found = [source["name"] for source in read_config(config)["data"]["sources"]]
    if not found:
        raise ConfigError(
            f"wanted sets to measure, found none, and no {shown(config)} that tells them; name "
            f"them: --data csl,alpaca"
        )
    return list(dict.fromkeys(found))


def windows(document: Document, length: int, stride: int) -> Iterator[Row]:
    """A document as inputs and targets of at most `length` positions; each target comes once.

    stride: 1 to length; further windows have so many new positions
    """
    tokens = document.ids[:-1]
    targets = np.where(document.is_target[1:], document.ids[1:], IGNORED)
    end = 0
    while end < len(tokens):
        done, end = end, min(len(tokens), end + stride if end else length)
        first = max(0, end - length)
        new = targets[first:end].copy()
        new[: done - first] = IGNORED
        if (new != IGNORED).any():
            yield tokens[first:end], new


@torch.inference_mode()
def document_sums(
    model: Transformer,
    documents: Sequence[Document],
    stride: int,
    batch_size: int,
    world: World,
    name: str = "",
) -> np.ndarray:
    """Loss in nats, targets and hits of each document: (n_documents, 3) float64."""
    length = model.config.max_seq_len
    pairs = [(n, row) for n, d in enumerate(documents) for row in windows(d, length, stride)]
    owners, rows = [n for n, _ in pairs], [row for _, row in pairs]
    sizes = [len(tokens) for tokens, _ in rows]
    # Longest first: whether a batch fits in memory shows at once.
    lines = best_fit(sizes, length)
    sums = np.zeros((len(documents), 3))
    starts = range(0, len(lines), batch_size)[world.rank :: world.size]
    for first in tqdm(starts, desc=name, unit=" batches", disable=not world.is_main, leave=False):
        part = lines[first : first + batch_size]
        batch = collate([[rows[i] for i in line] for line in part], pad_id=0)
        losses, hits = _losses(model, batch)
        # Targets come line by line, and in a line row by row, as the rows were laid.
        laid = [i for line in part for i in line]
        counts = [int((rows[i][1] != IGNORED).sum()) for i in laid]
        owner = np.repeat([owners[i] for i in laid], counts)
        for column, values in enumerate((losses, np.ones(len(owner)), hits)):
            np.add.at(sums[:, column], owner, values)
    if world.size > 1:
        sums = world.sum(torch.from_numpy(sums).to(world.device)).cpu().numpy()
    return sums


def _losses(model: Transformer, batch: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Loss and hit of each target, in the order of the batch."""
    device = model.rope.device
    targets = batch.pop("targets").to(device)
    hidden = model.hidden(**{key: value.to(device) for key, value in batch.items()})
    chosen = targets != IGNORED
    found = token_losses(hidden, model.output.weight, targets)
    return tuple(each[chosen].double().cpu().numpy() for each in found)


def figures(sums: np.ndarray, n_bytes: int) -> dict:
    """The figures of one set from the sums of its documents."""
    loss, n_targets, hits = sums.sum(axis=0).tolist()
    return {
        "ppl": perplexity(loss, n_targets),
        "bpb": loss / n_bytes / math.log(2),
        "accuracy": hits / n_targets,
        "loss_nats": loss,
        "n_targets": int(n_targets),
        "n_bytes": n_bytes,
    }


def measure(loaded: Loaded, sets: Sequence[HeldOut], cfg: EvaluateConfig, world: World) -> dict:
    """Figures of one checkpoint by set."""
    length, found = loaded.config.max_seq_len, {}
    for held_out in sets:
        name, documents = held_out.name, held_out.documents
        stride = max(1, length // 2)
        sums = document_sums(loaded.model, documents, stride, cfg.batch_size, world, name)
        n_bytes = sum(len(document.text.encode()) for document in documents)
        found[name] = figures(sums, n_bytes) | {"counts": held_out.counts}
    return {
        "step": loaded.step,
        "sha256": checksums(loaded.path),
        "tokenizer": loaded.tokenizer.fingerprint,
        "vocab_size": loaded.tokenizer.vocab_size,
        "max_seq_len": length,
        "sets": found,
    }


def bits(found: dict) -> np.ndarray:
    """Bits per byte of every checkpoint (a row) on every set."""
    steps = found["checkpoints"].values()
    return np.array([[step["sets"][name]["bpb"] for name in found["sets"]] for step in steps])


def forgotten(figures: np.ndarray) -> np.ndarray:
    """The last figure of each set above the lowest before it; below 0 nothing was lost."""
    return figures[-1] - figures[:-1].min(axis=0)


def report(found: dict) -> str:
    """One block a set."""
    blocks, several = [], len(found["checkpoints"]) > 1
    head = ["", "bits/byte", "change", "ppl", "accuracy", "targets", "bytes"]
    for (name, about), column in zip(found["sets"].items(), bits(found).T, strict=True):
        lines, notes = [head], []
        for (step, measured), change in zip(
            found["checkpoints"].items(), column - column[0], strict=True
        ):
            row = measured["sets"][name]
            lines.append([
                step, f"{row['bpb']:.4f}", f"{change:+.4f}", f"{row['ppl']:.2f}",
                f"{row['accuracy']:.2%}", f"{row['n_targets']:,}", f"{row['n_bytes']:,}",
            ])  # fmt: skip
            counts = row["counts"].items()
            notes += [f"{step}: {n:,} {reason.replace('_', ' ')}" for reason, n in counts]
        if several:
            notes.append(f"forgotten: {forgotten(column[:, None])[0]:+.4f} bits per byte")
        title = f"{name} ({about['n_documents']:,} documents, sha256 {about['sha256'][:12]})"
        blocks.append("\n".join([title, table(lines), *notes]))
    sizes = sorted({each["vocab_size"] for each in found["checkpoints"].values()})
    blocks.append(f"ppl of guessing: {' or '.join(f'{n:,}' for n in sizes)}, the vocabulary's size")
    return "\n\n".join(blocks)


def require_same_documents(seen: dict[str, dict], held_out: HeldOut) -> None:
    """Note what a set is; checkpoints can only be compared on the same documents.

    raises: ConfigError if one of them has lost or gained some
    """
    about = held_out.about
    before = seen.setdefault(held_out.name, about)
    if before != about:
        raise ConfigError(
            f"{held_out.name}: the checkpoints do not score the same texts "
            f"({before['n_documents']} and {about['n_documents']} documents); their contexts "
            f"differ; measure them one by one"
        )


def main(cfg: EvaluateConfig) -> None:
    """Measure every checkpoint on every set, print, write."""
    if not cfg.checkpoints:
        raise CheckpointError(
            "wanted a checkpoint, found none: python -m babyllama.analysis.perplexity out/NAME"
        )
    steps = chosen_steps(cfg.checkpoints, cfg.steps)
    first = find_checkpoint(from_repo(cfg.checkpoints[0]).resolve())
    names = chosen_sets(cfg.data, first)
    out = from_repo(cfg.out) if cfg.out else beside(first) / "evaluate.json"
    require_writable(out)
    settings = plain(cfg) | {"checkpoints": [shown(step) for step in steps]}
    found: dict = {"settings": settings, "sets": {}, "checkpoints": {}}
    opened: dict[tuple[str, int], list[HeldOut]] = {}
    with start(pick_device(cfg.device)) as world:
        for step in steps:
            loaded = load_model(step, world.device)
            tokenizer, length = loaded.tokenizer, loaded.config.max_seq_len
            key = (tokenizer.fingerprint, length)
            if key not in opened:
                opened[key] = [
                    open_held_out(name, cfg.split, cfg.max_rows, tokenizer, cfg.prompts, length)
                    for name in names
                ]
                for held_out in opened[key]:
                    require_same_documents(found["sets"], held_out)
            found["checkpoints"][shown(step)] = measure(loaded, opened[key], cfg, world)
        if world.is_main:
            write_json(out, found)
            print(f"{report(found)}\n\nfigures: {shown(out)}")


if __name__ == "__main__":
    run(main, parse(EvaluateConfig, __doc__, positional=["checkpoints"]))
