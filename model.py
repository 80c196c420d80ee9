"""The language model: a plain Llama decoder and its loss.

Owns ModelConfig, the layers, the KV cache and the sliced loss. Knows nothing of optimizers,
devices, distribution, adapters or images. Parameter names are those of the LLaMA release;
rotary embeddings pair the first with the second half of each head, as in `transformers`, so an
export is a renaming.

Sources: LLaMA (Touvron et al. 2023, arXiv:2302.13971), RMSNorm (Zhang and Sennrich 2019), rotary
embedding (Su et al. 2021), SwiGLU (Shazeer 2020), grouped queries (Ainslie et al. 2023).
Axes: B batch, T time, D width, H heads, K key/value heads, C head width, V vocabulary, S cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.errors import ConfigError

IGNORED = -100

# Positions whose logits exist at the same time. At V = 65,000 a slice of 256 takes 67 MB, which
# stays near the processor; the whole of B = 32, T = 512 would take 4.3 GB.
SLICE = 256


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
        dim: width D of the residual stream
        n_layers: number of decoder layers
        n_heads: number H of attention heads
        n_kv_heads: number K of key/value heads; null: as many as heads
        vocab_size: vocabulary size V; 0: taken from the tokenizer
        multiple_of: the feed-forward width is rounded up to a multiple of this
        max_seq_len: longest context T in tokens
        rope_theta: base of the rotary embedding
        norm_eps: added to the mean square before its root is taken
        tied: the head shares its weights with the embedding
    """

    dim: int = 256
    n_layers: int = 12
    n_heads: int = 8
    n_kv_heads: int | None = None
    vocab_size: int = 0
    multiple_of: int = 256
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads
        if min(self.dim, self.n_layers, self.n_heads, self.multiple_of, self.max_seq_len) < 1:
            raise ConfigError(f"every size of a model must be at least 1, found {self}")
        if self.dim % self.n_heads or self.head_dim % 2:
            nearest = max(1, self.dim // self.n_heads // 2) * 2 * self.n_heads
            raise ConfigError(
                f"dim {self.dim} must be n_heads {self.n_heads} times an even head width; "
                f"the nearest that fits is {nearest}"
            )
        if not (0 < self.rope_theta < math.inf and 0 <= self.norm_eps < math.inf):
            raise ConfigError(
                f"wanted a rope_theta above 0 and a norm_eps of 0 or more, found "
                f"{self.rope_theta} and {self.norm_eps}"
            )
        if kv_heads < 1 or self.n_heads % kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of 4 D, rounded up."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of

    @property
    def n_parameters(self) -> int:
        """Number of weights of such a model, without making one; a tied head counts once."""
        kv_width = self.kv_heads * self.head_dim
        attention = 2 * self.dim * (self.dim + kv_width)  # wq and wo, wk and wv
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        tables = self.vocab_size * self.dim * (1 if self.tied else 2)
        return tables + self.n_layers * layer + self.dim


class Loss(NamedTuple):
    """Sums over the positions that have a target. Divide once, at the end."""

    loss_sum: Tensor  # (), float32
    n_targets: Tensor  # (), int64
    n_correct: Tensor  # (), int64: the target alone had the largest logit


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of the tokens seen so far, in buffers made once.

    Rows of a batch may begin at different columns (prompts are filled up on the left).

    start: (B,) first column of each row that is not padding
    """

    def __init__(
        self, config: ModelConfig, start: Tensor, size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.n_layers, 2, len(start), config.kv_heads, size, config.head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=start.device)
        self.length = 0
        self._set_start(start)

    def _set_start(self, start: Tensor) -> None:
        self.start = start
        self.first, last = int(start.min()), int(start.max())
        self.ragged = last > 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) of the newest tokens; returns all (B, K, length + T, C) so far."""
        end = self.length + k.shape[2]
        self.buffer[layer, 0, :, :, self.length : end] = k
        self.buffer[layer, 1, :, :, self.length : end] = v
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]

    def keep(self, rows: Tensor, first: int = 0) -> None:
        """Go on with these rows of the batch only (at least one).

        first: the columns before it are the same in each row and the one it takes the place of
        """
        if first:
            new = self.buffer[..., first : self.length, :]
            new.copy_(new[:, :, rows])
        else:
            self.buffer = self.buffer[:, :, rows]
        self._set_start(self.start[rows])


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            w(x).view(B, T, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )  # (B, H or K, T, C)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # One new token sees the whole cache: neither a mask nor causality is needed.
        is_causal = mask is None and (cache is None or T > 1)
        out = self.attend(q, k, v.to(q.dtype), mask, is_causal)
        return self.wo(out.transpose(1, 2).reshape(B, T, D))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """The weighted values (B, H, T, C); mask: as Transformer.segment_mask made it."""
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped
        )


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (c, c + C/2) of x (B, H, T, C) by its position's angle.

    rope: (2, 1 or B, 1, T, C), cosines and signed sines
    """
    swapped = torch.cat((x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return torch.addcmul(x * rope[0], swapped, rope[1]).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama decoder with its head and its loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("vocab_size is 0: it comes from the tokenizer, which was not asked")
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.sliced_loss = SlicedLoss.apply  # what is faster on a device takes its place
        self.init_weights()

    def init_weights(self) -> None:
        """Normal with deviation 0.02; the two projections back into the residual stream are
        scaled down by the root of their number (Radford et al. 2019, section 2.3)."""
        depth_scale = 1 / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                nn.init.ones_(weight)
            else:
                residual = name.endswith((".wo.weight", ".w2.weight"))
                nn.init.normal_(weight, std=0.02 * (depth_scale if residual else 1))

    def n_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(weight.numel() for weight in self.parameters())

    def forward(
        self,
        tokens: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        input_embeds: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        per_position: bool = False,
        chosen: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits (B, T, V), or with targets the summed loss.

        tokens: (B, T) ids, or else input_embeds: (B, T, D)
        targets: (B, T) ids, -100 where there is none
        segments: (B, T) numbers that keep packed documents apart: a token sees earlier tokens
            of its own number only
        cache: continue after the tokens that it holds, and store these
        per_position: with targets, return the loss of each position, (B, T) float32, 0 where
            there is no target
        chosen: (N,) the positions that have a target, of all B T; sought where not given, for
            which a card has to finish all that it was given before
        """
        x = self.hidden(tokens, input_embeds=input_embeds, segments=segments, cache=cache)
        if targets is None:
            return self.output(x)
        if per_position:
            return token_losses(x, self.output.weight, targets)[0]
        x, targets = x.flatten(0, 1), targets.reshape(-1)
        if chosen is None:
            chosen = (targets != IGNORED).nonzero().squeeze(1)
        x, targets = x.index_select(0, chosen), targets[chosen]
        return Loss(*self.sliced_loss(x, self.output.weight, targets))

    def hidden(
        self,
        tokens: Tensor | None = None,
        *,
        input_embeds: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normed last hidden states (B, T, D), of which the head makes logits."""
        if (tokens is None) == (input_embeds is None):
            raise ValueError("give either tokens or input_embeds")
        x = self.tok_embeddings(tokens) if input_embeds is None else input_embeds
        rope, mask = self._positions(x.shape[1], segments, cache)
        for number, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, number)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def _positions(
        self, T: int, segments: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rotary angles of the new tokens, and the columns each may see (None: all so far)."""
        past = cache.length if cache is not None else 0
        length = past + T - (cache.first if cache is not None else 0)
        if length > self.config.max_seq_len:
            raise ConfigError(
                f"{length} tokens do not fit the model's context of {self.config.max_seq_len}"
            )
        columns = torch.arange(past, past + T, device=self.rope.device)
        if segments is not None:
            return self.rope[:, None, None, :T], self.segment_mask(segments)
        if cache is None or not (cache.ragged or (past and T > 1)):
            return self.rope[:, None, None, past : past + T], None
        # Padding on the left is not seen, and each row counts its positions from its own start.
        every = torch.arange(past + T, device=self.rope.device)
        seen = (every <= columns[:, None]) & (every >= cache.start[:, None, None])  # (B, T, S)
        # Padding must see something, or softmax divides by zero; what it computes is not used.
        seen |= every == columns[:, None]
        positions = (columns - cache.start[:, None]).clamp(min=0)
        return self.rope[:, positions][:, :, None], seen[:, None]

    @staticmethod
    def segment_mask(segments: Tensor) -> Tensor:
        """Mask of what each token of packed documents sees, (B, 1, T, T)."""
        columns = torch.arange(segments.shape[1], device=segments.device)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return same & (columns[:, None] >= columns)


def rope_table(config: ModelConfig) -> Tensor:
    """Cosines and signed sines of every position: (2, max_seq_len, C) float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_seq_len).float(), config.rope_theta**-half)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b, which may be of a narrower format, to the total in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class SlicedLoss(torch.autograd.Function):
    """Cross-entropy of a linear head, slice by slice, so that (N, V) logits never exist whole.

    Where gradients are wanted, those of the hidden states and of the head are computed in the
    same pass, from the same logits: none are stored for the backward pass and none are computed
    twice. Only sums are returned; their scale arrives with the backward call.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        size: int = SLICE,
        softmax_loss: Callable | None = None,
        product: Callable = torch.mm,
        add_product: Callable = _add_product,
    ) -> tuple[Tensor, ...]:
        """hidden (N, D), weight (V, D), targets (N,) without ignored ones.

        softmax_loss, product, add_product: what a device computes faster (cuda/attention.py)
        """
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        softmax_loss, dtype = softmax_loss or _softmax_loss, matmul_dtype(hidden)
        w = weight.to(dtype)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        loss_sum = torch.zeros((), device=hidden.device)
        n_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), size):
                part, goal = hidden[start : start + size].to(dtype), targets[start : start + size]
                losses, correct, error = softmax_loss(product(part, w.t()), goal)
                loss_sum += losses.sum()
                n_correct += correct.sum()
                if not (want_hidden or want_weight):
                    continue
                error = error.to(dtype)  # (slice, V): the gradient of the logits
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = error @ w
                if grad_weight is not None:
                    add_product(grad_weight, error.t(), part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        n_targets = torch.full((), len(targets), device=hidden.device)
        ctx.mark_non_differentiable(n_targets, n_correct)
        return loss_sum, n_targets, n_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 5


def matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), hits (N,) and the gradient of the logits (N, V), which takes their place."""
    logits = logits.float()
    aimed = logits.gather(1, targets[:, None])  # (N, 1)
    largest = logits.amax(dim=1, keepdim=True)
    hits = (aimed >= largest).squeeze(1)
    powers = logits.sub_(largest).exp_()
    # Of equal logits none is the largest: a model that has run away is not right everywhere.
    hits[hits.clone()] = (powers[hits] == 1).sum(dim=1) == 1
    total = powers.sum(dim=1, keepdim=True)
    losses = (total.log() + largest - aimed).squeeze(1)
    error = powers.div_(total)
    error[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, hits, error


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each position, differentiable, and whether its target was the likeliest token:
    (B, T) float32 and bool, 0 and false where there is no target. Logits exist by slices."""
    chosen = targets != IGNORED
    losses, hits = [], []
    for part, goal in zip(hidden[chosen].split(SLICE), targets[chosen].split(SLICE), strict=True):
        logits = F.linear(part, weight).float()
        losses.append(F.cross_entropy(logits, goal, reduction="none"))
        hits.append(logits.argmax(dim=1) == goal)
    none = torch.zeros(targets.shape, device=hidden.device)
    found, right = torch.cat(losses), torch.cat(hits)
    return none.masked_scatter(chosen, found), none.bool().masked_scatter(chosen, right)
