"""The fused kernels give the losses and the gradients of model.py, to the format's rounding."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from babyllama.config import REPO
from babyllama.cpu import compile, fused
from babyllama.cpu.fused import fuse
from babyllama.device import Scaler
from babyllama.distributed import World
from babyllama.lora import LoraConfig, apply_lora
from babyllama.tuning.regularise import RegulariseConfig, regularise
from model import IGNORED, ModelConfig, Transformer

CPU = torch.device("cpu")
SHAPE = ModelConfig(dim=64, n_heads=2, n_layers=2, multiple_of=32, vocab_size=101, max_seq_len=150)

needs_kernels = pytest.mark.skipif(
    not fused.suits(Transformer(SHAPE)), reason="no C compiler, or neither AVX2 nor AVX-512"
)
FORMATS = ["float32"]
if fused.suits(Transformer(SHAPE)) and compile.compiled().has_bf16():
    FORMATS.append("bfloat16")
in_each_format = pytest.mark.parametrize("format", FORMATS)


def make(length: int = 50, packed: bool = False, **shape: object) -> tuple[Transformer, dict]:
    """A model whose attention is not even, and a batch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**vars(SHAPE), **shape}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1).add_(0.01 * torch.randn_like(weight))
    tokens, targets = torch.randint(0, 101, (2, 3, length))
    targets[0, length // 3 : length // 2] = IGNORED
    batch = {"tokens": tokens, "targets": targets}
    if packed:
        batch["segments"] = (torch.rand(3, length) < 8 / length).long().cumsum(1)
    return model, batch


def losses_of(model: nn.Module, batch: dict, precision: str = "bfloat16") -> tuple:
    """The loss's three numbers and all gradients, one after another."""
    model.zero_grad()
    with Scaler(CPU, precision).autocast():
        loss = model(**batch)
    (loss.loss_sum / loss.n_targets).backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    return loss.loss_sum.item(), int(loss.n_targets), int(loss.n_correct), grads


def require_equal(model: Transformer, batch: dict) -> None:
    """Fused, a model has its float32 numbers, or comes as near to them as autocast alone does."""
    exact, n_targets, hits, grads = losses_of(model, batch, "float32")
    found = losses_of(fuse(copy.deepcopy(model)), batch, "float32")
    assert found[:3] == (pytest.approx(exact, rel=1e-5), n_targets, hits)
    assert grads.keys() == found[3].keys()
    for name, grad in grads.items():
        error = (found[3][name] - grad).norm()  # 1e-6: of one token, wq and wk have none but noise
        assert error <= 1e-5 * grad.norm() + 1e-6, name
    if "bfloat16" not in FORMATS:
        return
    _, _, _, plain_grads = losses_of(model, batch)
    found, n_found, n_correct, found_grads = losses_of(fuse(copy.deepcopy(model)), batch)
    assert n_found == n_targets
    assert 0 <= n_correct <= n_targets
    assert abs(found - exact) < 2e-3 * abs(exact)
    assert grads.keys() == found_grads.keys()
    for name, grad in grads.items():
        error, usual = ((g[name] - grad).norm() for g in (found_grads, plain_grads))
        assert error <= 1.3 * usual + 5e-3 * grad.norm(), name


@needs_kernels
@pytest.mark.parametrize("length", [1, 2, 31, 32, 65, 150])
def test_gradients_are_those_of_the_model_for_each_length(length: int) -> None:
    require_equal(*make(length))


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [
        {"n_kv_heads": 1},
        {"dim": 128, "n_heads": 2, "multiple_of": 16, "tied": True},
        {"dim": 192, "n_heads": 2},
        {"dim": 256, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 20011},
    ],
)
def test_gradients_are_those_of_the_model_for_each_shape(shape: dict) -> None:
    require_equal(*make(**shape))


@needs_kernels
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_packed_documents_do_not_see_each_other(kv_heads: int | None) -> None:
    model, batch = make(150, packed=True, n_kv_heads=kv_heads)
    require_equal(model, batch)
    batch["segments"][1] = torch.arange(150) % 3  # numbers that come again
    require_equal(model, batch)


@needs_kernels
def test_hits_are_those_of_the_model() -> None:
    model, batch = make(tied=True)
    batch["targets"] = batch["tokens"]  # what a tied head says of an embedding, most often
    _, _, wanted, _ = losses_of(model, batch)
    _, _, found, _ = losses_of(fuse(model), batch)
    assert wanted > 20
    assert abs(found - wanted) <= 1


