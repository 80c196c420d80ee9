"""Two processes train as one does: same losses, same weights, and checkpoints that cross over.

The launcher is torchrun, as a user starts it; engine gloo on the CPU, float32. Masks are uneven and
each update takes several micro-batches of each process.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from babyllama.checkpoint import Snapshot, save_checkpoint
from babyllama.config import REPO
from babyllama.distributed import World, no_sync, start
from babyllama.log import read_metrics
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.run_dir import list_checkpoints
from conftest import Outcome, small_config, write_run, write_token_files
from model import Transformer
from tokenizer import Tokenizer

STEPS = 12


class Place(NamedTuple):
    root: Path
    one: tuple[str, ...]  # sft.py's command line of the run of one process
    two: tuple[str, ...]  # and of the run of two


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Place:
    root = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(1)
    model = Transformer(small_config(tokenizer.vocab_size))
    optimizer = make_optimizer(model, OptimConfig())
    extra = {"tokens": 0, "scaler": {}}
    base = save_checkpoint(
        Snapshot(root / "base", model, tokenizer, "pretrain", optimizer=optimizer, extra=extra), 1
    )
    tokens = write_token_files(root, tokenizer)
    lines = [
        (
            "sft.py",
            "--config",
            str(write_run(root / f"{name}.yaml", tokens, max_steps=STEPS, save_every=6)),
            "--base",
            str(base),
            "--optim.lr",
            "0.002",
        )
        for name in ("one", "two")
    ]
    return Place(root, *lines)


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(line: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Run a script in two processes."""
    return subprocess.run(
        [*LAUNCHER, str(REPO / line[0]), *line[1:]],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(place: Place) -> Iterator[Callable[[], tuple[Path, Path]]]:
    """Both runs, made side by side."""
    alone = subprocess.Popen(
        [sys.executable, str(REPO / place.one[0]), *place.one[1:]],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    together = torchrun(place.two)
    said = alone.communicate()[1]
    assert alone.returncode == 0, said
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("2 process(es) on cpu") == 1  # one of them speaks
    yield place.root / "one", place.root / "two"


def losses(run: Path, kind: str) -> list[float]:
    return [r["loss"] for r in read_metrics(run) if r["kind"] == kind]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    last = list_checkpoints(run)[-1]
    assert last.name == f"step-{STEPS:06d}"
    return load_file(last / "model.safetensors")


def test_two_processes_give_the_losses_and_weights_of_one(runs: tuple[Path, Path]) -> None:
    one, two = runs
    for kind, count in (("train", STEPS), ("val", 4)):
        assert len(losses(one, kind)) == count
        assert losses(two, kind) == pytest.approx(losses(one, kind), abs=1e-5)
    for key in ("n_targets", "tokens", "accuracy", "lr"):
        wanted = [r[key] for r in read_metrics(one) if r["kind"] == "train"]
        found = [r[key] for r in read_metrics(two) if r["kind"] == "train"]
        if key == "tokens":  # filler included, which the split decides
            assert found[-1] > 0
        else:
            assert found == pytest.approx(wanted)
    assert losses(one, "train")[-1] < losses(one, "train")[0] - 0.1
    torch.testing.assert_close(final_weights(two), final_weights(one), rtol=0, atol=1e-5)


def back_to_step_6(run: Path, wanted: Path) -> None:
    """Take a run's later checkpoint away; what is left was saved by its own processes."""
    shutil.copytree(run, wanted)
    shutil.rmtree(run / f"step-{STEPS:06d}")
    assert [p.name for p in list_checkpoints(run)] == ["step-000006"]


def test_a_checkpoint_crosses_over(
    runs: tuple[Path, Path], place: Place, script: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Saved by two processes and resumed by one, and the other way round."""
    for run in runs:
        back_to_step_6(run, tmp_path / run.name)
    resumed = script(*place.two)
    assert resumed.code == 0 and "continues at step 6" in resumed.err
    together = torchrun(place.one)
    assert together.returncode == 0 and "continues at step 6" in together.stderr
    for run in runs:
        assert losses(run, "train") == pytest.approx(losses(tmp_path / run.name, "train"), abs=1e-5)
        torch.testing.assert_close(
            final_weights(run), final_weights(tmp_path / run.name), rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_bad_input_ends_both_processes_with_code_2(place: Place) -> None:
    """torchrun itself then ends with 1; what the processes said stands above its report."""
    found = torchrun((*place.one, "--optim.lr=-1"))
    assert found.returncode == 1
    assert "error: optim.lr wants a number above 0, found -1.0" in found.stderr
    assert "exitcode  : 2" in found.stderr


def test_alone_there_is_one_process_and_nothing_to_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with start(torch.device("cpu")) as world:
        assert world == World(0, 1, torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert world.is_main and world.wrap(model) is model
    assert world.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (world.any(True), world.any(False)) == (True, False)
    with no_sync(model, is_last=False):
        pass


BAD_RANK = """
import sys, torch
import sft
from babyllama import trainer
from babyllama.config import parse, run

calls = 0

def loss_function(model, batch):
    global calls
    calls += 1
    loss = model(**batch)
    is_bad = torch.distributed.get_rank() == 1 and calls == 5
    return loss._replace(loss_sum=loss.loss_sum * torch.nan) if is_bad else loss

def train(*args):
    return trainer.train(*args[:7], objective=trainer.Objective(loss_function))

sft.train = train
run(sft.main, parse(sft.SftConfig, ""))
"""


@pytest.mark.slow
def test_bad_numbers_of_one_process_change_no_weight_of_any(place: Place) -> None:
    (place.root / "bad.py").write_text(BAD_RANK)
    found = subprocess.run(
        [*LAUNCHER, place.root / "bad.py", *place.one[1:], "--name", place.root / "bad"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert len(re.findall("loss nan.*changed nothing", found.stderr)) == 1
    assert all(torch.isfinite(t).all() for t in final_weights(place.root / "bad").values())
    assert len(losses(place.root / "bad", "train")) == STEPS - 1


def started(place: Place, name: str) -> tuple[subprocess.Popen, list[int]]:
    """A run of two processes that has made a step, and the ids of both."""
    line = (*place.one, "--name", str(place.root / name), "--train.max_steps", "100000")
    process = subprocess.Popen(
        [*LAUNCHER, str(REPO / line[0]), *line[1:]],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for text in process.stderr:
        if "train step 2/" in text:
            break
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout
    return process, [int(number) for number in children.split()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep to find the processes")
def test_when_one_process_dies_the_job_ends_within_a_minute(place: Place) -> None:
    process, children = started(place, "dies")
    begun = time.perf_counter()
    os.kill(children[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.perf_counter() - begun < 60


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep to find the processes")
def test_a_request_to_stop_saves_once_for_all_processes(place: Place) -> None:
    process, _ = started(place, "stops")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert said.count("saved; the same command continues") == 1
    (step,) = list_checkpoints(place.root / "stops")[-1:]
    assert f"stopped at step {int(step.name[5:])} of 100000" in said
