"""The training loop: a step does not depend on its split, bad numbers change nothing, and a run
that was killed or stopped ends with the weights of one that was not.

`write_run` (conftest) makes runs of ten steps in which an epoch ends inside the sixth or the
eighth step. Whatever kills, signals or compares runs starts the scripts as processes of their own.
"""

import json
import math
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from babyllama import log
from babyllama.analysis.watch import WATCH
from babyllama.checkpoint import load_model
from babyllama.config import BAD_NUMBERS, REPO, STOPPED, stop_requests
from babyllama.data import Data, Mixture, TrainData, ValData, collate, open_data
from babyllama.device import DeviceConfig, Scaler
from babyllama.distributed import World
from babyllama.errors import ConfigError, DataError
from babyllama.log import read_metrics, read_records
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.run_dir import MODEL_FILES, STATE_FILES, list_checkpoints, verify
from babyllama.sources import DataConfig, SourceConfig
from babyllama.token_file import TokenFileWriter
from babyllama.trainer import (
    Objective,
    TrainConfig,
    evaluate,
    forward_backward,
    total_steps,
    train,
)
from conftest import TEXTS, contents, save_model, small_config, write_run, write_token_files
from model import IGNORED, Loss, Transformer
from tokenizer import Tokenizer
from warm import Keeper, Process

WORLD = World(0, 1, torch.device("cpu"))
VOCAB, LENGTH = 97, 32
GOLDEN = Path(__file__).parents[1] / "golden/train_losses.json"


class Rows:
    """A source of rows that are too long to share a sequence, with masks of all sizes: row 0 is
    masked whole, row n has 2 n + 1 targets."""

    name = "rows"
    files = ()

    def __init__(self, n_rows: int = 16) -> None:
        self.dropped: dict[str, int] = {}
        self._n = n_rows

    def __len__(self) -> int:
        return self._n

    def row(self, number: int, _rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng(number).integers(3, VOCAB, LENGTH // 2 + 2 + number % 12)
        targets = ids[1:].copy()
        targets[2 * number + 1 if number else 0 :] = IGNORED
        return ids[:-1], targets


def rows_data(batch_size: int = 8, n_rows: int = 16) -> Data:
    source = Rows(n_rows)
    mixture = Mixture([source], [1.0], seed=0)
    return Data(
        TrainData(mixture, batch_size, LENGTH, pad_id=0), ValData([source], 5, LENGTH, pad_id=0)
    )


@dataclass(frozen=True)
class Settings:
    """What the loop reads of a script's config."""

    train: TrainConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, warmup_steps=2))
    device: DeviceConfig = field(default_factory=lambda: DeviceConfig("cpu", "float32"))
    base: Path | None = None


def rows_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(small_config(VOCAB, max_seq_len=LENGTH))


