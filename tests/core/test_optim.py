"""The schedule's shape and what decays."""

import math
from itertools import pairwise

import pytest
import torch

from babyllama.errors import ConfigError
from babyllama.optim import (
    MuonAdamW,
    OptimConfig,
    lr_at,
    make_optimizer,
    orthogonal,
    set_lr,
    state_shapes,
)
from conftest import small_config
from model import Transformer

CONFIG = OptimConfig(lr=0.02, min_lr_ratio=0.25, warmup_steps=10)


def test_warm_up_rises_in_a_line_to_lr_and_the_cosine_falls_to_the_least():
    rates = [lr_at(step, CONFIG, total_steps=110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.02 * n / 10 for n in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 0.02
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert rates[60] == pytest.approx((0.02 + 0.005) / 2)  # half way
    assert rates[35] == pytest.approx(0.005 + 0.015 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert rates[110] == pytest.approx(0.25 * 0.02)


def test_a_linear_decay_falls_by_the_same_at_every_step_and_a_share_of_one_holds_the_rate():
    line = OptimConfig(lr=0.02, min_lr_ratio=0.0, warmup_steps=10, decay="linear")
    rates = [lr_at(step, line, total_steps=110) for step in range(10, 111)]
    assert rates == pytest.approx([0.02 * (1 - n / 100) for n in range(101)])
    held = OptimConfig(lr=0.02, min_lr_ratio=1.0, warmup_steps=10, decay="linear")
    assert {lr_at(step, held, total_steps=110) for step in range(10, 111)} == {0.02}


def test_no_warm_up_begins_at_lr_and_a_short_run_may_be_all_warm_up():
    assert lr_at(0, OptimConfig(lr=0.5, warmup_steps=0), total_steps=5) == 0.5
    short = [lr_at(step, CONFIG, total_steps=4) for step in range(4)]
    assert short == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert lr_at(500, CONFIG, total_steps=110) == pytest.approx(0.005)  # past the end


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_norms_do_not_and_every_parameter_is_in_one_group(tied):
    model = Transformer(small_config(tied=tied))
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == others["betas"] == (0.8, 0.9)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert all("norm" in names[id(weight)] for weight in others["params"])
    assert not any("norm" in names[id(weight)] for weight in decayed["params"])
    found = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(found) == sorted(names)


def test_weights_that_do_not_train_are_left_out():
    model = Transformer(small_config())
    model.tok_embeddings.weight.requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig())
    chosen = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert not any(weight is model.tok_embeddings.weight for weight in chosen)
    assert len(chosen) == len(list(model.parameters())) - 1


def test_an_update_is_adamw_as_published():
    """Loshchilov and Hutter 2019, algorithm 2, written out."""
    cfg = OptimConfig(lr=0.1, weight_decay=0.2, beta1=0.7, beta2=0.8)
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, cfg)
    assert all(group["fused"] for group in optimizer.param_groups)
    set_lr(optimizer, 0.05)
    wanted = {
        name: (w.detach().double(), 0.0, 0.0, 0.2 if w.dim() == 2 else 0.0)
        for name, w in model.named_parameters()
    }
    for step in (1, 2, 3):
        for number, weight in enumerate(model.parameters()):
            weight.grad = torch.linspace(-1, 1, weight.numel()).view_as(weight) * (step + number)
        for name, weight in model.named_parameters():
            value, mean, square, decay = wanted[name]
            grad = weight.grad.double()
            mean = 0.7 * mean + 0.3 * grad
            square = 0.8 * square + 0.2 * grad**2
            change = mean / (1 - 0.7**step) / ((square / (1 - 0.8**step)).sqrt() + 1e-8)
            wanted[name] = (value - 0.05 * (change + decay * value), mean, square, decay)
        optimizer.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach().double(), wanted[name][0], rtol=1e-5, atol=1e-6)


def test_muon_updates_the_matrices_of_the_layers_and_adamw_all_else():
    model = Transformer(small_config())
    optimizer = make_optimizer(model, OptimConfig(name="muon"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = [names[id(w)] for g in optimizer.param_groups if "momentum" in g for w in g["params"]]
    assert len(by_muon) == 2 * 7 and all("layers." in name for name in by_muon)
    assert not any("norm" in name for name in by_muon)
    model(torch.arange(3, 35)[None], torch.arange(4, 36)[None]).loss_sum.backward()
    optimizer.step()
    kept = {names[id(weight)]: sorted(state) for weight, state in optimizer.state.items()}
    assert kept.keys() == set(names.values())
    assert all((kept[name] == ["momentum_buffer"]) == (name in by_muon) for name in kept)
    shapes = state_shapes(optimizer)
    for weight, state in optimizer.state.items():
        assert {field: tensor.shape for field, tensor in state.items()} == shapes[weight]


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_an_update_of_muon_has_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.linalg.svdvals(orthogonal(matrix) - u @ v).max() < 0.5
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_muon_is_that_of_torch():
    """torch's own multiplies in bfloat16, so the two agree to its precision."""
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    cfg = OptimConfig(lr=0.1)
    group = {"params": list(ours[0].parameters()), "weight_decay": 0.3, "momentum": 0.9}
    mine = MuonAdamW([group], lr=cfg.lr)
    other = torch.optim.Muon(
        theirs.parameters(), lr=cfg.lr, weight_decay=0.3, momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    torch.manual_seed(0)
    for _ in range(4):
        grad = torch.randn(8, 12)
        ours[0].weight.grad, theirs[0].weight.grad = grad.clone(), grad.clone()
        mine.step()
        other.step()
        torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"min_lr_ratio": 1.5}, {"warmup_steps": -1},
     {"weight_decay": -0.1}, {"beta1": 1.0}, {"beta2": -0.1}, {"max_grad_norm": 0.0},
     {"momentum": 1.0},
     {"max_grad_norm": math.nan}],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"optim\.{next(iter(wrong))} wants .* found"):
        OptimConfig(**wrong)
