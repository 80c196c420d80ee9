"""What a model knows of held-out text: perplexity, bits per byte, token accuracy.

    python -m babyllama.evaluate out/csl                    the sets that the run was trained on
    python -m babyllama.evaluate out/a out/b --data wiki,data/clean/csl,held_out.jsonl
    torchrun --nproc_per_node 2 -m babyllama.evaluate out/a --data wiki

Bits per byte compare models of different tokenizers, perplexity and accuracy only those of one.
The figures depend neither on batch size nor on packing nor on the number of processes. A document
longer than the context is read in windows that overlap: each token is predicted once, with at
least `context - stride` tokens before it, or all there are. Beside the models stands what xz makes
of the same text, and beside each figure of bits its 95 % interval, by resampling documents.
"""

import json
import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from babyllama import metrics
from babyllama.checkpoint import Loaded, load_model
from babyllama.checkpoint_files import find_checkpoint
from babyllama.cli import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import CheckpointError, ConfigError
from babyllama.forgetting import chosen_sources
from babyllama.held_out import Document, HeldOut, fingerprint, open_held_out
from babyllama.log import written_whole
from babyllama.packing import best_fit, collate
from babyllama.parallel import World, start
from babyllama.run_dir import beside, checksums
from babyllama.sources import Row
from model import IGNORED, Transformer

# Positions whose logits exist at once: 256 x 65,000 pieces are 67 MB.
_SLICE = 256


@dataclass(frozen=True)
class EvaluateConfig:
    """Which checkpoints are measured, on what, and how.

    Args:
        checkpoints: runs (their newest steps) or steps
        data: sets, separated by commas: files of rows, token files, folders with either, or names
            of sets; if absent the sets that the first checkpoint's run was trained on
        split: the part of a folder or set
        max_rows: the first rows of each set, at most this many; if absent all
        stride: new targets of each further window of a long document; if absent half the context
        prompts: wordings; summary rows are asked for with the `eval` question
        batch_size: sequences computed at a time
        pack: lay short documents into one sequence, kept apart by the attention mask
        out: the figures as JSON; if absent evaluate.json in the first checkpoint's run
        device: auto, cpu, cuda or mps
    """

    checkpoints: tuple[Path, ...] = ()
    data: str = ""
    split: Literal["val", "test"] = "val"
    max_rows: int | None = None
    stride: int | None = None
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    batch_size: int = 16
    pack: bool = True
    out: Path | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rows", "stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} wants 1 or more, found {value}")


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
    pack: bool,
    world: World,
    name: str = "",
) -> np.ndarray:
    """Loss in nats, targets and hits of each document: (n_documents, 3) float64."""
    length = model.config.max_seq_len
    pairs = [(n, row) for n, d in enumerate(documents) for row in windows(d, length, stride)]
    owners, rows = [n for n, _ in pairs], [row for _, row in pairs]
    sizes = [len(tokens) for tokens, _ in rows]
    # Longest first: whether a batch fits in memory shows at once.
    lines = best_fit(sizes, length) if pack else [[i] for i in np.argsort(sizes)[::-1].tolist()]
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
    hidden, goals, losses, hits = hidden[chosen], targets[chosen], [], []
    for part, goal in zip(hidden.split(_SLICE), goals.split(_SLICE), strict=True):
        logits = model.output(part).float()
        losses.append(F.cross_entropy(logits, goal, reduction="none"))
        hits.append(logits.argmax(dim=1) == goal)
    return tuple(torch.cat(each).double().cpu().numpy() for each in (losses, hits))


def figures(sums: np.ndarray, n_bytes: Sequence[int]) -> dict:
    """The figures of one set from the sums of its documents."""
    loss, n_targets, hits = sums.sum(axis=0).tolist()
    total = sum(n_bytes)
    low, high = metrics.bootstrap_ratio(sums[:, 0] / math.log(2), np.array(n_bytes))
    return {
        "ppl": metrics.perplexity(loss, n_targets),
        "bpb": metrics.bits_per_byte(loss, total),
        "bpb_low": low,
        "bpb_high": high,
        "accuracy": metrics.accuracy(hits, n_targets),
        "loss_nats": loss,
        "n_targets": int(n_targets),
        "n_bytes": total,
    }


def xz_bits_per_byte(documents: Sequence[Document]) -> float:
    """What a general compressor needs for the targets' text, all documents in one stream."""
    data = "\n".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(data, preset=9)) / max(1, len(data))


