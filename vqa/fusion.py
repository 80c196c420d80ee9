"""How what the encoder sees reaches the language model: three ways behind one key.

    splice     each place at each depth becomes one position of the sequence, by a small MLP
    resampler  a few learned queries look at all of these and become the positions
               (Jaegle et al. 2021, arXiv:2103.03206; Alayrac et al. 2022, arXiv:2204.14198)
    cross      no positions; chosen layers look at them through gated cross-attention, which is
               hooked on from outside and begins closed (Alayrac et al. 2022, section 2.2)

All begin with the same `Projector`, so that a comparison compares the rest.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.errors import ConfigError
from model import ModelConfig
from vqa.encoders import EncoderConfig


@dataclass(frozen=True)
class FusionConfig:
    """How pictures reach the language model.

    Args:
        kind: splice, resampler or cross
        n_queries: positions of a picture, for resampler
        n_blocks: how often the queries look, for resampler
        layers: the layers that look, for cross; empty: all
        dropout: share of the features that is left out at random in training, against learning
            few photos by heart
    """

    kind: Literal["splice", "resampler", "cross"] = "splice"
    n_queries: int = 8
    n_blocks: int = 2
    layers: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.n_queries, self.n_blocks) < 1 or min(self.layers, default=0) < 0:
            raise ConfigError(
                f"fusion wants n_queries and n_blocks of 1 or more and layers from 0, found {self}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"fusion.dropout wants 0 or more and less than 1, found {self.dropout}"
            )


def n_positions(fusion: FusionConfig, encoder: EncoderConfig) -> int:
    """How many positions of a sequence a picture takes."""
    each = {"splice": encoder.n_places * len(encoder.depths), "resampler": fusion.n_queries}
    return each.get(fusion.kind, 0)


class Projector(nn.Module):
    """Features as vectors of the language model's width, one for each place and depth."""

    def __init__(self, widths: tuple[int, ...], n_places: int, dim: int) -> None:
        super().__init__()
        self.widths = widths
        self.depths = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(w), nn.Linear(w, dim), nn.GELU(), nn.Linear(dim, dim))
            for w in widths
        )
        self.place = nn.Parameter(torch.randn(len(widths), n_places, dim) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(N, places, sum of widths) → (N, depths · places, dim)."""
        parts = features.split(self.widths, dim=2)
        seen = [net(x) + p for net, x, p in zip(self.depths, parts, self.place, strict=True)]
        return torch.cat(seen, dim=1)


class CrossAttention(nn.Module):
    """Attention of x (B, T, D) over a memory (B, M, D).

    may_pass: it may also look at nothing, a key and a value of zeros. Attention always adds up to
        1, so without it a word that fits no place looks like one that fits.
    """

    def __init__(self, dim: int, n_heads: int, may_pass: bool = False) -> None:
        super().__init__()
        self.n_heads, self.may_pass = n_heads, may_pass
        self.norm, self.memory_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wkv = nn.Linear(dim, 2 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.wq(self.norm(x)).view(B, T, self.n_heads, -1).transpose(1, 2)
        kv = self.wkv(self.memory_norm(memory)).view(B, -1, 2, self.n_heads, D // self.n_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, M, C) each
        if self.may_pass:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.wo(mixed.transpose(1, 2).reshape(B, T, D))


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
    )


class Resampler(nn.Module):
    """Learned queries that look at a memory several times."""

    def __init__(self, dim: int, n_heads: int, n_queries: int, n_blocks: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_queries, dim) * 0.02)
        self.looks = nn.ModuleList(CrossAttention(dim, n_heads) for _ in range(n_blocks))
        self.thinks = nn.ModuleList(_mlp(dim) for _ in range(n_blocks))

    def forward(self, memory: Tensor) -> Tensor:
        x = self.queries.expand(len(memory), -1, -1)
        for look, think in zip(self.looks, self.thinks, strict=True):
            x = x + look(x, memory)
            x = x + think(x)
        return x


class Gate(nn.Module):
    """A look at the memory before a layer. Both gates begin at tanh(0): the layer's input is then
    what it would be without."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.look, self.think = CrossAttention(dim, n_heads, may_pass=True), _mlp(dim)
        self.open_look, self.open_think = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.open_look.tanh() * self.look(x, memory)
        return x + self.open_think.tanh() * self.think(x)


class Connector(nn.Module):
    """Everything between encoder and language model.

    gates: by the number of the layer that they stand before; only for cross
    """

    def __init__(
        self,
        fusion: FusionConfig,
        encoder: EncoderConfig,
        widths: tuple[int, ...],
        language: ModelConfig,
    ) -> None:
        super().__init__()
        dim, heads = language.dim, language.n_heads
        self.dropout = nn.Dropout(fusion.dropout)
        self.projector = Projector(widths, encoder.n_places, dim)
        self.resampler, self.gates = None, nn.ModuleDict()
        if fusion.kind == "resampler":
            self.resampler = Resampler(dim, heads, fusion.n_queries, fusion.n_blocks)
        elif fusion.kind == "cross":
            chosen = fusion.layers or range(language.n_layers)
            wrong = [n for n in chosen if n >= language.n_layers]
            if wrong:
                raise ConfigError(
                    f"fusion.layers {wrong}: the language model has layers 0 to "
                    f"{language.n_layers - 1}; choose among these"
                )
            self.gates = nn.ModuleDict({str(n): Gate(dim, heads) for n in chosen})

    def forward(self, features: Tensor) -> Tensor:
        """(N, places, sum of widths) → (N, M, dim): positions of a sequence, or a memory."""
        seen = self.projector(self.dropout(features))
        return seen if self.resampler is None else self.resampler(seen)
