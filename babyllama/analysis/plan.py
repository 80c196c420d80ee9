"""A dry run on a fresh clone: what a run will take, and every command on the way to it.

Without a tokenizer its size is assumed, without token files their number; both are said. The
probing steps read random tokens, which cost what others do.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from babyllama.analysis.estimate import (
    CONTEXT_GB,
    available_gb,
    dry_run,
    largest_batch,
    memory_by_part,
)
from babyllama.analysis.watch import flops_per_token, tabulated_peak
from babyllama.config import from_repo, shown
from babyllama.cpu.fused import fuse
from babyllama.data import Mixture, TrainData
from babyllama.device import open_scaler, pick_device
from babyllama.distributed import start
from babyllama.language import verbatim
from babyllama.sources import Row, Source
from babyllama.token_file import token_directory
from babyllama.trainer import Objective, total_steps
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

# The vocabulary of Llama-Chinese, and the tokens that it makes of the filtered Chinese Wikipedia
# (computed from its 524 MB).
PIECES, TOKENS = 65_000, 250_000_000
LLAMA_CHINESE = Path("data/tokenizers/llama_chinese.model")
ADDRESS = "https://huggingface.co/FlagAlpha/Atom-7B/resolve/main/tokenizer.model"
# A card that is not at hand, and the share of its rate that is likely.
CARD, CARD_BATCH, CARD_MFU = "RTX 3090", 32, (0.2, 0.3)
MANY = f"--engine processes --workers {os.cpu_count()}"
LAPTOP = (
    "--name laptop --model configs/model/14m.yaml --optim.name muon "
    "--optim.lr 5e-3 --train.batch_size 16 --train.micro_batch_size 8 --train.save_every 60"
)


class Assumed(Source):
    """Windows of random tokens in place of token files."""

    def __init__(self, n_tokens: int, vocab_size: int, max_seq_len: int) -> None:
        self.name, self.files, self._vocab_size = "assumed", [], vocab_size
        self._length, self._n = max_seq_len, n_tokens // max_seq_len

    def __len__(self) -> int:
        return self._n

    def row(self, number: int, rng: np.random.Generator) -> Row:
        ids = rng.integers(self._vocab_size, size=self._length + 1)
        return ids[:-1], ids[1:]


def missing(cfg: Any) -> list[str]:
    """What is not there yet of tokenizer and token files; cfg: pretrain.PretrainConfig."""
    path = from_repo(cfg.tokenizer)
    if not path.is_file():
        return [shown(path), "its token files"]
    places = (token_directory(source.name, Tokenizer(path)) for source in cfg.data.sources)
    return [shown(place) for place in places if not any(place.glob("train-*.idx"))]


def plan(cfg: Any, missing: list[str], objective: Objective) -> int:
    """Print what is assumed, the estimate, and the commands; the exit code."""
    path, train = from_repo(cfg.tokenizer), cfg.train
    n_pieces = Tokenizer(path).vocab_size if path.is_file() else cfg.model.vocab_size or PIECES
    shape = replace(cfg.model, vocab_size=n_pieces)
    length = min(cfg.data.max_seq_len or shape.max_seq_len, shape.max_seq_len)
    mixture = Mixture([Assumed(TOKENS, n_pieces, length)], [1.0], train.seed)
    data = TrainData(mixture, train.batch_size, length, pad_id=0)
    with start(pick_device(cfg.device.device), cfg.parallel) as world:
        fits = replace(train, micro_batch_size=fitting(shape, cfg, world.device))
        model = fuse(Transformer(shape).to(world.device), train.blocks)
        code = dry_run(model, data, replace(cfg, model=shape, train=fits), world, objective)
        if world.is_main:
            n_tokens = total_steps(train, data) * train.batch_size * length
            print(
                f"not there yet: {', '.join(missing)}; assumed: a vocabulary of {n_pieces:,}, "
                f"{TOKENS:,} tokens an epoch, as many as Wikipedia has"
            )
            print("the whole way, as commands:")
            run = f"{run_of(sys.argv)} --train.micro_batch_size"
            show(preparing(cfg, n_pieces))
            show(["# training on this machine", f"{run} {fits.micro_batch_size}"])
            show([on_card(model, n_tokens), f"{run} {min(CARD_BATCH, train.batch_size)}"])
            show(smaller_way() if cfg.tokenizer == LLAMA_CHINESE else ())
        return code


def run_of(argv: Sequence[str]) -> str:
    """The command line that trains, from that of its dry run."""
    line = shlex.join(["python", Path(argv[0]).name, *argv[1:]])
    return re.sub(r" --(dry[-_]run([ =](true|yes))?|lang[ =]\w+)(?= |$)", "", line)


def show(lines: Iterable[str]) -> None:
    """Print commands as they are, and remarks in the user's language."""
    for line in lines:
        print(line, file=sys.stdout if line.startswith("#") else verbatim(sys.stdout))


def fitting(shape: ModelConfig, cfg: Any, device: torch.device) -> int:
    """The largest micro-batch, up to the config's, that divides the batch and fits this machine."""
    precision = open_scaler(device, cfg.device).precision
    one, two = (
        memory_by_part(shape, shape.n_parameters, n, precision, is_card=device.type == "cuda")
        for n in (1, 2)
    )
    most = max(1, largest_batch(one, two, available_gb(device)))
    sizes = range(min(cfg.train.micro_batch_size, most), 0, -1)
    return next(n for n in sizes if cfg.train.batch_size % n == 0)


def on_card(model: Transformer, n_tokens: int) -> str:
    """What the run takes on a card that is not at hand."""
    parts = memory_by_part(
        model.config, model.n_parameters(), CARD_BATCH, "bfloat16", is_card=True
    )  # fmt: skip
    peak = tabulated_peak(CARD, "bfloat16") / flops_per_token(model)
    most, least = (n_tokens / (share * peak) / 3600 for share in CARD_MFU)
    return (
        f"# … or on an {CARD}: {sum(parts.values()) + CONTEXT_GB:.1f} GB and {least:.1f} to "
        f"{most:.1f} hours, computed"
    )


def preparing(cfg: Any, n_pieces: int) -> Iterator[str]:
    """Every step before the training, as lines for a shell."""
    path = shown(from_repo(cfg.tokenizer))
    names = [source.name for source in cfg.data.sources]
    yield "# texts; where Hugging Face cannot be reached: fetch --from modelscope"
    for name in names:
        yield f"python -m data_process.fetch {name}"
        yield f"python -m data_process.run {name} {MANY}"
    if not from_repo(cfg.tokenizer).is_file():
        if cfg.tokenizer == LLAMA_CHINESE:
            yield "# the vocabulary of Llama-Chinese …"
            yield f"curl -fL --create-dirs -o {path} {ADDRESS}"
            yield "# … or one of the same size of your own"
        rows = f"--rows data/clean/{names[0]}"
        yield f"python tokenizer.py train {rows} --vocab_size {n_pieces} --out {path}"
    yield "# tokens"
    for name in names:
        yield f"python -m data_process.run {name} --tokenizer {path} {MANY}"


def smaller_way() -> Iterator[str]:
    """A vocabulary and a shape that a laptop learns in days."""
    yield "# … or a laptop: a vocabulary of 16,000 of your own and 14 million parameters"
    path = "data/tokenizers/own16k.model"
    yield f"python tokenizer.py train --rows data/clean/wiki --vocab_size 16000 --out {path}"
    yield f"python -m data_process.run wiki --tokenizer {path} {MANY}"
    yield f"python pretrain.py --tokenizer {path} {LAPTOP}"
