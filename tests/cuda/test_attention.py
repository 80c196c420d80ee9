"""Packed documents attended to block by block give the losses of the plain mask.

flex_attention has no backward pass on a CPU, so gradients are compared where there is a CUDA card.
"""

import functools
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from babyllama.cuda.attention import (
    BLOCK,
    attend,
    attend_by,
    bias,
    block_mask,
    on_card,
    suits,
    works,
)
from babyllama.distributed import GRAPHS
from conftest import small_config
from model import IGNORED, Transformer

# The step-by-step way warns that it is not the fast one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
CPU = torch.device("cpu")


def packed(n_rows: int, length: int, seed: int) -> torch.Tensor:
    """Segments of random documents, with padding (0) at the end of some rows."""
    rng = torch.Generator().manual_seed(seed)
    starts = torch.rand(n_rows, length, generator=rng) < 8 / length
    segments = 1 + starts.long().cumsum(dim=1)
    ends = torch.randint(length // 2, 2 * length, (n_rows, 1), generator=rng)
    return segments.masked_fill(torch.arange(length) >= ends, 0)


def make(device: torch.device = CPU, **shape: object) -> tuple[Transformer, dict]:
    """A model and a packed batch."""
    torch.manual_seed(0)
    model = Transformer(small_config(max_seq_len=300, **shape)).to(device)
    segments = packed(3, 300, seed=2)
    tokens = torch.randint(3, 97, (3, 300))
    targets = torch.where(segments > 0, tokens.roll(-1, 1), IGNORED)
    batch = {"tokens": tokens, "targets": targets, "segments": segments}
    return model, {key: value.to(device) for key, value in batch.items()}


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK, 300, 77])
def test_the_blocks_are_those_of_the_plain_mask(length: int) -> None:
    segments = packed(4, length, seed=length)
    plain = Transformer.segment_mask(segments)
    blocks = block_mask(segments)
    full = -(-length // BLOCK) * BLOCK
    found = create_mask(blocks.mask_mod, 4, None, full, full, device="cpu")
    assert torch.equal(found[:, :, :length, :length], plain)
    assert not found[:, :, :length, length:].any()  # padding is not seen
    for row in range(4):
        for i in range(full // BLOCK):
            for j in range(full // BLOCK):
                part = found[row, 0, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                assert bool(blocks.to_dense()[row, 0, i, j]) == bool(part.any())


def compare(change, wanted: torch.Tensor, **shape: object) -> None:
    """Whether the losses of a changed model are the wanted ones."""
    model, batch = make(**shape)
    found = change(model)(**batch, per_position=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_the_losses_are_those_of_the_plain_mask(kv_heads: int | None) -> None:
    model, batch = make(n_kv_heads=kv_heads)
    wanted = model(**batch, per_position=True)
    by_blocks = functools.partial(attend_by, kernel=flex_attention, always=True)
    compare(by_blocks, wanted, n_kv_heads=kv_heads)
    compare(on_card, wanted, n_kv_heads=kv_heads)  # a bias, as this is no card
    assert not torch.equal(model(batch["tokens"], batch["targets"], per_position=True), wanted)
    tokens = batch["tokens"]  # without packing nothing changes
    assert torch.equal(on_card(make(n_kv_heads=kv_heads)[0])(tokens), model(tokens))


def test_the_bias_is_the_mask_made_once_and_laid_out_for_the_kernels() -> None:
    segments = packed(3, 77, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = bias(segments)
        assert found.dtype == dtype
        assert torch.equal(found == 0, Transformer.segment_mask(segments))
        assert torch.equal(found < 0, found == -torch.inf)
        assert all(step % 8 == 0 for step in found.stride()[:-1]) and found.stride(-1) == 1


def test_kernels_are_for_wide_heads_on_late_cards_where_they_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not suits(CPU, 64)
    with pytest.warns(RuntimeWarning, match="by a mask, which is slower: .*needs a C compiler"):
        assert not works(CPU, 16)  # no processor attends backwards
    card, late, tried = torch.device("cuda"), (8, 6), []
    monkeypatch.setattr("babyllama.cuda.attention.works", lambda *given: not tried.append(given))
    for capability, head_dim, triton in (
        (late, 16, 1),
        (late, 8, 1),
        ((7, 5), 16, 1),
        (late, 16, 0),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=triton: found or None)
        assert suits(card, head_dim) == (capability == late and head_dim == 16 and bool(triton))
    assert tried == [(card, 16)]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_kernels_are_tried_with_gradients_wherever_the_first_packed_row_comes(
    around: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's comes without them, in the validation before its first step."""
    plain = F.scaled_dot_product_attention  # which attends backwards on a processor, too
    monkeypatch.setattr(
        "babyllama.cuda.attention._compiler", lambda: lambda q, k, v, block_mask: plain(q, k, v)
    )
    with around():
        assert works.__wrapped__(CPU, 16)


def test_all_kinds_of_batches_take_fewer_graphs_than_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the limit flex_attention would run uncompiled, with all scores in memory."""
    # What refuses gradients on a CPU; the graphs are counted here, and never run backwards.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    made = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, backend=backend)
    rng = random.Random(0)
    config = {"recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(config):
        for _ in range(40):
            rows, length = rng.choice([1, 2, 3, 8]), rng.choice([100, 250, 380, 511])
            q = torch.randn(rows, 2, length, 16, requires_grad=rng.random() < 0.7)
            attend(kernel, q, q, q, block_mask(packed(rows, length, seed=1)), False)
    torch._dynamo.reset()
    assert 8 < len(made) <= 16 < GRAPHS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_on_a_card_losses_and_gradients_are_those_of_the_plain_mask(kv_heads: int | None) -> None:
    card, results = torch.device("cuda"), []
    for change in (lambda model: model, functools.partial(on_card, blocks=False), on_card):
        model, batch = make(card, n_heads=2, n_kv_heads=kv_heads)
        loss = change(model)(**batch).loss_sum
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-3, atol=1e-3)
