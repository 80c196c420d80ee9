"""DDP and FSDP2 in two processes train as one process does, and read each other's checkpoints.

One launch of torchrun makes every run of two processes (gloo, CPU); those of one process are made
here. Masks are uneven, a process may have none at all, and a step takes several micro-batches.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from babyllama.checkpoint import model_weights
from babyllama.config import REPO
from babyllama.device import DeviceConfig
from babyllama.distributed import (
    PATIENCE,
    ParallelConfig,
    World,
    no_sync,
    own_card,
    start,
    whole,
)
from babyllama.errors import ConfigError
from babyllama.log import read_metrics
from babyllama.optim import OptimConfig
from babyllama.run_dir import list_checkpoints, open_run
from babyllama.trainer import Objective, TrainConfig, forward_backward, samples, train
from model import Loss
from test_trainer import FAULTS, WORLD, Settings, rows_data, rows_model
from tokenizer import Tokenizer

STEPS = 20
ENGINES = ("ddp", "fsdp2")


def settings(name: str = "adamw", steps: int = STEPS, **device: str) -> Settings:
    loop = TrainConfig(
        max_steps=steps, batch_size=8, micro_batch_size=2, log_every=1,
        eval_every=4 if name == "muon" else 10, save_every=10,
    )  # fmt: skip
    optim = OptimConfig(name=name, lr=1e-2, warmup_steps=2)
    return Settings(loop, optim, DeviceConfig("cpu", **({"precision": "float32"} | device)))


def make(root: Path, name: str, cfg: Settings, tokenizer: Tokenizer, world: World) -> None:
    assert train(rows_model(), rows_data(), tokenizer, cfg, world, root / name, "pretrain") == 0


def double_steps(world: World, n_steps: int = 10) -> dict[str, torch.Tensor]:
    """The weights after some steps in float64, and the norms of the gradients."""
    from babyllama.device import Scaler
    from babyllama.optim import make_optimizer

    def loss_function(model: torch.nn.Module, batch: dict) -> Loss:
        logits = model(batch["tokens"], segments=batch.get("segments"))
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        return Loss(loss, (batch["targets"] >= 0).sum(), torch.tensor(0))

    model = rows_model().double()
    wrapped = world.wrap(model)
    optimizer = make_optimizer(model, OptimConfig())
    scaler, norms = Scaler(world.device, "float32"), []
    for step in range(n_steps):
        batches = rows_data().train.batches(step, 2, world.rank, world.size)
        forward_backward(wrapped, batches, world, scaler, Objective(loss_function))
        norms.append(scaler.step(optimizer, list(model.parameters()), 1.0))
    weights = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    return {**weights, "norms": torch.tensor(norms, dtype=torch.float64)}


def worker(root: Path, tokenizer: Tokenizer) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    with start(torch.device("cpu"), ParallelConfig(timeout_s=40)) as world:
        worlds = {engine: replace(world, engine=engine) for engine in ENGINES}
        for engine, other in zip(ENGINES, reversed(ENGINES), strict=True):
            make(root, engine, settings(), tokenizer, worlds[engine])
            make(root, f"muon-{engine}", settings("muon", 10), tokenizer, worlds[engine])
            half = settings(precision="float16", steps=10)
            make(root, f"float16-{engine}", half, tokenizer, worlds[engine])
            double = double_steps(worlds[engine])
            if world.is_main:
                torch.save(double, root / f"double-{engine}.pt")
            name = f"{engine}-then-{other}"
            world.on_main(lambda engine=engine, name=name: half_of(root / engine, root / name))
            make(root, name, settings(), tokenizer, worlds[other])
            gathered_by_main(
                root / f"gathered-{engine}-{world.rank}.json", tokenizer, worlds[engine]
            )
            bad_rank(root / f"bad-{engine}", tokenizer, worlds[engine])
            found = json.dumps(exchanges(worlds[engine]))
            (root / f"exchanges-{engine}-{world.rank}.json").write_text(found)
        world.on_main(lambda: half_of(root / "one", root / "one-then-ddp"))
        make(root, "one-then-ddp", settings(), tokenizer, world)
        held_lock(root / "held", world)


def half_of(run: Path, copy: Path) -> None:
    """A copy of a run as it was when half of its steps were made."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / f"step-{STEPS:06d}")


# The steps in which one process has a number that is none, and where.
BAD = {1: "loss alone", 3: "gradient alone", 4: "loss and gradient", 7: "gradient alone",
       9: "loss alone"}  # fmt: skip


