"""Decoding steps for a processor: the same numbers as model.py's, from fewer and larger products.

Owns the copies of the weights that a step reads, made once. The KV cache is model.py's, so all
steps can follow each other; a prompt goes through the Transformer itself, or through int8.c.
What a step costs is reading the weights: model.py's layout of the head, (V, D), is read at a third
of the speed of (D, V) on the AMD processor it was measured on (LOG.md), and int8 weights are a
quarter of the bytes (int8.py).
"""

import warnings
from ctypes import c_float, c_void_p
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.cpu import compile, int8
from babyllama.cuda.decoder import card_decoder
from babyllama.decoder import Decoder, Weights, plain_decoder
from babyllama.errors import ConfigError
from babyllama.sampling import COLDEST, SamplingConfig
from babyllama.sampling import choose as choose_in_torch
from model import KVCache, Transformer, rotate

# Of choose.c: numbers that are summed together.
_RUN = 256


def make_decoder(model: Transformer, weights: Weights = "auto") -> Decoder:
    """The fastest way to continue that keeps what `weights` asks for.

    auto: int8 on a processor with a C compiler, float32 on one without (with a warning); bfloat16
        on a CUDA card that has it; on other devices as the model is
    raises: ConfigError if `weights` cannot be had here
    """
    kind, reason = choose_weights(model, weights)
    if kind == "int8":
        step = int8.Int8Step(model)
        return Decoder(model, step, kind, reason, step.read, step.cache_dtype, choose)
    if kind == "float32":
        return Decoder(model, Float32Step(model), kind, reason, choose=choose)
    if model.rope.is_cuda:
        dtype = model.output.weight.dtype
        is_late = torch.cuda.get_device_capability(model.rope.device) >= (8, 0)
        if weights == "auto" and dtype == torch.float32 and is_late:
            dtype, reason = torch.bfloat16, "half the bytes, and the card has it"
        return replace(card_decoder(model, dtype), reason=reason)
    return replace(plain_decoder(model), reason=reason, choose=choose)


def choose_weights(model: Transformer, weights: Weights) -> tuple[str, str]:
    """Format of the held weights, "int8", "float32" or "" for as they are, and the reason."""
    dtype, device = model.output.weight.dtype, model.rope.device.type
    here = f"{str(dtype)[6:]} on {device}"
    if device != "cpu" or dtype != torch.float32:
        if weights == "int8":
            raise ConfigError(
                f"wanted a float32 model on the cpu for int8 weights, found {here}; leave "
                f"--weights out, or add --device cpu"
            )
        return "", f"{here}: a device of this kind takes the model as it is"
    if weights == "float32":
        return "float32", "float32 was asked for, or nothing less exact"
    try:
        compile.compiled()
    except ConfigError as error:
        if weights == "int8":
            raise
        warnings.warn(f"decoding in float32, which is slower: {error}", RuntimeWarning, 3)
        return "float32", f"{error}"
    return "int8", "a quarter of the bytes, which are what a token on a processor waits for"


