"""What holds on a CUDA card, shown without one: no devices mixed, and nobody waits in between.

On stand-in tensors (stand_in.py); benchmarks/card.py shows the rest where there is a card.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from babyllama.cpu.fused import fuse
from babyllama.cuda.attention import card_loss, softmax_loss
from babyllama.data import collate
from babyllama.device import Scaler, ahead, summed, to_device
from babyllama.distributed import GRAPHS, World
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.trainer import Objective, forward_backward, samples
from babyllama.tuning.preference import dpo
from babyllama.tuning.regularise import RegulariseConfig, regularise
from conftest import small_config
from model import IGNORED, Loss, Transformer, _softmax_loss
from stand_in import CARD, OnCard, card, to_card

CPU = torch.device("cpu")


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of two sequences of two rows each, a third of whose tokens are no targets."""
    rng, made = np.random.default_rng(0), []
    for _ in range(2 * n):
        rows = []
        for _ in range(2):
            ids = rng.integers(3, 97, 40)
            rows.append((ids, np.where(np.arange(40) < 14, IGNORED, np.roll(ids, -1))))
        made.append(rows)
    return [collate(made[2 * i : 2 * i + 2], 0) for i in range(n)]


# What a run may hold besides: the optimizer, what is hooked on, an adapter, an objective.
RUNS = {
    "adamw": {},
    "muon": {"optim": OptimConfig(name="muon")},
    "regularised": {"regularise": RegulariseConfig(dropout=0.1)},
    "adapter": {"lora": True},
    "dpo": {"preference": True},
}