def gradients(batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sums and the gradients of one step of a fresh model."""
    model = rows_model()
    sums = forward_backward(model, batches, WORLD, Scaler(WORLD.device, "float32"))
    return sums, [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_does_not_depend_on_its_split_into_micro_batches(micro):
    data = rows_data().train
    whole, parts = data.batches(1, 8), data.batches(1, micro)
    assert (len(whole), len(parts)) == (1, 8 // micro)
    counts = [int((batch["targets"] >= 0).sum()) for batch in data.batches(1, 1)]
    assert len(set(counts)) > 4  # the masks are uneven
    wanted, wanted_gradients = gradients(whole)
    found, found_gradients = gradients(parts)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=1e-4, atol=1e-7)


def test_a_step_is_the_mean_over_all_its_targets():
    batches = rows_data().train.batches(0, 2)
    model = rows_model()
    losses = [model(**batch, per_position=True).flatten() for batch in batches]
    chosen = [(batch["targets"] >= 0).flatten() for batch in batches]
    mean = torch.cat([part[keep] for part, keep in zip(losses, chosen, strict=True)]).mean()
    wanted = torch.autograd.grad(mean, list(model.parameters()))
    sums, found = gradients(batches)
    assert float(sums[0] / sums[1]) == pytest.approx(float(mean.detach()), rel=1e-5)
    torch.testing.assert_close(found, list(wanted), rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_gives_a_finite_loss_and_no_gradient():
    batch = collate([[Rows().row(0, np.random.default_rng())] for _ in range(3)], pad_id=0)
    assert (batch["targets"] == IGNORED).all()
    sums, found = gradients([batch, batch])
    assert sums[:3].tolist() == [0, 0, 0]
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found)
    model = rows_model()
    before = [weight.clone() for weight in model.parameters()]
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.0))
    scaler = Scaler(WORLD.device, "float32")
    sums = forward_backward(model, [batch], WORLD, scaler)
    assert scaler.step(optimizer, list(model.parameters()), 1.0, float(sums[0])) == 0.0
    assert all(map(torch.equal, before, model.parameters()))


def test_a_row_without_targets_changes_no_gradient_of_the_others():
    rows = [[Rows().row(number, np.random.default_rng())] for number in (3, 0, 5, 9)]
    assert (rows[1][0][1] == IGNORED).all()
    wanted_sums, wanted = gradients([collate([rows[0], *rows[2:]], pad_id=0)])
    sums, found = gradients([collate(rows[:2], pad_id=0), collate(rows[2:], pad_id=0)])
    torch.testing.assert_close(sums[:3], wanted_sums[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_run_of_rows_without_targets_logs_no_loss(tmp_path, tokenizer):
    cfg = Settings(TrainConfig(max_steps=2, batch_size=1, log_every=1))
    data = rows_data(batch_size=1, n_rows=1)  # row 0 alone
    assert train(rows_model(), data, tokenizer, cfg, WORLD, tmp_path, "pretrain") == 0
    assert [r["kind"] for r in read_metrics(tmp_path)] == ["val", "val"]


def test_validation_is_the_mean_over_the_targets_of_all_rows():
    val, model = rows_data().val, rows_model()
    scaler = Scaler(WORLD.device, "float32")
    found = [evaluate(model, val, micro, scaler, WORLD) for micro in (1, 2, 5, 64)]
    batch = val.batches("rows", 5)[0]
    losses, chosen = model(**batch, per_position=True), batch["targets"] >= 0
    assert found[0]["n_targets"] == int(chosen.sum())
    for figures in found:
        assert figures["loss"] == pytest.approx(float(losses[chosen].mean().detach()), rel=1e-5)
        assert figures["ppl"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["sources"]["rows"] == pytest.approx(figures["loss"])
    assert model.training  # as it was


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf


FAULTS = {
    "loss and gradient": lambda loss: loss * math.nan,
    "loss alone": lambda loss: loss + math.inf,
    "gradient alone": _BadGradient.apply,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("bad_step", [1, 3, 4])
def test_a_step_with_bad_numbers_changes_no_weight(fault, bad_step, tmp_path, tokenizer, capfd):
    model, seen = rows_model(), []

    def loss_function(model: Transformer, batch: dict[str, torch.Tensor]) -> Loss:
        seen.append([weight.detach().clone() for weight in model.parameters()])
        loss = model(**batch)
        if len(seen) == bad_step:
            return loss._replace(loss_sum=FAULTS[fault](loss.loss_sum))
        return loss

    cfg = Settings(TrainConfig(max_steps=4, log_every=1, save_every=bad_step))
    code = train(
        model, rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft", Objective(loss_function)
    )
    assert code == 0
    seen.append(list(model.parameters()))
    changed = [not all(map(torch.equal, *pair)) for pair in pairwise(seen)]
    assert changed == [step != bad_step for step in range(1, 5)]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    said = capfd.readouterr().err
    assert f"step {bad_step}: loss" in said
    rows = [rows_data().train.mixture.place((bad_step - 1) * 8 + n)[2] for n in range(8)]
    assert f"its rows: {', '.join(f'rows {row}' for row in rows)}" in said
    steps = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert steps == [step for step in range(1, 5) if step != bad_step]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # JSON has no such number


def test_bad_numbers_in_a_row_stop_the_run_with_code_3(tmp_path, tokenizer, capfd):
    def loss_function(model: Transformer, batch: dict[str, torch.Tensor]) -> Loss:
        loss = model(**batch)
        return loss._replace(loss_sum=loss.loss_sum * math.nan)

    model = rows_model()
    before = [weight.detach().clone() for weight in model.parameters()]
    cfg = Settings(TrainConfig(max_steps=50, save_every=2, max_bad_steps=3))
    code = train(
        model, rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft", Objective(loss_function)
    )
    assert code == BAD_NUMBERS == 3
    assert all(map(torch.equal, before, model.parameters()))
    assert "3 steps in a row" in capfd.readouterr().err
    # The checkpoint of step 2 has no optimizer state yet; the run goes on from it all the same.
    cfg = Settings(TrainConfig(max_steps=4, save_every=2))
    assert train(rows_model(), rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft") == 0
    assert "continues at step 2" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["adamw", "muon", "lora"])
def test_twenty_losses_are_those_of_the_golden_curve(name, tmp_path, tokenizer):
    """Delete a curve from tests/golden/train_losses.json and run this test: it writes the curve
    and fails."""
    loop = TrainConfig(max_steps=20, batch_size=8, micro_batch_size=3, log_every=1)
    model, optimizer = rows_model(), "muon" if name == "muon" else "adamw"
    if name == "lora":
        apply_lora(model, LoraConfig(targets=("wq", "wv", "w2", "output")), base="the seed", seed=1)
    cfg = Settings(loop, OptimConfig(optimizer, lr=1e-2, warmup_steps=2))
    train(model, rows_data(), tokenizer, cfg, WORLD, tmp_path, "pretrain")
    losses = [r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    golden = json.loads(GOLDEN.read_text())
    if name not in golden:
        golden[name] = [round(loss, 6) for loss in losses]
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was written; look at it and run the test again")
    assert losses == pytest.approx(golden[name], abs=1e-4)
    assert losses[-1] < losses[0] - 0.2  # something is learnt


def trained(run: Path, tokenizer: Tokenizer, **changes: object) -> list[float]:
    """The losses of ten steps."""
    run.mkdir()
    cfg = Settings(TrainConfig(**{"max_steps": 10, "log_every": 1, **changes}))
    assert train(rows_model(), rows_data(), tokenizer, cfg, WORLD, run, "pretrain") == 0
    return [r["loss"] for r in read_metrics(run) if r["kind"] == "train"]


def test_recomputing_activations_changes_no_bit(tmp_path, tokenizer):
    plain = trained(tmp_path / "plain", tokenizer)
    assert trained(tmp_path / "again", tokenizer, recompute=True) == plain
    assert_same_state(tmp_path / "again", tmp_path / "plain")


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler for inductor"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler itself
def test_compiled_layers_train_alike_and_keep_their_names(tmp_path, tokenizer):
    plain = trained(tmp_path / "plain", tokenizer)
    for changes in ({"compile": True}, {"compile": True, "recompute": True}):
        run = tmp_path / f"compiled-{len(changes)}"
        assert trained(run, tokenizer, **changes) == pytest.approx(plain, abs=1e-5)
        names = [load_file(list_checkpoints(r)[-1] / "model.safetensors").keys()
                 for r in (run, tmp_path / "plain")]  # fmt: skip
        assert names[0] == names[1]


def test_without_a_compiler_compiling_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train\.compile needs a C\+\+ compiler"):
        trained(tmp_path / "run", tokenizer, compile=True)


def test_the_best_weights_are_kept_apart_and_survive_a_restart(tmp_path, tokenizer):
    trained(tmp_path / "run", tokenizer, eval_every=2, save_every=5, keep=1)
    val = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "val"}
    best = min(list(val)[1:], key=val.get)
    found = yaml.safe_load((tmp_path / "run/best/model.yaml").read_text())
    assert (found["step"], found["val_loss"]) == (best, val[best])
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000010"]
    state = json.loads((list_checkpoints(tmp_path / "run")[0] / "train_state.json").read_text())
    assert state["best"] == val[best]
    assert not list((tmp_path / "run").glob("tmp-*"))
    verify(tmp_path / "run/best", MODEL_FILES)
    trained(tmp_path / "without", tokenizer, keep_best=False)
    assert not (tmp_path / "without/best").exists()


def test_a_worse_step_does_not_replace_the_best(tmp_path, tokenizer):
    """After two steps the learning rate is absurd, and what follows is worse."""
    cfg = Settings(
        TrainConfig(max_steps=6, eval_every=1),
        OptimConfig(lr=3.0, warmup_steps=3),
    )
    train(rows_model(), rows_data(), tokenizer, cfg, WORLD, tmp_path, "pretrain")
    val = [r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "val"][1:]
    assert val[-1] > min(val)
    found = yaml.safe_load((tmp_path / "best/model.yaml").read_text())
    assert found["val_loss"] == min(val) and found["step"] == 1 + val.index(min(val))


def test_token_files_made_anew_are_noticed_when_a_run_goes_on(
    tmp_path, token_root, tokenizer, script
):
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer, max_steps=2)
    assert script("pretrain.py", "--config", config).code == 0
    write_token_files(tmp_path, tokenizer)  # the same again: nothing to notice
    assert script("pretrain.py", "--config", config).code == 0
    with TokenFileWriter(token_root / "text/train-00000", "text", tokenizer) as file:
        for _ in range(40):
            file.add_text([*tokenizer.encode(TEXTS[0] * 3), tokenizer.eos_id])
    found = script("pretrain.py", "--config", config)
    assert "trained on other token files" in found.error and "--base" in found.error


def test_token_files_removed_while_a_run_reads_them_do_not_stop_it(tmp_path, token_root, tokenizer):
    """The ids stay mapped until the run ends, and the next start says what is missing."""
    sources = DataConfig(sources=(SourceConfig(str(token_root / "text")),))
    cfg = Settings(TrainConfig(max_steps=6, batch_size=4, micro_batch_size=4, log_every=1))
    data = open_data(sources, tokenizer, 32, cfg.train)
    model = Transformer(small_config(tokenizer.vocab_size, max_seq_len=32))

    def loss_function(model: Transformer, batch: dict[str, torch.Tensor]) -> Loss:
        for path in token_root.glob("text/*"):
            path.unlink()
        return model(**batch)

    (tmp_path / "run").mkdir()
    code = train(
        model, data, tokenizer, cfg, WORLD, tmp_path / "run", "pretrain", Objective(loss_function)
    )
    assert code == 0 and logged(tmp_path / "run", "train") == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match=r"wanted token files, found none in .*; make them"):
        open_data(sources, tokenizer, 32, cfg.train)


DOUBTS = {
    "a warm-up that does not end": ({"warmup_steps": 50}, {}, "--optim.warmup_steps 0"),
    "a rate that moves nothing": ({"lr": 1e-9, "warmup_steps": 0}, {}, "its loss did not fall"),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_run_that_learnt_nothing_is_not_called_done(name, tmp_path, tokenizer, capfd):
    optim, loop, words = DOUBTS[name]
    cfg = Settings(TrainConfig(max_steps=6, log_every=1, **loop), OptimConfig(**optim))
    assert train(rows_model(), rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft") == 0
    said, then = capfd.readouterr().err.splitlines()[-2:]
    assert said.startswith("warning: finished, but") and words in said
    assert then.startswith("talk to it: python chat.py ")


def test_samples_of_fixed_prompts_are_kept_at_each_evaluation(
    tmp_path, token_root, tokenizer, capfd
):
    sources = DataConfig(sources=(SourceConfig(str(token_root / "text")),))
    prompts = ("今天", "很长的话" * 99)  # the second one leaves no room for a reply
    cfg = Settings(TrainConfig(max_steps=2, batch_size=4, eval_every=1, samples=prompts))
    for kind in ("pretrain", "sft"):
        data = open_data(sources, tokenizer, 128, cfg.train)
        (tmp_path / kind).mkdir()
        model = Transformer(small_config(tokenizer.vocab_size))
        train(model, data, tokenizer, cfg, WORLD, tmp_path / kind, kind)
        assert "今天 → " in capfd.readouterr().err  # and shown as they come
        found = read_records(tmp_path / kind / "samples.jsonl")
        assert [(r["step"], r["prompt"]) for r in found] == [(n, "今天") for n in range(3)]
        assert all(isinstance(r["reply"], str) for r in found)
        val = [r for r in read_metrics(tmp_path / kind) if r["kind"] == "val"]
        for record in val:  # bits: of the loss; bytes: fewer tokens than bytes in Chinese
            assert 0 < record["bpb"] < record["loss"] / math.log(2)


def test_validation_is_in_bits_per_byte_of_the_text(token_root, tokenizer):
    sources = DataConfig(sources=(SourceConfig(str(token_root / "text")),))
    data = open_data(sources, tokenizer, 64, TrainConfig())
    model = Transformer(small_config(tokenizer.vocab_size))
    scaler = Scaler(WORLD.device, "float32")
    found = evaluate(model, data.val, 7, scaler, WORLD, tokenizer)
    targets = [b["targets"] for b in data.val.batches(data.val.names[0], 7)]
    ids = torch.cat([t[t != IGNORED] for t in targets]).tolist()
    text = len(tokenizer.decode(ids).encode())
    assert found["bpb"] == pytest.approx(found["loss"] * len(ids) / text / math.log(2))


def test_the_second_request_to_stop_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as asked:
        assert not asked
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(tmp_path, tokenizer, monkeypatch):
    """With a drawing at each evaluation; the first one, which loads matplotlib, before any step."""
    monkeypatch.setattr(log, "_REDRAW_S", 0)
    loop = TrainConfig(max_steps=2000, batch_size=8, micro_batch_size=4, log_every=20,
                       eval_every=100, save_every=100)  # fmt: skip
    used = []

    def loss_function(model: Transformer, batch: dict[str, torch.Tensor]) -> Loss:
        used.append(psutil.Process().memory_info().rss / 1e9)
        return model(**batch)

    cfg = Settings(loop)
    train(
        rows_model(),
        rows_data(),
        tokenizer,
        cfg,
        WORLD,
        tmp_path,
        "pretrain",
        Objective(loss_function),
        watch=WATCH,
    )
    per_step = len(used) // 2000
    print({step: used[step * per_step - 1] for step in (1, 100, 200, 500, 1000, 1500, 2000)})
    assert (tmp_path / "curves.png").is_file()
    assert used[-1] - used[200 * per_step] < 0.02


def test_a_run_lasts_max_steps_or_its_epochs():
    data = rows_data(batch_size=8, n_rows=20).train
    assert total_steps(TrainConfig(max_steps=7), data) == 7
    assert total_steps(TrainConfig(epochs=2.0), data) == 5
    assert total_steps(TrainConfig(epochs=0.01), data) == 1


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"keep": 0}, {"max_steps": -1}, {"epochs": 0.0}, {"seed": -1},
              {"epochs": math.nan}, {"epochs": math.inf}]
)  # fmt: skip
def test_settings_of_the_loop_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


# From here on: whole scripts, as a user starts them.


class Place(NamedTuple):
    """Where the runs of these tests lie, and what they read."""

    root: Path
    tokens: Path
    tokenizer: Tokenizer
    base: Path  # a pretraining checkpoint with the shape of `write_run`


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Place:
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    model = Transformer(small_config(tokenizer.vocab_size))
    base = save_model(root / "base", model, tokenizer, "pretrain")
    return Place(root, write_token_files(root, tokenizer), tokenizer, base)


FLAGS = {"lora": ["--lora.rank", "4", "--lora.dropout", "0.2"]}
KINDS = ("pretrain", "lora")


def command(place: Place, kind: str, name: str, **train: int) -> list[str]:
    """A run's command line; its directory is place.root / name."""
    tokenizer = place.tokenizer if kind == "pretrain" else None
    config = write_run(place.root / f"{name}.yaml", place.tokens, tokenizer, **train)
    base = [] if tokenizer else ["--base", str(place.base)]
    script = REPO / ("pretrain.py" if tokenizer else "sft.py")
    return [str(script), "--config", str(config), *base, *FLAGS.get(kind, [])]


@pytest.fixture(scope="module")
def start(keeper: Keeper) -> Iterator[Callable[[list[str]], Process]]:
    """Starts a script, from a directory of no meaning; what still runs is ended at the end."""
    started: list[Process] = []

    def begin(words: list[str]) -> Process:
        started.append(keeper.start(words, tempfile.gettempdir()))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def finish(process: Process) -> str:
    """Wait for a run that must succeed; returns what it said."""
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def until(process: Process, words: str) -> str:
    """Read what a process says up to a line with these words; returns all of it."""
    said = ""
    for line in process.said:
        said += line
        if words in line:
            return said
    pytest.fail(f"{words!r} was never said:\n{said}")


def kill(process: Process) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_state(found: Path, wanted: Path) -> None:
    """The newest checkpoints of two runs hold the same weights and the same optimizer state."""
    one, other = list_checkpoints(found)[-1], list_checkpoints(wanted)[-1]
    assert one.name == other.name
    files = sorted(path.name for path in other.glob("*.safetensors"))
    assert len(files) == 2 and files == sorted(path.name for path in one.glob("*.safetensors"))
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = (path / "train_state.json" for path in (one, other))
    assert len({json.dumps(json.loads(path.read_text()), sort_keys=True) for path in steps}) == 1


def assert_whole(run: Path) -> None:
    """Every checkpoint of the run can be loaded, training state included."""
    for step in list_checkpoints(run):
        verify(step, MODEL_FILES + STATE_FILES)
        load_model(step)


def logged(run: Path, kind: str) -> list[int]:
    return [r["step"] for r in read_metrics(run) if r["kind"] == kind]


@pytest.fixture(scope="module")
def straight(place: Place, start: Callable) -> Callable[[str], Path]:
    """Runs that nobody interrupts, started at once and waited for when they are asked for."""
    running = {kind: start(command(place, kind, f"straight-{kind}")) for kind in KINDS}

    def wait(kind: str) -> Path:
        if kind in running:
            finish(running.pop(kind))
        return place.root / f"straight-{kind}"

    return wait


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_five_kill_and_five(kind, place, straight, start):
    arguments, run = command(place, kind, f"killed-{kind}"), place.root / f"killed-{kind}"
    process = start(arguments)
    until(process, "train step 7/10")
    kill(process)
    assert [step.name for step in list_checkpoints(run)] == ["step-000005"]
    assert "continues at step 5" in finish(start(arguments))
    assert_same_state(run, straight(kind))
    assert logged(run, "train") == list(range(1, 11))
    assert logged(run, "val") == [0, 5, 10]
    assert not list(run.glob("tmp-*"))


def test_a_run_that_is_stopped_saves_says_how_to_go_on_and_ends_as_if_it_had_not_been(
    place, straight, start
):
    arguments, run = command(place, "pretrain", "stopped"), place.root / "stopped"
    for number, words in ((signal.SIGTERM, "train step 1/10"), (signal.SIGINT, "train step 6/10")):
        process = start(arguments)
        until(process, words)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == STOPPED == 75
        step = int(list_checkpoints(run)[-1].name[5:])
        assert step >= int(words.split()[2].split("/")[0])
        assert f"stopped at step {step} of 10, saved; the same command continues" in said
        assert "Traceback" not in said
        assert_whole(run)
    finish(start(arguments))
    assert_same_state(run, straight("pretrain"))
    assert logged(run, "train") == list(range(1, 11))


@pytest.mark.slow
def test_ten_requests_to_stop_cost_nothing(place, start):
    sizes = {"max_steps": 200, "eval_every": 50, "save_every": 500}
    finish(start(command(place, "pretrain", "unstopped", **sizes)))
    arguments, run = command(place, "pretrain", "stopped-often", **sizes), place.root
    step = 0
    for number in range(10):
        process = start(arguments)
        until(process, f"train step {step + 1}/200")
        process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2])
        said = process.communicate()[1]
        assert process.returncode == STOPPED, said
        step = int(list_checkpoints(run / "stopped-often")[-1].name[5:])
        assert f"stopped at step {step} of 200, saved; the same command continues" in said
    finish(start(arguments))
    assert_same_state(run / "stopped-often", run / "unstopped")
    assert logged(run / "stopped-often", "train") == list(range(1, 201))


