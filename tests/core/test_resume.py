"""A run that goes on from any of its checkpoints ends as one that was never stopped, bit for bit.

Pretraining, fine-tuning and adapters with dropout, with float16's scaler, with Muon, and
compiled. A step takes several micro-batches; eleven steps cross the ends of epochs. Compared:
weights, optimizer and random state, scaler, the figures, and the tokens that the model was shown.
test_trainer.py kills the scripts; here each checkpoint of a run is resumed in turn.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from babyllama.checkpoint import load_weights
from babyllama.data import Data, Mixture, TrainData, open_data
from babyllama.device import DeviceConfig
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.log import read_metrics
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig
from babyllama.run_dir import list_checkpoints
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.token_file import TokenFileWriter
from babyllama.trainer import Objective, TrainConfig, train
from conftest import SMALL_PROMPTS, small_config, write_token_files
from model import Loss, Transformer
from tokenizer import Tokenizer

WORLD = World(0, 1, torch.device("cpu"))
STEPS = 11
SOURCES = {"pretrain": ["text"], "sft": ["chat", "summary"], "lora": ["chat", "summary"]}
# Figures that tell how fast it went, and not what was computed.
OF_TIME = ("tokens_per_s", "mfu", "mem_gb")


@dataclass(frozen=True)
class Settings:
    """What the loop reads of a script's config."""

    train: TrainConfig
    device: DeviceConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, warmup_steps=3))
    base: Path | None = None


