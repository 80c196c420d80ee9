"""Fine-tuning on dialogues packed into full sequences, beside one dialogue a sequence and filler.

    python -m benchmarks.sft_packing                     small talk of the quick start's sample
    python -m data_process.run alpaca --raw FILE --tokenizer TOKENIZER.model --out /tmp/alpaca
    python -m benchmarks.sft_packing --tokenizer TOKENIZER.model \\
        --tokens /tmp/alpaca/tokens/TOKENIZER/alpaca     about 5 minutes on two cores

All contestants begin with the same weights of the 43M shape and take the same dialogues in each
step, so supervised tokens per step are equal; they take turns, step by step, in one process.
"packed" is what the trainer does; "context" fills each dialogue up to the context's length;
"longest" to the longest of its micro-batch. The last line is JSON.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.config import from_repo, parse, run
from babyllama.data import Data, TrainData, open_data, share
from babyllama.device import Scaler, pick_precision
from babyllama.distributed import World
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import evaluate, forward_backward, next_token_loss
from benchmarks.peers import SHAPE_43M
from model import IGNORED, Transformer
from tokenizer import Tokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PackingConfig:
    """What to measure.

    Args:
        tokens: token files of dialogues
        tokenizer: the one that made them
        batch_size: dialogues of a step
        micro_batch_size: sequences computed at a time
        steps: of each contestant, after one that warms up
        ways: the contestants
    """

    tokens: Path = Path("data/tokens/sample/smalltalk")
    tokenizer: Path = Path("data/tokenizers/sample.model")
    batch_size: int = 16
    micro_batch_size: int = 8
    steps: int = 12
    ways: tuple[str, ...] = ("packed", "context", "longest")


@dataclass(frozen=True)
class Order:
    """What decides which dialogues a step takes."""

    batch_size: int
    seed: int = 0


def batches_of(data: TrainData, step: int, way: str, micro_batch_size: int) -> list[dict]:
    """The micro-batches of a step, laid out in one of the ways."""
    if way == "packed":
        return data.batches(step, micro_batch_size)
    alone = [[row] for rows in data.sequences(step) for row in rows]
    batches = share(alone, micro_batch_size, 0, 1, data.pad_id)
    return [filled(b, data) if way == "context" else b for b in batches]


def filled(batch: dict[str, Tensor], data: TrainData) -> dict[str, Tensor]:
    """A batch with filler up to the length of the context."""
    fillers = {"tokens": data.pad_id, "targets": IGNORED}
    return {
        key: F.pad(ids, (0, data.max_seq_len - ids.shape[1]), value=fillers[key])
        for key, ids in batch.items()
    }


class Contestant:
    """A model that trains in one of the ways."""

    def __init__(self, way: str, data: Data, tokenizer: Tokenizer, cfg: PackingConfig) -> None:
        self.way, self.data, self.cfg = way, data, cfg
        torch.manual_seed(0)
        self.model = Transformer(replace(SHAPE_43M, vocab_size=tokenizer.vocab_size))
        self.optimizer = make_optimizer(self.model, OptimConfig(lr=1e-3))
        self.scaler = Scaler(CPU, pick_precision(CPU))
        self.seconds: list[float] = []
        self.computed, self.supervised, self.sequences = 0, 0, 0

    def step(self, number: int) -> None:
        """Train on the dialogues of a step; the first is not timed."""
        batches = batches_of(self.data.train, number, self.way, self.cfg.micro_batch_size)
        started = time.perf_counter()
        sums = forward_backward(self.model, batches, World(0, 1, CPU), self.scaler, next_token_loss)
        self.scaler.step(self.optimizer, list(self.model.parameters()), 1.0, float(sums[0]))
        if number:
            self.seconds.append(time.perf_counter() - started)
            self.supervised += int(sums[1])
            self.computed += int(sums[3])
            self.sequences += sum(len(batch["tokens"]) for batch in batches)

    def figures(self) -> dict[str, float]:
        """What came out."""
        val = evaluate(self.model, self.data.val, 8, self.scaler, World(0, 1, CPU))
        return {
            "supervised_per_s": self.supervised / sum(self.seconds),
            "supervised": self.supervised,
            "computed": self.computed,
            "sequences": self.sequences,
            "val_loss": val["loss"],
        }


def main(cfg: PackingConfig) -> None:
    """Train all contestants in turn and compare them."""
    tokenizer = Tokenizer(from_repo(cfg.tokenizer))
    # A path, even where it is one word, and not the name of a set.
    source = SourceConfig(str(from_repo(cfg.tokens).resolve()))
    data = open_data(
        DataConfig(sources=(source,), max_val_rows=64),
        tokenizer,
        SHAPE_43M.max_seq_len,
        order=Order(cfg.batch_size),
    )
    print(f"{len(data.train.mixture)} dialogues, {cfg.batch_size} a step")
    contestants = {way: Contestant(way, data, tokenizer, cfg) for way in cfg.ways}
    for number in range(cfg.steps + 1):
        for contestant in contestants.values():
            contestant.step(number)
    results = {way: contestant.figures() for way, contestant in contestants.items()}
    for way, found in results.items():
        print(f"{way:<8}", "  ".join(f"{key} {value:,.4g}" for key, value in found.items()))
    packed = contestants["packed"]
    for way, contestant in contestants.items():
        pairs = zip(contestant.seconds, packed.seconds, strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        results[way]["packed_is_faster"] = ratio
        worse = results["packed"]["val_loss"] - results[way]["val_loss"]
        print(f"packed over {way}: supervised tokens/s x {ratio:.2f}, validation loss {worse:+.5f}")
    print(json.dumps(results))


if __name__ == "__main__":
    run(main, parse(PackingConfig, __doc__))
