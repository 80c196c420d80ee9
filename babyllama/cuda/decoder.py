"""Decoding steps for a CUDA card: one graph of kernels, captured once and replayed for each token.

Launching the hundreds of kernels of a step one by one takes the processor several times as long as
the card needs to run them. A CUDA graph launches them together, but at fixed addresses and shapes:
a step therefore reads the whole cache, hides the columns that are not written yet by a mask, and
takes position and beginnings from tensors. Weights are bfloat16 where the card has it, half the
bytes to read. Prompts go through the Transformer itself.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.decoder import Decoder
from model import KVCache, Transformer, rotate

# A finished row leaves its batch with a smaller cache at another address, for which the step is
# captured again, in some 20 ms; so many are kept.
MOST_GRAPHS = 32


def card_decoder(model: Transformer, dtype: torch.dtype, captures: bool = True) -> Decoder:
    """The way to continue on a card, with weights and cache of this type.

    captures: else the kernels are launched one by one, as on devices that have no graphs
    """
    if model.output.weight.dtype != dtype:
        model = copy.deepcopy(model)
        for weight in model.parameters():  # not the rotary table, which stays exact
            weight.data = weight.data.to(dtype)
    return Decoder(model, CardStep(model, captures), str(dtype)[6:])


@dataclass
class _Graph:
    """A captured step; its tensors are where it reads (tokens, start, length) and writes."""

    given: tuple[Tensor, Tensor, Tensor]
    replay: torch.cuda.CUDAGraph
    logits: Tensor


class CardStep:
    """One step for a batch, as Decoder.step; wq, wk, wv are one product and so are w1, w3."""

    def __init__(self, model: Transformer, captures: bool) -> None:
        self.model, self._captures = model, captures
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.layers = []
        with torch.no_grad():
            for layer in model.layers:
                a, f = layer.attention, layer.feed_forward
                qkv = torch.cat((a.wq.weight, a.wk.weight, a.wv.weight))
                self.layers.append((layer, qkv, torch.cat((f.w1.weight, f.w3.weight))))

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        length = torch.full((1,), cache.length, device=tokens.device)
        if self._captures:
            logits = self._replay(tokens, cache, length)
        else:
            logits = self.run(tokens, cache.start, length, cache.buffer)
        cache.length += 1
        return logits

    def run(self, tokens: Tensor, start: Tensor, length: Tensor, buffer: Tensor) -> Tensor:
        """Logits (B, V) float32 after the tokens (B,), whose keys and values go into column
        `length` (1,) of the cache's buffer; rows begin at the columns `start` (B,)."""
        config, B = self.model.config, len(tokens)
        H, K, C = config.n_heads, config.kv_heads, config.head_dim
        rope = self.model.rope[:, length - start][:, :, None, None]  # (2, B, 1, 1, C)
        columns = torch.arange(buffer.shape[4], device=tokens.device)
        hidden = (columns > length) | (columns < start[:, None])  # (B, S)
        mask = torch.zeros_like(hidden, dtype=buffer.dtype).masked_fill_(hidden, -torch.inf)
        x = self.model.tok_embeddings.weight[tokens]
        for (layer, wqkv, w13), (keys, values) in zip(self.layers, buffer, strict=True):
            qkv = F.linear(layer.attention_norm(x), wqkv).view(B, H + 2 * K, 1, C)
            turned = rotate(qkv[:, : H + K], rope)
            keys.index_copy_(2, length, turned[:, H:])
            values.index_copy_(2, length, qkv[:, H + K :])
            q = turned[:, :H].reshape(B, K, H // K, C)  # heads of a group as rows of its query
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None])
            x = x + F.linear(mixed.reshape(B, -1), layer.attention.wo.weight)
            gate, up = F.linear(layer.ffn_norm(x), w13).chunk(2, dim=1)
            x = x + layer.feed_forward.w2(F.silu(gate) * up)
        return self.model.output(self.model.norm(x)).float()

    def _replay(self, tokens: Tensor, cache: KVCache, length: Tensor) -> Tensor:
        key = (cache.buffer.data_ptr(), cache.buffer.shape)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(tokens, cache, length)
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for place, value in zip(graph.given, (tokens, cache.start, length), strict=True):
            place.copy_(value)
        graph.replay.replay()
        return graph.logits.clone()

    def _capture(self, tokens: Tensor, cache: KVCache, length: Tensor) -> _Graph:
        given = tokens.clone(), cache.start.clone(), length.clone()
        # Once before on another stream, as libraries make their workspaces in a first call. It
        # writes what the replay writes again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(*given, cache.buffer)
        torch.cuda.current_stream().wait_stream(side)
        replay = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replay, capture_error_mode="thread_local"):
            logits = self.run(*given, cache.buffer)
        return _Graph(given, replay, logits)