def kill_at_random(
    place: Place, start: Callable, wanted: Path, n_kills: int, save_every: int, seed: int
) -> None:
    """Kill runs at random moments until there were as many kills, none of which may cost more than
    `save_every` steps; runs that end are compared with one that nobody interrupted, and another is
    begun."""
    chance = random.Random(seed)
    done = finished = most_lost = 0
    while done < n_kills or not finished:
        name = f"random-{n_kills}-{finished}"
        arguments = command(place, "pretrain", name, eval_every=4, save_every=save_every)
        run = place.root / name
        process = start(arguments)
        if not done:  # before the first checkpoint
            until(process, "train step 1/10")
            process.kill()
        elif done < n_kills:
            until(process, name)  # the first line that a run says
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0, 2))
            process.kill()
        said = process.communicate()[1]
        assert_whole(run)
        if process.returncode == -signal.SIGKILL:
            done += 1
            saved = [int(step.name[5:]) for step in list_checkpoints(run)]
            lost = max(logged(run, "train"), default=0) - max(saved, default=0)
            assert lost <= save_every
            most_lost = max(most_lost, lost)
            continue
        assert process.returncode == 0, said
        assert_same_state(run, wanted)
        assert logged(run, "train") == list(range(1, 11))
        assert not list(run.glob("tmp-*step-*"))
        finished += 1
    print(f"{done} kills, {finished} runs finished, {most_lost} steps lost at most")