class Case(NamedTuple):
    """One kind of run."""

    kind: str
    precision: str = "float32"
    compile: bool = False
    optimizer: str = "adamw"

    @property
    def rows(self) -> int:
        """Rows of a step: so many that eleven steps are more than two epochs."""
        return 4 if self.kind == "pretrain" else 16

    def open(self, tokens: Path, tokenizer: Tokenizer) -> Data:
        """What the run reads."""
        sources = tuple(SourceConfig(str(tokens / name)) for name in SOURCES[self.kind])
        order = TrainConfig(batch_size=self.rows)
        return open_data(DataConfig(sources, SMALL_PROMPTS), tokenizer, 128, order, READERS)

    def go(
        self, run: Path, tokens: Path, tokenizer: Tokenizer, save_every: int
    ) -> list[torch.Tensor]:
        """Train until the last step; returns the tokens that the model was shown."""
        shown = []

        def loss_function(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
            shown.append(batch["tokens"])
            return model(**batch)

        loop = TrainConfig(
            max_steps=STEPS, batch_size=self.rows, micro_batch_size=2, log_every=3, eval_every=4,
            save_every=save_every, keep=STEPS, keep_best=False, compile=self.compile,
        )  # fmt: skip
        cfg = Settings(
            loop,
            DeviceConfig("cpu", self.precision),
            OptimConfig(self.optimizer, lr=1e-2, warmup_steps=3),
        )
        torch.manual_seed(1)
        model = Transformer(small_config(tokenizer.vocab_size))
        if self.kind == "lora":
            apply_lora(model, LoraConfig(rank=2, dropout=0.3), base="the seed", seed=5)
        data = self.open(tokens, tokenizer)
        assert 2 * data.train.steps_per_epoch < STEPS  # a third round has begun
        kind = "pretrain" if self.kind == "pretrain" else "sft"
        assert train(model, data, tokenizer, cfg, WORLD, run, kind, Objective(loss_function)) == 0
        return shown


def assert_same(found: Path, wanted: Path) -> None:
    """Two checkpoints hold the same, tensor for tensor and figure for figure."""
    assert found.name == wanted.name
    for file in sorted(wanted.glob("*.safetensors")):
        ours, theirs = load_file(found / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file.name
    states = [json.loads((path / "train_state.json").read_text()) for path in (found, wanted)]
    assert states[0] == states[1]


def figures(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in OF_TIME} for r in read_metrics(run)]


def resume_from_each(
    case: Case, points: list[int], root: Path, tokens: Path, tokenizer: Tokenizer
) -> None:
    """A run that nobody stops, and one that goes on from each of some of its checkpoints."""
    straight = root / "straight"
    straight.mkdir()
    shown = case.go(straight, tokens, tokenizer, save_every=1)
    data = case.open(tokens, tokenizer).train
    n_parts = [len(data.batches(step, 2)) for step in range(STEPS)]
    assert min(n_parts) > 1 and sum(n_parts) == len(shown)  # gradients are accumulated
    for point in points:
        again = root / f"from-{point}"
        shutil.copytree(straight, again)
        for later in list_checkpoints(again)[point:]:
            shutil.rmtree(later)
        rest = case.go(again, tokens, tokenizer, save_every=STEPS)
        wanted = shown[sum(n_parts[:point]) :]
        assert len(rest) == len(wanted) and all(map(torch.equal, rest, wanted))
        assert_same(list_checkpoints(again)[-1], list_checkpoints(straight)[-1])
        assert figures(again) == figures(straight)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_token_files(tmp_path_factory.mktemp("resume"), tokenizer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_from_the_base_with_its_optimizer_goes_on_as_if_it_were_one_run(
    optimizer, tmp_path, tokenizer
):
    # One row alone, so that every step of every run takes the same.
    for split in ("train", "val"):
        with TokenFileWriter(tmp_path / f"one/{split}-00000", "text", tokenizer) as writer:
            writer.add_text(np.arange(20, 60, dtype=np.uint16))
    data = open_data(
        DataConfig(sources=(SourceConfig(str(tmp_path / "one")),)), tokenizer, 128, TrainConfig()
    )

    def go(name: str, steps: int, base: Path | None = None, from_base: bool = False) -> Path:
        loop = TrainConfig(max_steps=steps, batch_size=1, save_every=100, keep_best=False)
        optim = OptimConfig(
            optimizer, lr=1e-2, warmup_steps=0, min_lr_ratio=1.0, from_base=from_base
        )
        torch.manual_seed(1)
        model = Transformer(small_config(tokenizer.vocab_size))
        if base:
            load_weights(model, load_file(base / "model.safetensors"), base)
        run = tmp_path / name
        run.mkdir()
        cfg = Settings(loop, DeviceConfig("cpu", "float32"), optim, base)
        assert train(model, data, tokenizer, cfg, WORLD, run, "pretrain") == 0
        return list_checkpoints(run)[-1]

    whole, first = go("whole", 7), go("first", 4)
    files = [
        load_file(step / "train_state.safetensors") | load_file(step / "model.safetensors")
        for step in (whole, go("rest", 3, first, from_base=True), go("fresh", 3, first))
    ]
    for tensors in files:
        del tensors["rng"]  # torch's is seeded by the step
    wanted, found, fresh = files
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(fresh[name], wanted[name]) for name in wanted)


def test_a_run_with_the_bases_optimizer_wants_a_base(tmp_path, tokens, tokenizer):
    data = Case("pretrain").open(tokens, tokenizer)
    cfg = Settings(TrainConfig(max_steps=1), DeviceConfig("cpu"), OptimConfig(from_base=True))
    model = Transformer(small_config(tokenizer.vocab_size))
    with pytest.raises(ConfigError, match=r"optim\.from_base wants a base"):
        train(model, data, tokenizer, cfg, WORLD, tmp_path, "pretrain")


@pytest.mark.slow
def test_each_of_ten_checkpoints_leads_to_the_same_end(tmp_path, tokens, tokenizer):
    resume_from_each(Case("pretrain"), list(range(1, STEPS)), tmp_path, tokens, tokenizer)


@pytest.mark.parametrize(
    "case",
    [
        Case("pretrain"),
        Case("sft"),
        Case("lora"),
        Case("pretrain", "float16"),
        Case("pretrain", optimizer="muon"),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_every_kind_of_run_resumes_to_the_same_end(case, tmp_path, tokens, tokenizer):
    resume_from_each(case, [7], tmp_path, tokens, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler for inductor"
)
@pytest.mark.filterwarnings("ignore")  # those of the compiler itself
@pytest.mark.parametrize("kind", SOURCES)
def test_compiled_runs_resume_to_the_same_end(kind, tmp_path, tokens, tokenizer):
    torch.compiler.reset()
    resume_from_each(Case(kind, compile=True), [4], tmp_path, tokens, tokenizer)


class Numbered:
    """A source whose rows are their numbers."""

    name = "numbered"
    files = ()

    def __init__(self, n_rows: int) -> None:
        self.dropped: dict[str, int] = {}
        self._n = n_rows

    def __len__(self) -> int:
        return self._n

    def row(self, number: int, _rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.full(8, number), np.full(8, number)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_processes_together_see_each_of_ten_thousand_rows_once_an_epoch(ranks):
    """And in the order of one process, whatever their number: it may change at any step."""
    n_rows, batch = 10_000, 40
    data = TrainData(Mixture([Numbered(n_rows)], [1.0], seed=1), batch, 8, pad_id=0)
    seen = []
    for step in range(n_rows // batch + 5):
        parts = [data.batches(step, 5, rank, ranks) for rank in range(ranks)]
        rows = [torch.cat([b["tokens"][:, 0] for b in part]).tolist() for part in parts]
        assert len({len(part) for part in rows}) == 1
        seen += [row for together in zip(*rows, strict=True) for row in together]
    assert sorted(seen[:n_rows]) == list(range(n_rows))
    assert seen[n_rows:] != seen[: 5 * batch]
    assert seen == [int(data.mixture.row(n)[0][0]) for n in range(n_rows + 5 * batch)]
