"""How many pieces should a vocabulary have? One shape, one time, bits per byte of the same texts.

    python -m benchmarks.vocabularies --sets '[abstracts, wikipedia]'
    python -m benchmarks.vocabularies --pieces '[8000]' --also '[big.model]' --seconds 60

Trains a BPE vocabulary of each size on all clean rows (data_process.run makes them), turns those of
the sets into token files, and trains the released model's shape, head and embedding one table,
for as many steps as fit into the same processor seconds. A large vocabulary says more with a token
and takes longer for it; bits per byte of the text, which no vocabulary can flatter, tell what is
left of that. Finished runs are not made again. Prints a Markdown table.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from babyllama.config import REPO, from_repo, parse, run, shown
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.rows import read_rows, texts_of
from babyllama.trainer import forward_backward, next_token_loss
from benchmarks.scaling import command, read
from data_process.registry import data_sets
from data_process.run import ProcessConfig, make_tokens
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class VocabulariesConfig:
    """What is compared.

    Args:
        root: of clean/, with the sets' rows, and of tokens/ and tokenizers/, which are made
        sets: names of sets of texts
        pieces: sizes of our own vocabularies
        also: ready vocabularies
        seconds: of one processor core for training; reading and evaluating come on top
        recipe: all else of a run
        name: what the runs are called
    """

    root: Path = Path("data")
    sets: tuple[str, ...] = ("f_csldcp", "f_wikipedia")
    pieces: tuple[int, ...] = (6_000, 8_000, 16_000, 32_000)
    also: tuple[Path, ...] = ()
    seconds: float = 150.0
    recipe: Path = Path("release/recipe/pretrain/base.yaml")
    name: str = "vocabulary"


def vocabulary(cfg: VocabulariesConfig, pieces: int) -> Path:
    """A vocabulary of so many pieces, learnt from all of clean/ where it is not there yet."""
    root = from_repo(cfg.root).resolve()
    out = root / "tokenizers" / f"own-{pieces}.model"
    if not out.is_file():
        words = ("--rows", root / "clean", "--vocab_size", pieces, "--out", out)
        command("tokenizer.py", "train", *words)
    return out


def token_files(cfg: VocabulariesConfig, tokenizer: Tokenizer) -> int:
    """Make them where they are missing; the number of tokens of the training parts."""
    sets = []
    for name in cfg.sets:
        counts = from_repo(cfg.root) / "clean" / name / "counts.json"
        if not counts.is_file():
            raise ConfigError(
                f"--sets: wanted the clean rows of {name}, found no {shown(counts)}; make them: "
                f"python -m data_process.run"
            )
        sets += data_sets(json.loads(counts.read_text("utf-8"))["reader"], name)
    made = make_tokens(sets, tokenizer, ProcessConfig(cfg.sets[0], out=cfg.root))
    return sum(parts["train"] for parts in made.values())


def seconds_per_step(recipe: dict, shape: ModelConfig, n_steps: int = 5) -> float:
    """Processor seconds of a training step, after one that warms up."""
    model = Transformer(shape)
    optimizer = make_optimizer(model, OptimConfig(name=recipe["optim"]["name"]))
    ids = torch.randint(0, shape.vocab_size, (recipe["train"]["batch_size"], shape.max_seq_len + 1))
    batch = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    scaler, began = Scaler(CPU, "float32"), 0.0
    for step in range(n_steps + 1):
        if step == 1:
            began = time.process_time()
        forward_backward(model, [batch], World(0, 1, CPU), scaler, next_token_loss)
        scaler.step(optimizer, list(model.parameters()), 1.0)
    return (time.process_time() - began) / n_steps


def compare(cfg: VocabulariesConfig, path: Path) -> dict:
    """Train with a vocabulary; its figures."""
    root = from_repo(cfg.root).resolve()
    tokenizer = Tokenizer(path)
    n_tokens = token_files(cfg, tokenizer)
    recipe_path = from_repo(cfg.recipe)
    recipe = yaml.safe_load(recipe_path.read_text("utf-8"))
    shape = yaml.safe_load((recipe_path.parent / recipe["model"]).read_text("utf-8"))
    config = replace(ModelConfig(**shape), vocab_size=tokenizer.vocab_size)
    place = REPO / "out" / f"{cfg.name}_{path.stem}"
    if not (place / "config.yaml").is_file():
        steps = max(20, round(cfg.seconds / seconds_per_step(recipe, config)))
    else:  # to go on, or to have been finished, with the same number of steps
        steps = yaml.safe_load((place / "config.yaml").read_text("utf-8"))["train"]["max_steps"]
    tokens = root / "tokens" / path.stem
    sources = json.dumps([{"name": str(tokens / name)} for name in cfg.sets])
    settings = {
        "name": place, "tokenizer": path, "data.sources": sources, "train.max_steps": steps,
        "optim.warmup_steps": min(recipe["optim"]["warmup_steps"], steps // 10),
        "train.eval_every": steps, "train.save_every": steps, "train.keep_best": "false",
        "train.samples": "[]",
    }  # fmt: skip
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command("pretrain.py", "--config", cfg.recipe, *flags)
    found = read(place)
    n_bytes = sum(
        len(text.encode())
        for name in cfg.sets
        for rows in sorted((root / "clean" / name).glob("train-*.jsonl"))
        for row in read_rows(rows)
        for text in texts_of(row)
    )
    return {
        "vocabulary": path.stem, "pieces": tokenizer.vocab_size, "parameters": found.parameters,
        "bytes_a_token": n_bytes / n_tokens, "tokens": found.tokens,
        "tokens_per_s": found.tokens / cfg.seconds, "share_read": found.tokens / n_tokens,
        "loss": found.loss, "bits_per_byte": found.bits,
    }  # fmt: skip


def line(row: dict) -> str:
    """A vocabulary's cells."""
    return (
        f"| {row['vocabulary']} | {row['pieces']:,} | {row['parameters'] / 1e6:.2f} M | "
        f"{row['bytes_a_token']:.2f} | {row['tokens_per_s']:,.0f} | "
        f"{row['tokens'] / 1e6:.3f} M = {row['share_read']:.0%} | {row['loss']:.3f} | "
        f"{row['bits_per_byte']:.3f} |"
    )


def main(cfg: VocabulariesConfig) -> None:
    """Compare them all."""
    if not cfg.seconds > 0 or not cfg.sets or not (cfg.pieces or cfg.also):
        raise ConfigError("wanted --seconds above 0, --sets, and one of --pieces and --also")
    paths = [vocabulary(cfg, n) for n in cfg.pieces] + [from_repo(path) for path in cfg.also]
    rows = [compare(cfg, path) for path in paths]
    print("| vocabulary | pieces | parameters | bytes a token | tokens/s | read | loss | "
          "bits per byte |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(map(line, rows)))
    print(json.dumps(rows))


if __name__ == "__main__":
    run(main, parse(VocabulariesConfig, __doc__))