def bad_rank(run: Path, tokenizer: Tokenizer, world: World) -> None:
    """In the second of a step's two micro-batches, in one process alone."""
    calls = 0

    def loss_function(model: torch.nn.Module, batch: dict) -> Loss:
        nonlocal calls
        calls += 1
        loss, step = model(**batch), calls // 2
        if world.rank == 0 or calls % 2 or step not in BAD:
            return loss
        return loss._replace(loss_sum=FAULTS[BAD[step]](loss.loss_sum))

    data, cfg = rows_data(), settings(steps=10)
    assert (
        train(rows_model(), data, tokenizer, cfg, world, run, "sft", Objective(loss_function)) == 0
    )


def exchanges(world: World) -> list[bool]:
    """After each of three micro-batches: whether the processes hold the same gradient by then.

    Each has a batch of its own. Of a share (fsdp2) there is no gradient before the exchange.
    """
    model = rows_model()
    wrapped, found = world.wrap(model), []
    for number in range(3):
        tokens = torch.randint(3, 90, (1, 16), generator=torch.manual_seed(9 * world.rank + number))
        with no_sync(wrapped, is_last=number == 2):
            wrapped(tokens=tokens, targets=tokens).loss_sum.backward()
        grad = model.layers[0].attention.wq.weight.grad
        if grad is None:
            found.append(False)
            continue
        mine = whole(grad).detach().clone()
        total = mine.clone()
        torch.distributed.all_reduce(total)
        found.append(bool(torch.allclose(total, world.size * mine, rtol=1e-5)))
    return found


def gathered_by_main(out: Path, tokenizer: Tokenizer, world: World) -> None:
    """Which process gets the whole weights, and who writes samples; how long each group waits."""
    model = rows_model()
    wanted = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    world.wrap(model)
    found = model_weights(model, world.is_main)
    said = samples(model, tokenizer, [""], "pretrain", 3)
    waits = [
        group._get_backend(world.device).options._timeout.total_seconds()
        for group in (torch.distributed.group.WORLD, world.patient)
    ]
    same = found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    out.write_text(json.dumps([same, len(found), len(said), waits]))