class Float32Step:
    """One step with the weights laid out for it.

    wq, wk, wv are one product and so are w1, w3; the weights of the norms and the scale of the
    scores are multiplied into them.
    """

    def __init__(self, model: Transformer) -> None:
        config = self.config = model.config
        self.model = model
        # A norm divides by the root of the mean square, here by that of the sum.
        root = config.dim**0.5
        self.eps = torch.tensor((config.dim * config.norm_eps) ** 0.5)
        self.layers = []
        with torch.no_grad():
            for layer in model.layers:
                a, f = layer.attention, layer.feed_forward
                wq = a.wq.weight * config.head_dim**-0.5
                qkv = torch.cat((wq, a.wk.weight, a.wv.weight)) * layer.attention_norm.weight * root
                w13 = torch.cat((f.w1.weight, f.w3.weight)) * layer.ffn_norm.weight * root
                wide = [w.t().contiguous() for w in (qkv, a.wo.weight, w13)]
                self.layers.append((*wide, f.w2.weight.detach()))
            self.head = (model.output.weight * model.norm.weight * root).t().contiguous()

    @cached_property
    def packed_head(self) -> Tensor:
        """The head as oneDNN likes it for several rows; made when first needed."""
        return torch.ops.mkldnn._reorder_linear_weight(self.head.t().contiguous(), 16)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        config, B = self.config, len(tokens)
        H, K, C = config.n_heads, config.kv_heads, config.head_dim
        rope, bias = self._positions(cache)
        past = cache.buffer[..., : cache.length + 1, :].flatten(2, 3)  # (L, 2, B K, S, C)
        keys, values = past[:, 0].transpose(2, 3).unbind(), past[:, 1].unbind()
        new = cache.buffer[..., cache.length, :].unbind()
        x = self.model.tok_embeddings.weight[tokens]
        for i, (wqkv, wo, w13, w2) in enumerate(self.layers):
            qkv = torch.mm(self._normed(x), wqkv).view(B, H + 2 * K, 1, C)
            turned = rotate(qkv[:, : H + K], rope)[:, :, 0]
            new[i][0].copy_(turned[:, H:])
            new[i][1].copy_(qkv[:, H + K :, 0])
            scores = torch.bmm(turned[:, :H].reshape(B * K, H // K, C), keys[i])
            if bias is not None:
                scores += bias
            mixed = torch.bmm(scores.softmax(dim=-1), values[i])
            x = torch.addmm(x, mixed.view(B, -1), wo)
            gate, up = torch.mm(self._normed(x), w13).chunk(2, dim=1)
            x = x + F.linear(F.silu(gate).mul_(up), w2)
        cache.length += 1
        x = self._normed(x)
        if B == 1 or not torch.backends.mkldnn.is_available():
            return torch.mm(x, self.head)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed_head, None, "none", [], "")

    def _normed(self, x: Tensor) -> Tensor:
        """RMSNorm in the three calls that take least time; its weight is in what follows."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=1, keepdim=True), self.eps)

    def _positions(self, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """The rotary angles of the new tokens, and what hides padding: (B K, 1, S) or None."""
        rope = self.model.rope
        if not cache.ragged:
            return rope[:, None, None, cache.length, None], None
        columns = torch.arange(cache.length + 1, device=rope.device)
        bias = torch.zeros(len(cache.start), len(columns))
        bias.masked_fill_(columns < cache.start[:, None], -torch.inf)
        positions = cache.length - cache.start
        bias = bias.repeat_interleave(self.config.kv_heads, dim=0)[:, None]
        return rope[:, positions][:, :, None, None], bias


def choose(logits: Tensor, sampling: SamplingConfig, chances: Tensor) -> Tensor:
    """As sampling.choose in a sixth of the time, by C where that helps."""
    if logits.device.type != "cpu" or sampling.top_k or not compile.library():
        return choose_in_torch(logits, sampling, chances)
    logits, chances = logits.float().contiguous(), chances.float().contiguous()
    (B, V), n = logits.shape, chances.shape[1]
    n_threads = min(B, torch.get_num_threads())
    room = torch.empty(n_threads, V + V // _RUN + 1)
    tokens = torch.empty(B, dtype=torch.int64)
    temperature = 0 if sampling.temperature < COLDEST else sampling.temperature
    compile.compiled().choose(
        c_void_p(logits.data_ptr()), B, V,
        *map(c_float, (temperature, sampling.top_p, sampling.min_p)),
        c_void_p(chances.data_ptr()), n, c_void_p(room.data_ptr()), c_void_p(tokens.data_ptr()),
        n_threads,
    )  # fmt: skip
    if int(tokens.min()) < 0:
        rows = (tokens < 0).nonzero().squeeze(1)
        tokens[rows] = choose_in_torch(logits[rows], sampling, chances[rows, -1:])
    return tokens
