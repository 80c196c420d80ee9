"""Packed documents attended to block by block give the losses of the plain mask.

flex_attention has no way back on a CPU, so gradients are compared where there is a CUDA card.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from babyllama.block_attention import BLOCK, attend, block_mask, by_blocks, suits
from conftest import small_config
from model import IGNORED, Transformer

# The step-by-step way warns that it is not the fast one.
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
CPU = torch.device("cpu")


def packed(n_rows: int, length: int, seed: int) -> torch.Tensor:
    """Segments of random documents, with filler (0) at the end of some rows."""
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
    assert not found[:, :, :length, length:].any()  # filler is not seen
    for row in range(4):
        for i in range(full // BLOCK):
            for j in range(full // BLOCK):
                part = found[row, 0, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                assert bool(blocks.to_dense()[row, 0, i, j]) == bool(part.any())


@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_the_losses_are_those_of_the_plain_mask(kv_heads: int | None) -> None:
    model, batch = make(n_kv_heads=kv_heads)
    wanted = model(**batch, per_position=True)
    by_blocks(model, compiled=False)
    found = model(**batch, per_position=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.equal(model(batch["tokens"], batch["targets"], per_position=True), wanted)


@torch.no_grad()
def test_without_packing_nothing_changes() -> None:
    model, batch = make()
    wanted = model(batch["tokens"])
    assert torch.equal(by_blocks(model, compiled=False)(batch["tokens"]), wanted)
    q = torch.randn(2, 4, 9, 8)
    assert attend(None, q, q, q, None, True).shape == q.shape
    assert not suits(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_on_a_card_losses_and_gradients_are_those_of_the_plain_mask() -> None:
    card = torch.device("cuda")
    if not suits(card):
        pytest.skip("no Triton, or a card before the RTX 30 series")
    results = []
    for change in (lambda model: model, by_blocks):
        model, batch = make(card)
        loss = change(model)(**batch).loss_sum
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