def held_lock(run: Path, world: World) -> None:
    """The main process holds the run for all; a second start is refused in all of them."""
    with open_run(str(run), Settings(TrainConfig()), world):
        try:
            with open_run(str(run), Settings(TrainConfig()), world):
                pass
        except (ConfigError, SystemExit) as error:
            said = str(error)
    with open(run / f"refused-{world.rank}.txt", "w") as file:
        file.write(said)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Every run, made."""
    root = tmp_path_factory.mktemp("engines")
    here = Path(__file__).parent
    (root / "worker.py").write_text(
        f"import sys\nsys.path[:0] = {[str(REPO), str(here), str(here.parent)]!r}\n"
        f"from pathlib import Path\nfrom test_engines import worker\n"
        f"from tokenizer import Tokenizer\n"
        f"worker(Path({str(root)!r}), Tokenizer({str(tokenizer.path)!r}))\n"
    )
    for name in ("one", "muon-one"):
        (root / name).mkdir()
    names = [f"{kind}{e}" for e in ENGINES for kind in ("", "muon-", "float16-", "bad-")]
    for name in names:
        (root / name).mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    make(root, "one", settings(), tokenizer, WORLD)
    make(root, "muon-one", settings("muon", 10), tokenizer, WORLD)
    torch.save(double_steps(WORLD), root / "double-one.pt")
    together = subprocess.run(
        [*launcher, root / "worker.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=280,
    )  # fmt: skip
    assert together.returncode == 0, together.stdout
    half_of(root / "ddp", root / "ddp-then-one")
    make(root, "ddp-then-one", settings(), tokenizer, WORLD)
    return root


def losses(run: Path, kind: str = "train") -> list[float]:
    return [r["loss"] for r in read_metrics(run) if r["kind"] == kind]


def final(run: Path) -> dict[str, torch.Tensor]:
    last = list_checkpoints(run)[-1]
    state = load_file(last / "train_state.safetensors")
    return load_file(last / "model.safetensors") | state


@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_losses_and_the_final_state_are_those_of_one_process(engine, root):
    for kind in ("train", "val"):
        assert losses(root / engine, kind) == pytest.approx(losses(root / "one", kind), abs=1e-5)
    assert len(losses(root / "one")) == STEPS
    wanted, found = final(root / "one"), final(root / engine)
    assert wanted.keys() == found.keys()
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    norms = [[r["grad_norm"] for r in read_metrics(root / n) if "lr" in r] for n in (engine, "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_float64_weights_and_norms_differ_by_rounding_alone(engine, root):
    wanted, found = (torch.load(root / f"double-{name}.pt") for name in ("one", engine))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["ddp-then-fsdp2", "fsdp2-then-ddp", "one-then-ddp", "ddp-then-one"]
)
def test_a_checkpoint_of_one_engine_or_of_one_process_is_gone_on_from_by_another(name, root):
    assert losses(root / name) == pytest.approx(losses(root / "one"), abs=1e-5)
    torch.testing.assert_close(final(root / name), final(root / "one"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_muon_gives_the_losses_of_one_process(engine, root):
    for kind in ("train", "val"):
        found, wanted = losses(root / f"muon-{engine}", kind), losses(root / "muon-one", kind)
        assert found == pytest.approx(wanted, abs=1e-4)
    kept = final(root / f"muon-{engine}")
    assert any(key.endswith("momentum_buffer") for key in kept)


def test_float16_trains_alike_with_both_engines(root):
    ddp, fsdp2 = (losses(root / f"float16-{engine}") for engine in ENGINES)
    assert ddp == pytest.approx(fsdp2, abs=2e-2)
    assert ddp[-1] < ddp[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_numbers_of_one_process_change_no_weight_of_any(engine, root):
    run = root / f"bad-{engine}"
    good = [step for step in range(1, 11) if step not in BAD]
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == good
    assert all(
        torch.isfinite(tensor).all() for tensor in final(run).values() if tensor.is_floating_point()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_exchanged_after_the_last_micro_batch_alone(engine, root):
    for rank in range(2):
        found = json.loads((root / f"exchanges-{engine}-{rank}.json").read_text())
        assert found == [False, False, True]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_main_process_alone_holds_the_whole_weights_and_is_waited_for(engine, root):
    """Of shares: a card that holds only its own has no room for all."""
    main, other = (json.loads((root / f"gathered-{engine}-{n}.json").read_text()) for n in (0, 1))
    assert main[0] and main[1] > 10 and not other[0] and other[1] == 0
    assert main[2] == other[2] == (engine == "ddp")  # of a share no samples are drawn
    assert main[3] == other[3] == [40, PATIENCE.total_seconds()] and PATIENCE.total_seconds() > 3600


def test_alone_there_is_one_process_and_nothing_to_exchange(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with start(torch.device("cpu")) as world:
        assert world == WORLD
    model = torch.nn.Linear(2, 2)
    assert world.is_main and world.wrap(model) is model
    assert world.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (world.any(True), world.any(False)) == (True, False)
    with no_sync(model, is_last=False):
        pass


def test_what_the_main_process_does_for_all_is_waited_for_by_the_patient_group(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda _, group=None: asked.append(group))
    world = replace(WORLD, size=2, patient="patient")
    world.on_main(lambda: None)
    assert not world.any(False) and asked == ["patient", None]


def test_processes_with_cards_meet_over_nccl_each_bound_to_its_own(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(
        dist, "init_process_group", lambda name, **how: asked.update(how, name=name)
    )
    monkeypatch.setattr(dist, "new_group", lambda **how: how["backend"])
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with start(torch.device("cuda"), ParallelConfig(timeout_s=7)) as world:
        assert (world.rank, world.size, world.patient) == (1, 2, "gloo")
    own = torch.device("cuda", 1)
    assert world.device == asked["device"] == asked["device_id"] == own
    assert asked["name"] == "nccl" and asked["timeout"].total_seconds() == 7


def test_every_process_has_a_card_of_its_own():
    assert [own_card(str(n), "a run", 4) for n in range(4)] == [0, 1, 2, 3]
    assert own_card("3", None, 1) == own_card(None, None, 1) == 0  # Slurm shows each its own alone
    for local, torchrun, n_cards in (("1", "a run", 1), ("4", None, 4)):
        with pytest.raises(ConfigError, match=rf"found {n_cards} for process .*nproc_per_node"):
            own_card(local, torchrun, n_cards)


def test_a_held_run_is_refused_in_every_process(root):
    assert "is in use (process" in (root / "held/refused-0.txt").read_text()
    assert (root / "held/refused-1.txt").read_text() == "2"  # an exit code, without a word
