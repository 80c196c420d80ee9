"""Write a checkpoint small enough to publish, int8 and a quarter of the size, and prove it.

    python -m export.release out/small --out release                    newest step of a run
    python -m export.release out/small --out release --source wiki      perplexity on a val set, too
    python -m export.release out/small --out half --weights float16 --max_mib 64
    python chat.py release                                              use it

The directory is a checkpoint like any other (load_model checks its SHA-256s and opens it), without
training state. Each row of a matrix, the embedding included, is held as int8 with one float32
scale; norms stay float32. It is run as float32 or, where there is a C compiler, as int8: the values
are the same. parity.json tells what rounding does: to logits, to greedy replies, to perplexity
(bounded: of the val set that is named, else of the lines); where that fails, or the files are too
large, nothing is written and the exit code is 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from babyllama import checkpoint
from babyllama.analysis.perplexity import Document, document_sums, open_held_out
from babyllama.checkpoint import Loaded, load_model
from babyllama.config import parse, run, shown
from babyllama.cpu.int8 import quantise
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.log import perplexity
from babyllama.run_dir import chosen_run, read_info
from babyllama.scoring.summarise import PROMPTS
from export import parity
from export.gguf import drift
from model import Transformer

BOUND = 1.005  # of the perplexity, over that of float32
N_TEXTS = 500


@dataclass(frozen=True)
class ReleaseConfig(parity.ExportConfig):
    """Source and target of a release.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest run in out/
        source: a set with token files, by name or directory; its val part is measured, too
        weights: int8: a quarter of float32's size; float16: half, for those who want more digits
        max_mib: largest size of the directory, in MiB
    """

    source: str = ""
    weights: Literal["int8", "float16"] = "int8"
    max_mib: float = 16.0

    def __post_init__(self) -> None:
        if not self.max_mib > 0:
            raise ConfigError(f"--max_mib wants more than 0, found {self.max_mib:g}; 16 is usual")


def write_small(place: Path, loaded: Loaded, kind: Literal["int8", "float16"] = "int8") -> None:
    """Fill an empty directory with a checkpoint for use, of a quarter or half of the size."""
    run = checkpoint.Snapshot(
        place, loaded.model, loaded.tokenizer, loaded.kind, shown(loaded.path)
    )
    weights = checkpoint.model_weights(loaded.model)
    half = {name: weight.half() for name, weight in weights.items()}
    tasks = {name: value for name, value in read_info(loaded.path).items() if name == "tasks"}
    info = checkpoint.info_of(run, loaded.step) | tasks | {"weights": kind}
    checkpoint.write_model(place, run, narrow(weights) if kind == "int8" else half, info)
    checkpoint.write_sums(place)


def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a small file holds them: each matrix as int8, with its scales beside it."""
    found = {}
    for name, weight in weights.items():
        if weight.dim() == 2:
            found[name], found[name + checkpoint.SCALES] = quantise(weight.float())
        else:
            found[name] = weight.float()
    return found


def documents_of(loaded: Loaded, material: parity.Material) -> list[Document]:
    """What the model was made to read: dialogues for a chat model, lines for a base model. Every
    token but the first of each is predicted."""
    context, texts = loaded.config.max_seq_len, material.finished(loaded)
    if loaded.kind != "sft":
        lines = material.lines[:N_TEXTS]
        texts = [loaded.tokenizer.encode(line, bos=True)[:context] for line in lines]
    return [Document(np.array(ids), np.arange(len(ids)) > 0, "") for ids in texts if len(ids) > 1]


def perplexity_of(model: Transformer, documents: Sequence[Document]) -> float:
    context, alone = model.config.max_seq_len, World(0, 1, torch.device("cpu"))
    sums = document_sums(model, documents, context, 16, alone, "measure perplexity")
    return perplexity(*sums.sum(axis=0)[:2])


def compare_perplexity(before: float, after: float, weights: str) -> dict:
    ratio = after / before
    return {
        "float32": before, weights: after, "ratio": ratio, "bound": BOUND, "passed": ratio <= BOUND,
    }  # fmt: skip


def prove(cfg: ReleaseConfig, loaded: Loaded, place: Path, material: parity.Material) -> dict:
    """Compare the directory, as any user loads it, with the checkpoint."""
    twin = load_model(place).model
    logits = parity.compare_logits(
        loaded.model, lambda ids: twin(torch.tensor([ids]))[0].detach(), material.finished(loaded)
    )
    documents = documents_of(loaded, material)
    before, after = (perplexity_of(one, documents) for one in (loaded.model, twin))
    report = {
        **parity.origin_of(loaded, material, []),
        "type": cfg.weights,
        "logits": logits | {"bound": None, "passed": None},
        "rounding": drift(loaded, twin, material),
        "perplexity_of_text": compare_perplexity(before, after, cfg.weights),
    }
    if source := cfg.source:
        held_out = open_held_out(
            source, "val", 256, loaded.tokenizer, PROMPTS, loaded.config.max_seq_len
        ).documents
        before, after = (perplexity_of(one, held_out) for one in (loaded.model, twin))
        n_tokens = int(sum(document.is_target.sum() for document in held_out))
        report["perplexity_of_source"] = {"source": source, "tokens": n_tokens}
        report["perplexity_of_source"] |= compare_perplexity(before, after, cfg.weights)
        # What it was made for says more than lines that it never answers with (perplexity 500).
        report["perplexity_of_text"] |= {"bound": None, "passed": None}
    return report


def main(cfg: ReleaseConfig) -> None:
    """Write the directory, prove it, put it in its place."""
    source = chosen_run(cfg.checkpoint)
    out = parity.check_out(cfg.out, cfg.force, source)
    loaded = load_model(source)
    material = parity.read_material(cfg.text)
    n_bytes = loaded.model.n_parameters() + len(loaded.tokenizer.bytes)
    with parity.new_folder(out, n_bytes) as place:
        write_small(place, loaded, cfg.weights)
        found = sum(path.stat().st_size for path in place.iterdir())
        report = prove(cfg, loaded, place, material)
        most = int(cfg.max_mib * 2**20)
        report["size"] = {"bytes": found, "bound": most, "passed": found <= most}
        parity.settle(report, place, out)
    parity.show(report, out)


if __name__ == "__main__":
    run(main, parse(ReleaseConfig, doc=__doc__, positional=("checkpoint",)))