def measure(loaded: Loaded, sets: Sequence[HeldOut], cfg: EvaluateConfig, world: World) -> dict:
    """Figures of one checkpoint by set."""
    length = loaded.config.max_seq_len
    stride = cfg.stride or max(1, length // 2)
    if stride > length:
        raise ConfigError(
            f"--stride {stride} is longer than the context of {length}: tokens between two windows "
            f"would not be predicted; name at most {length}"
        )
    found = {}
    for held_out in sets:
        began = perf_counter()
        sums = document_sums(
            loaded.model, held_out.documents, stride, cfg.batch_size, cfg.pack, world, held_out.name
        )
        rest = {
            "n_long": sum(len(d.ids) - 1 > length for d in held_out.documents),
            "counts": held_out.counts,
            "seconds": perf_counter() - began,
        }
        found[held_out.name] = figures(sums, [d.n_bytes for d in held_out.documents]) | rest
    about = {
        "step": loaded.step,
        "sha256": checksums(loaded.path),
        "tokenizer": loaded.tokenizer.fingerprint,
        "vocab_size": loaded.tokenizer.vocab_size,
        "max_seq_len": length,
        "stride": stride,
    }
    return about | {"sets": found}


def table(found: dict) -> str:
    """One block a set: the models and the compressor."""
    lines = []
    for name, about in found["sets"].items():
        lines += [
            f"{name} ({about['n_documents']:,} documents, sha256 {about['sha256'][:12]})",
            "   bits/byte     95 % interval        ppl  accuracy     targets       bytes",
        ]
        for checkpoint, measured in found["checkpoints"].items():
            row = measured["sets"][name]
            notes = dict(row["counts"])
            notes |= {"longer than the context": row["n_long"]} if row["n_long"] else {}
            rest = "; ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in notes.items())
            lines.append(
                f"  {row['bpb']:10.4f}  {row['bpb_low']:7.4f} - {row['bpb_high']:7.4f} "
                f"{row['ppl']:10.2f}  {row['accuracy']:7.2%}  {row['n_targets']:10,}  "
                f"{row['n_bytes']:10,}  {checkpoint}{f' ({rest})' if rest else ''}"
            )
        lines += [f"  {about['xz_bpb']:10.4f}{' ' * 65}xz", ""]
    sizes = sorted({each["vocab_size"] for each in found["checkpoints"].values()})
    lines.append(f"ppl of guessing: {' or '.join(f'{n:,}' for n in sizes)}, the vocabulary's size")
    return "\n".join(lines)


def require_same_documents(seen: dict[str, dict], held_out: HeldOut, about: dict) -> None:
    """Checkpoints can only be compared on the same documents.

    raises: ConfigError if one of them has lost or gained some
    """
    before = seen.setdefault(held_out.name, about)
    if before["texts_sha256"] != about["texts_sha256"]:
        raise ConfigError(
            f"{held_out.name}: the checkpoints do not score the same texts "
            f"({before['n_documents']} and {about['n_documents']} documents); their contexts or "
            f"their token files differ; name rows (.jsonl), or measure them one by one"
        )


def main(cfg: EvaluateConfig) -> None:
    """Measure every checkpoint on every set, print, write."""
    if not cfg.checkpoints:
        raise CheckpointError(
            "wanted a checkpoint, found none named: python -m babyllama.evaluate out/NAME"
        )
    steps = [find_checkpoint(from_repo(path).resolve()) for path in cfg.checkpoints]
    names = chosen_sources(cfg.data, steps[0], flag="--data")
    out = from_repo(cfg.out) if cfg.out else beside(steps[0]) / "evaluate.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(cfg).items()}
    settings["checkpoints"] = [shown(step) for step in steps]
    found: dict = {"settings": settings, "sets": {}, "checkpoints": {}}
    with start(pick_device(cfg.device)) as world:
        for step in steps:
            loaded = load_model(step, world.device)
            length = loaded.config.max_seq_len
            sets = [
                open_held_out(name, cfg.split, cfg.max_rows, loaded.tokenizer, cfg.prompts, length)
                for name in names
            ]
            for held_out in sets:
                about = {
                    "files": held_out.files,
                    "sha256": held_out.sha256,
                    "texts_sha256": fingerprint(held_out.documents),
                    "n_documents": len(held_out.documents),
                    "xz_bpb": xz_bits_per_byte(held_out.documents),
                }
                require_same_documents(found["sets"], held_out, about)
            found["checkpoints"][shown(step)] = measure(loaded, sets, cfg, world)
        if world.is_main:
            with written_whole(out) as temporary:
                temporary.write_text(
                    json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8"
                )
            print(f"{table(found)}\n\nfigures: {shown(out)}")


if __name__ == "__main__":
    run(main, parse(EvaluateConfig, __doc__, positional=["checkpoints"]))
