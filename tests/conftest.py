"""What several tests need: a small real vocabulary, a small model, a checkpoint, token files."""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import yaml

from babyllama import lora
from babyllama.checkpoint import Snapshot, model_weights, save_checkpoint, write_whole
from babyllama.config import REPO
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.token_file import TokenFileWriter
from data_process.vocabulary import train_vocabulary
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from warm import Keeper

# Tiny models gain nothing from a second thread, and lose tenfold where the cores are busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the scripts that tests start
os.environ["LC_ALL"] = "C.UTF-8"  # messages in English, whoever runs the tests
# Under nohup a hang-up is ignored, here and in every program that is started from here.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SMALL_PROMPTS = REPO / "tests/small_prompts.yaml"  # the committed ones take a second to check
TEXTS = [
    "今天天气很好，我们去公园散步。公园里有很多花，也有很多人。",
    "小猫坐在窗台上看外面的雨。雨停了以后，它跑到院子里玩。",
    "资料：银杏是一种古老的树种。\n\n人类：银杏的叶子什么时候变黄？\n\n助手：秋天。",
    "请给下面的文章写一个标题：新的公交线路今天开通，市民出行更加方便。",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
    "老师说，学习要一步一步来，不要着急。学生们都点了点头。",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A BPE vocabulary of 420 with byte fallback."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_vocabulary(TEXTS * 5, path, vocab_size=420)
    return Tokenizer(path)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    """A random model of two layers for that vocabulary."""
    torch.manual_seed(0)
    return Transformer(small_config(tokenizer.vocab_size)).eval()


def small_config(vocab_size: int = 97, **changes: object) -> ModelConfig:
    """dim 32, 2 layers, 4 heads, 128 tokens of context."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "max_seq_len": 128}
    return ModelConfig(vocab_size=vocab_size, **(sizes | changes))


@pytest.fixture
def checkpoint(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """A real checkpoint of the small model, as a fine-tuning run leaves it."""
    return save_model(tmp_path / "out/small", model, tokenizer, step=7)


def save_model(
    run: Path, model: Transformer, tokenizer: Tokenizer, kind: str = "sft", step: int = 1
) -> Path:
    """A checkpoint as a run of that kind leaves it, before its optimizer made a step."""
    optimizer, extra = make_optimizer(model, OptimConfig()), {"tokens": 0}
    return save_checkpoint(
        Snapshot(run, model, tokenizer, kind, optimizer=optimizer, extra=extra), step
    )


def save_adapter(model: Transformer, path: Path) -> Path:
    """The active adapter alone, as a checkpoint holds it."""
    weights = model_weights(model)
    write_whole(path, lambda place: lora.write(model, weights, place), weights.values())
    return path


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes, and every directory."""
    paths = root.rglob("*")
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture
def token_root(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Token files of three small sets, each with a train and a val part: text, chat, summary."""
    return write_token_files(tmp_path, tokenizer)


def write_token_files(root: Path, tokenizer: Tokenizer) -> Path:
    """The three sets of `token_root`, in root/tokens."""
    for split, n_rows in (("train", 40), ("val", 6)):
        write = {
            kind: TokenFileWriter(root / f"tokens/{kind}/{split}-00000", kind, tokenizer)
            for kind in ("text", "chat", "summary")
        }
        with write["text"] as text, write["chat"] as chat, write["summary"] as summary:
            for n in range(n_rows):
                body = tokenizer.encode(TEXTS[n % len(TEXTS)] * (1 + n % 3))
                title = tokenizer.encode(TEXTS[n % len(TEXTS)][: 3 + n % 9])
                text.add_text([*body, tokenizer.eos_id])
                summary.add_row([("text", body), ("summary", title)])
                turns = [("user", title), ("assistant", body[: 5 + n])] * (1 + n % 3)
                chat.add_row(([("system", body[:20])] if n % 4 == 0 else []) + turns)
    return root / "tokens"


@pytest.fixture(scope="session")
def keeper() -> "Keeper":
    """Starts scripts as processes of their own, without loading torch for each; see warm.py."""
    import warm

    return warm.keeper()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A browser for all tests of a file; see browsing.py."""
    from browsing import launched

    with launched() as browser:
        yield browser


class Outcome(NamedTuple):
    """What a script left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a mistake of the user's must become, with exit code 2."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.err, self
        return lines[0]


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs a script of the repository in this process, from its first line to its exit code."""

    def call(name: str, *argv: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / name), run_name="__main__")
        return Outcome(end.value.code or 0, *capfd.readouterr())

    return call


def write_run(path: Path, tokens: Path, tokenizer: Tokenizer | None = None, **train: int) -> Path:
    """A config of ten short steps on the CPU, for pretrain.py, or without tokenizer for sft.py.

    Ten steps cross the border of an epoch. The run goes to <path without .yaml>.

    train: changes to the section of that name
    """
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "max_seq_len": 128}
    names = ["text"] if tokenizer else ["chat", "summary"]
    every = {"max_steps": 10, "log_every": 1, "eval_every": 5, "save_every": 5}
    config = {
        "name": str(path.with_suffix("")),
        "data": {
            "sources": [{"name": str(tokens / name)} for name in names],
            "prompts": str(SMALL_PROMPTS),
        },
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": every | {"batch_size": 4 if tokenizer else 11, "micro_batch_size": 2} | train,
        "device": {"device": "cpu", "precision": "float32"},
    }
    if tokenizer:
        config |= {"tokenizer": str(tokenizer.path), "model": sizes}
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path