def one_step(
    device, n, optim=None, lora=False, preference=False, **how
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sums of a step and the weights after it."""
    torch.manual_seed(0)
    model, objective = Transformer(small_config()), Objective()
    reference = Transformer(small_config())
    if lora:
        apply_lora(model, LoraConfig(rank=2), base="")
    if device == CARD:
        model, reference = to_card(model), to_card(reference)
        assert fuse(model).sliced_loss is card_loss
    if preference:
        objective = dpo(reference, 0.1)
    if "regularise" in how:
        regularise(model, how["regularise"])
    optimizer = make_optimizer(model, optim or OptimConfig())
    scaler, parameters = (
        Scaler(device, "float32"),
        [w for w in model.parameters() if w.requires_grad],
    )
    sums = step(model, objective, batches(n), World(0, 1, device), scaler)
    scaler.step(optimizer, parameters, 1.0, float(sums[0]))
    return sums, [w.detach().clone() for w in parameters]


def step(model, objective: Objective, parts, world, scaler) -> torch.Tensor:
    return forward_backward(model, parts, world, scaler, objective)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_mixes_no_devices_and_gives_the_processors_numbers(name, monkeypatch):
    how = RUNS[name]
    wanted, weights = one_step(CPU, 2, **how)
    with card(monkeypatch):
        found, on_card = one_step(CARD, 2, **how)
    assert all(isinstance(w, OnCard) for w in on_card)
    if "regularise" not in how:  # which draws at random
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        atol = 1e-4 if name == "muon" else 1e-5  # which multiplies in bfloat16 there
        for ours, theirs in zip(weights, on_card, strict=True):
            torch.testing.assert_close(theirs.held, ours, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "dpo"])
def test_nobody_waits_for_the_card_inside_of_a_step(name, monkeypatch):
    """As many waits for five micro-batches as for one: the sums and the norm are read once."""
    found = []
    for n in (1, 5):
        with card(monkeypatch) as waits:
            one_step(CARD, n, **RUNS[name])
            found.append(sum(waits.values()))
        monkeypatch.undo()
    assert found[0] == found[1] <= 2, waits


def test_the_stand_in_notices_what_a_card_would_not_forgive(monkeypatch):
    with card(monkeypatch) as waits:
        there, here = OnCard(torch.arange(4.0)), torch.arange(4.0)
        with pytest.raises(RuntimeError, match="mixed"):
            there + here
        assert not waits
        assert float(there[there > 1].sum()) == 5 and there.to("cpu").sum() == 6
        assert sum(waits.values()) == 3  # the mask, the number, the copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cards_softmax_is_the_processors(dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 97) * 4, torch.randint(0, 97, (50,))
    logits[0, targets[0]] += 30  # so sure that 1 - p needs more than eight bits
    wanted = _softmax_loss(logits.clone(), targets)
    losses, hits, error = softmax_loss(logits.clone(), targets, dtype=dtype)
    torch.testing.assert_close(losses, wanted[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, wanted[1]) and error.dtype == dtype
    torch.testing.assert_close(error, wanted[2].to(dtype), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_narrow_head_adds_up_in_float32(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 32).bfloat16(), torch.randn(97, 32).requires_grad_()
    targets = torch.randint(0, 97, (40,))
    monkeypatch.setattr("babyllama.cuda.attention.CARD_SLICE", 8)
    with card(monkeypatch) as waits:
        held = OnCard(weight.detach()).requires_grad_()
        card_loss(OnCard(hidden), held, OnCard(targets))[0].backward()
        found = held.grad.held
    assert not waits and found.dtype == torch.float32
    exact = torch.nn.functional.linear(hidden.float(), weight.bfloat16().float())
    torch.nn.functional.cross_entropy(exact, targets, reduction="sum").backward()
    assert (found - weight.grad).norm() < 0.005 * weight.grad.norm()


def test_positions_that_are_told_are_those_that_would_be_found():
    model, (batch,) = Transformer(small_config()), batches(1)
    wanted = model(**batch)
    chosen = (batch["targets"].reshape(-1) >= 0).nonzero().squeeze(1)
    assert all(map(torch.equal, model(**batch, chosen=chosen), wanted))
    assert set(to_device(batch, CPU)) == set(batch)
    assert set(to_device(batch, torch.device("meta"))) == {*batch, "chosen"}


@pytest.mark.parametrize("device", [CPU, CARD])
def test_batches_come_in_order_whoever_makes_them(device):
    made: list[int] = []

    def make(step: int) -> list[dict[str, torch.Tensor]]:
        made.append(step)
        if step == 7:
            raise ValueError("no such step")
        return [{"tokens": torch.tensor(step)}]

    found = [int(part[0]["tokens"]) for part in ahead(make, range(3, 6), device)]
    assert found == made == [3, 4, 5]
    coming = ahead(make, range(6, 9), device)
    assert int(next(coming)[0]["tokens"]) == 6
    with pytest.raises(ValueError, match="no such step"):
        next(coming)
    with contextlib.closing(ahead(make, range(10, 99), device)) as coming:
        next(coming)
    assert made[-1] == (10 if device == CPU else 11)


def test_sums_are_those_of_adding_one_after_the_other():
    losses = [
        Loss(torch.tensor(1 / (3 + n)), torch.tensor(n), torch.tensor(2 * n)) for n in range(9)
    ]
    wanted = torch.zeros(3, dtype=torch.float64)
    for loss in losses:
        wanted += torch.stack([part.float() for part in loss]).double()
    assert torch.equal(summed(losses, 7, World(0, 1, CPU))[:3], wanted)
    assert summed([], 7, World(0, 1, CPU)).tolist() == [0, 0, 0, 7]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_samples_are_drawn_in_a_deterministic_run_too(deterministic, tokenizer, monkeypatch):
    torch.manual_seed(0)
    model, found = Transformer(small_config(tokenizer.vocab_size)), []
    for made in (model, to_card(copy.deepcopy(model))):
        with card(monkeypatch):
            found.append(samples(made, tokenizer, ["今天"], "pretrain", 8))
        monkeypatch.undo()
    assert found[0] == found[1] and torch.are_deterministic_algorithms_enabled()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_layers_take_fewer_graphs_than_are_kept(monkeypatch):
    """Windows and packed rows, of one row and of several, with gradients and without."""
    made = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = Transformer(small_config(n_layers=4))
    wrapped = World(0, 1, CPU).wrap(model, compiled=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows, T in ((4, 128), (3, 128), (1, 128), (4, 127), (3, 120), (1, 125), (1, 70)):
            tokens = torch.randint(3, 97, (rows, T))
            for segments in ({}, {"segments": torch.arange(T).expand(rows, T) // 40 + 1}):
                wrapped(tokens=tokens, targets=tokens, **segments).loss_sum.backward()
                with torch.no_grad():
                    wrapped(tokens=tokens, targets=tokens, **segments)
    torch._dynamo.reset()
    assert 8 < len(made) <= 32 < GRAPHS == torch._dynamo.config.recompile_limit