@needs_kernels
@in_each_format
def test_a_collapsed_model_is_right_nowhere(format: str) -> None:
    model, batch = make()
    with torch.no_grad():
        model.output.weight.zero_()
    assert losses_of(fuse(model), batch, format)[2] == 0


@needs_kernels
@in_each_format
def test_the_numbers_do_not_depend_on_run_or_threads(format: str) -> None:
    model, batch = make(150, packed=True)
    fuse(model)
    wanted = losses_of(model, batch, format)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found = losses_of(model, batch, format)
            assert found[:3] == wanted[:3]
            assert all(torch.equal(found[3][name], grad) for name, grad in wanted[3].items())
    finally:
        torch.set_num_threads(before)


@needs_kernels
@in_each_format
def test_activation_checkpointing_changes_no_bit(format: str) -> None:
    model, batch = make(150, packed=True)
    wanted = losses_of(fuse(model), batch, format)
    found = losses_of(World(0, 1, CPU).wrap(model, recompute=True), batch, format)
    assert found[:3] == wanted[:3]
    assert all(torch.equal(found[3][name], grad) for name, grad in wanted[3].items())


@needs_kernels
@in_each_format
def test_numbers_that_are_not_finite_are_seen(format: str) -> None:
    model, batch = make()
    for name in ("layers.0.attention.wq", "layers.1.feed_forward.w2", "norm", "output"):
        broken = fuse(copy.deepcopy(model))
        with torch.no_grad():
            broken.get_parameter(name + ".weight").view(-1)[0] = torch.nan
        found = losses_of(broken, batch, format)[0]
        assert found != found, name


@needs_kernels
def test_what_the_kernels_do_not_cover_runs_as_it_was() -> None:
    model, batch = make(packed=True)
    odd, odd_batch = make(dim=48)
    for wanted, given, format in (
        (model, batch, "float16"),
        (odd, odd_batch, "bfloat16"),  # heads of 24
        (regularise(copy.deepcopy(model), RegulariseConfig(dropout=0.1)), batch, "bfloat16"),
    ):
        torch.manual_seed(1)
        before = losses_of(wanted, batch if given is batch else given, format)
        torch.manual_seed(1)
        after = losses_of(fuse(wanted), given, format)
        assert before[0] == pytest.approx(after[0], rel=2e-4)
        assert all(
            torch.allclose(after[3][n], g, rtol=2e-2, atol=2e-3) for n, g in before[3].items()
        )
    adapted = copy.deepcopy(model)
    apply_lora(adapted, LoraConfig(rank=2), base="base", seed=0)
    require_equal(adapted, batch)


@needs_kernels
@torch.no_grad()
def test_a_fused_model_generates_as_before() -> None:
    model, batch = make(packed=True)
    wanted = model(batch["tokens"])
    assert torch.allclose(fuse(model)(batch["tokens"]), wanted, rtol=1e-5, atol=1e-5)
    with Scaler(CPU, "bfloat16").autocast():
        assert torch.allclose(model(batch["tokens"]).float(), wanted, rtol=0.1, atol=0.1)


def test_without_a_compiler_a_model_stays_as_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    compile.compiled.cache_clear(), compile.library.cache_clear()
    try:
        model, batch = make()
        wanted = losses_of(model, batch)
        found = losses_of(fuse(model), batch)
        assert not hasattr(model, "kernels")
        assert found[:3] == wanted[:3]
    finally:
        compile.compiled.cache_clear(), compile.library.cache_clear()


MANY_SHAPES = """
import babyllama
import torch

def used():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000

x, w = torch.ones(3000, 256).bfloat16(), torch.ones(768, 256).bfloat16()
out = torch.empty(3000, 768, dtype=torch.bfloat16)  # so that malloc has no part in it
found = []
for n in range(2000, 3000):
    torch.mm(x[:n], w.t(), out=out[:n])
    found.append(used())
print(found[-1] - found[99])
"""


@pytest.mark.skipif("bfloat16" not in FORMATS, reason="no bfloat16 instructions")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory by Linux's files")
def test_rows_of_all_lengths_do_not_fill_the_memory():
    """What oneDNN keeps of each shape grew by 3.5 GB in 400 steps."""
    command = [sys.executable, "-c", MANY_SHAPES]
    assert float(subprocess.run(command, cwd=REPO, capture_output=True, check=True).stdout) < 100
