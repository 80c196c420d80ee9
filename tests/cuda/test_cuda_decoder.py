"""The step for cards writes what the model writes, by a graph, too; on stand-in tensors it seldom
waits.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from babyllama.cuda.decoder import card_decoder
from babyllama.decoder import plain_decoder
from babyllama.generate import generate
from babyllama.sampling import SamplingConfig
from babyllama.scoring.beams import BeamConfig, search_beams
from conftest import small_config
from model import Transformer
from serve.engine import Engine, Job
from stand_in import CARD, card, to_card

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 4, 3]]


def large_weights(kv_heads: int | None = None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(small_config(n_kv_heads=kv_heads)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"beams": 3}, {"temperature": 0.0}])
def test_replies_are_those_of_the_model(kv_heads, settings):
    model = large_weights(kv_heads)
    sampling = BeamConfig(max_new_tokens=30, seed=0, **settings)
    write = search_beams if "beams" in settings else generate
    wanted = write(plain_decoder(model), PROMPTS, sampling, 2)
    assert write(card_decoder(model, torch.float32, False), PROMPTS, sampling, 2) == wanted
    assert "beams" in settings or max(map(len, wanted)) > 9


class Graph(TorchDispatchMode):
    """Stands in for a CUDA graph: the kernels of a step, which are run again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"beams": 3}])
def test_a_step_that_was_captured_once_writes_all_tokens(settings, monkeypatch):
    made, model = [], large_weights(2)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    decoder, sampling = card_decoder(model, torch.float32), BeamConfig(30, seed=0, **settings)
    write = search_beams if "beams" in settings else generate
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert write(decoder, prompts, sampling, 2) == write(
            plain_decoder(model), prompts, sampling, 2
        )
    assert 0 < len(made) < 15


def test_narrow_weights_are_a_copy_whose_rotary_table_stays_exact():
    model = large_weights()
    decoder = card_decoder(model, torch.bfloat16, False)
    assert {w.dtype for w in decoder.model.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder.model.rope, model.rope) and decoder.kind == "bfloat16"
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    cache = decoder.new_cache(torch.zeros(1, dtype=torch.int64), 9)
    assert cache.buffer.dtype == torch.bfloat16
    plain = plain_decoder(model)
    known = plain.new_cache(torch.zeros(1, dtype=torch.int64), 9)
    with torch.inference_mode():
        decoder.read(torch.tensor([[5, 6]]), cache), plain.read(torch.tensor([[5, 6]]), known)
        found, wanted = (
            d.step(torch.tensor([7]), c) for d, c in ((decoder, cache), (plain, known))
        )
    assert found.dtype == torch.float32 and (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_takes_few_waits_however_many_replies_are_written(rows, monkeypatch):
    sampling, counts = SamplingConfig(seed=0, temperature=1.0), []
    for n in (10, 20):
        with card(monkeypatch) as waits:
            decoder = card_decoder(to_card(large_weights()), torch.float32, False)
            replies = generate(decoder, PROMPTS[:rows], sampling.__class__(n, 1.0, seed=0), 96)
            counts.append(sum(waits.values()))
            assert max(map(len, replies)) == n
        monkeypatch.undo()
    # Are the logits finite, and which token is it; a row that ends changes the cache's beginning.
    assert counts[1] - counts[0] <= 10 * 2 + 2 * (rows > 1), waits


def test_the_server_writes_the_same_on_a_card(monkeypatch, tokenizer):
    torch.manual_seed(0)
    replies = []
    for on_card in (False, True):
        model = Transformer(small_config(tokenizer.vocab_size)).eval()
        model.load_state_dict(large := replies[0][1] if replies else model.state_dict())
        with card(monkeypatch):
            decoder = card_decoder(to_card(model), torch.float32, False) if on_card else None
            engine = Engine(decoder or plain_decoder(model), tokenizer, 2, block=4)
            jobs = [Job([5 + n, 6, 7], SamplingConfig(6, 0.0), lambda _: None) for n in range(4)]
            for job in jobs:
                engine.add(job)
            while engine.step():
                pass
        monkeypatch.undo()
        replies.append(([job.reply.ids for job in jobs], large))
    assert replies[0][0] == replies[1][0] and CARD.type == "meta"