def test_kills_at_random_moments_tear_nothing(place, start, straight):
    kill_at_random(place, start, straight("pretrain"), 3, save_every=4, seed=int(time.time()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments_tear_nothing(place, start, straight):
    kill_at_random(place, start, straight("pretrain"), 50, save_every=1, seed=0)


def test_a_finished_run_says_so_and_another_config_is_refused_with_the_differences(
    place, straight, script
):
    run = straight("pretrain")
    before = contents(run)
    config = ["--config", place.root / "straight-pretrain.yaml"]
    found = script("pretrain.py", *config)
    assert (found.code, found.out) == (0, "")
    assert "is finished: 10 of 10 steps; nothing to do" in found.err

    found = script(
        "pretrain.py", *config, "--optim.lr", "0.5", "--train.seed", "3", "--model.dim", "64"
    )
    assert found.code == 2
    assert found.err.startswith("error: ")
    assert found.err.splitlines()[1:] == [
        "  optim.lr: saved 0.01, now 0.5",
        "  train.seed: saved 0, now 3",
        "  model.dim: saved 32, now 64",
    ]
    assert contents(run) == before

    free = ("--train.save_every", "3", "--train.log_every=2", "--train.micro_batch_size", "1")
    assert script("pretrain.py", *config, *free).code == 0
    assert "is finished" in script("pretrain.py", *config).err


def test_the_saved_config_starts_the_same_run_again(place, straight, script):
    run = straight("pretrain")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["vocab_size"] == place.tokenizer.vocab_size
    assert "is finished" in script("pretrain.py", "--config", run / "config.yaml").err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on Windows")
def test_a_closed_terminal_saves_first_and_a_dead_pipe_is_no_end(place, straight, start):
    arguments, run = command(place, "pretrain", "hung-up"), place.root / "hung-up"
    process = start(arguments)
    until(process, "train step 2/10")
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == STOPPED and list_checkpoints(run)
    process = start(arguments)
    process.said.close()
    assert process.wait() == 0
    assert_same_state(run, straight("pretrain"))
    assert logged(run, "train") == list(range(1, 11))


def test_what_a_kill_after_the_last_checkpoint_left_is_tidied(place, script, tmp_path):
    config = write_run(tmp_path / "run.yaml", place.tokens, place.tokenizer, max_steps=2)
    assert script("pretrain.py", "--config", config).code == 0
    run = tmp_path / "run"
    before = contents(run)
    (run / "curves.png").unlink()
    (run / "tmp-curves.png").write_bytes(b"half")
    (run / "tmp-old-step-000001").mkdir()
    (run / "tmp-best").mkdir()
    found = script("pretrain.py", "--config", config)
    assert found.code == 0 and "is finished" in found.err
    assert contents(run).keys() == before.keys()
    assert not list(run.glob("tmp-*"))


def test_a_config_that_was_edited_by_hand_is_compared_and_a_damaged_one_refused(
    place, script, tmp_path
):
    config = write_run(tmp_path / "run.yaml", place.tokens, place.tokenizer, max_steps=1)
    assert script("pretrain.py", "--config", config).code == 0
    saved = tmp_path / "run/config.yaml"
    whole = saved.read_text()
    for text in ("optim: 5", "train: [1]", "name: 2024-01-31", "model: {dim: {}}"):
        saved.write_text(whole + text)  # the later one of two keys holds
        found = script("pretrain.py", "--config", config)
        assert found.error and text.partition(":")[0] in found.err and "saved" in found.err
    for text in ("name: [", "5", "", "\x00"):
        saved.write_text(text)
        assert "config.yaml" in script("pretrain.py", "--config", config).error
        assert saved.read_text() == text


def test_a_run_whose_last_steps_had_bad_numbers_is_no_success(tmp_path, tokenizer):
    model, n_steps = rows_model(), 0

    def loss_function(model: torch.nn.Module, batch: dict) -> Loss:
        nonlocal n_steps
        n_steps += 1
        loss = model(**batch)
        return loss._replace(loss_sum=loss.loss_sum * math.inf) if n_steps > 1 else loss

    cfg = Settings(TrainConfig(max_steps=3))
    assert (
        train(model, rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft", Objective(loss_function))
        == 3
    )


def test_a_validation_that_is_no_number_is_no_success(tmp_path, tokenizer):
    def measure(model: torch.nn.Module, batch: dict) -> Loss:
        loss = model(**batch)
        return loss._replace(loss_sum=loss.loss_sum * math.nan)

    cfg, objective = Settings(TrainConfig(max_steps=1)), Objective(measure=measure)
    assert train(rows_model(), rows_data(), tokenizer, cfg, WORLD, tmp_path, "sft", objective) == 3
