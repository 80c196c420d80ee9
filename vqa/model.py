"""A vision-language model: encoder and connector in front of an unchanged Transformer.

In a sequence, positions of images have negative ids: -1 - n is position n of all positions of
the batch's images, one image after the other. The embeddings of such positions are what the
connector gives, passed to the Transformer as `input_embeds`; they are no targets. Three connectors
behind one key, all with the same `Projector`, so that a comparison compares the rest:

    splice     each place at each depth becomes one position of the sequence, by a small MLP
    resampler  a few learned queries look at all of these and become the positions
               (Jaegle et al. 2021, arXiv:2103.03206; Alayrac et al. 2022, arXiv:2204.14198)
    cross      no positions; chosen layers look at them through gated cross-attention, which is
               hooked on and begins closed (Alayrac et al. 2022, section 2.2); `image_of` says
               which image each row looks at
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.checkpoint import Loaded, load_weights, read_checkpoint
from babyllama.config import plain, shown
from babyllama.cpu.decoder import choose
from babyllama.decoder import Decoder
from babyllama.errors import CheckpointError, ConfigError, require
from babyllama.run_dir import find_checkpoint
from model import KVCache, Loss, ModelConfig, Transformer
from vqa.encoders import Encoder, EncoderConfig, make_encoder
from vqa.images import normalise

PARTS = ("encoder", "connector", "language")


@dataclass(frozen=True)
class FusionConfig:
    """Connection of images to the language model.

    Args:
        kind: splice, resampler or cross
        n_queries: positions of an image, for resampler
        n_blocks: how often the queries look, for resampler
        layers: the layers that look, for cross; empty: all
        dropout: share of the features that is left out at random in training, against overfitting
    """

    kind: Literal["splice", "resampler", "cross"] = "splice"
    n_queries: int = 8
    n_blocks: int = 2
    layers: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        wanted = {
            "n_queries": ("1 or more", self.n_queries >= 1),
            "n_blocks": ("1 or more", self.n_blocks >= 1),
            "layers": ("numbers of 0 or more", min(self.layers, default=0) >= 0),
            "dropout": ("0 to below 1", 0 <= self.dropout < 1),
        }
        require("fusion", self, wanted)


def n_positions(fusion: FusionConfig, encoder: EncoderConfig) -> int:
    """Number of positions of a sequence that an image takes."""
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


class VqaModel(nn.Module):
    """The three parts as one model for the training loop.

    rates: shares of the learning rate by the beginnings of parameter names
    """

    def __init__(self, language: Transformer, encoder: Encoder, fusion: FusionConfig) -> None:
        super().__init__()
        self.language, self.encoder, self.fusion = language, encoder, fusion
        config = encoder.config
        self.connector = Connector(fusion, config, encoder.widths, language.config)
        self.n_positions = n_positions(fusion, config)
        self.rates: dict[str, float] = {}
        self._memory: Tensor | None = None  # (B, M, D) what the gates look at
        for number, gate in self.connector.gates.items():
            language.layers[int(number)].register_forward_pre_hook(self._hook(gate))

    def _hook(self, gate: nn.Module):
        def look(_: nn.Module, args: tuple) -> tuple | None:
            if self._memory is None:
                return None  # a dialogue without an image
            memory = self._memory.expand(len(args[0]), -1, -1)
            return (gate(args[0], memory), *args[1:])

        return look

    @property
    def config(self) -> ModelConfig:
        return self.language.config

    @property
    def layers(self) -> nn.ModuleList:
        return self.language.layers

    @property
    def output(self) -> nn.Linear:
        return self.language.output

    @property
    def more_info(self) -> dict:
        """What a checkpoint says of it beside the language model's shape."""
        return {"vqa": {"encoder": plain(self.encoder.config), "fusion": plain(self.fusion)}}

    def n_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def train(self, mode: bool = True) -> "VqaModel":
        """Parts that are frozen stay as in use: their norms keep what they know."""
        super().train(mode)
        if not any(w.requires_grad for w in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def freeze(self, beginnings: Sequence[str]) -> "VqaModel":
        """Train all parameters but those whose names begin so.

        raises: ConfigError if a beginning fits no parameter, or nothing is left to train
        """
        names = [name for name, _ in self.named_parameters()]
        unmatched = [b for b in beginnings if not any(name.startswith(b) for name in names)]
        if unmatched:
            raise ConfigError(f"freeze: {unmatched} begin no name; names begin {', '.join(PARTS)}")
        for name, weight in self.named_parameters():
            is_statistic = name.endswith((".running_mean", ".running_var"))
            weight.requires_grad_(not is_statistic and not name.startswith(tuple(beginnings)))
        if not any(w.requires_grad for w in self.parameters()):
            raise ConfigError(f"freeze {list(beginnings)} leaves nothing to train")
        return self

    def see(self, pixels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """What the language model gets of images: (N, M, D).

        pixels: (N, squares, 3, S, S) uint8, or else features: as the encoder gives them
        """
        if features is None:
            features = self.encoder(normalise(pixels, self.encoder.config.normalisation))
        return self.connector(features.to(self.language.output.weight.dtype))

    def embed(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens, those of negative ids taken from `seen` (N, M, D)."""
        embeds = self.language.tok_embeddings(tokens.clamp(min=0))
        is_seen = tokens < 0
        if not self.n_positions or not bool(is_seen.any()):
            return embeds
        rows = seen.flatten(0, 1)[-1 - tokens[is_seen]].to(embeds.dtype)
        return embeds.index_put((is_seen,), rows)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        image_of: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits (B, T, V), or with targets the summed loss, as model.py has it.

        image_of: (B,) the image of each row, a number below N
        pixels, features: as in `see`
        """
        seen = self.see(pixels, features)
        embeds = self.embed(tokens, seen)
        with self.looking_at(seen[image_of]):
            return self.language(targets=targets, input_embeds=embeds, chosen=chosen)

    @contextlib.contextmanager
    def looking_at(self, memory: Tensor) -> Iterator[None]:
        """As long as the block runs, the gates look at this: a row for each, or one for all."""
        self._memory = memory if len(self.connector.gates) else None
        try:
            yield
        finally:
            self._memory = None

    def decoder(self, seen: Tensor) -> Decoder:
        """What writes replies (generate.py) to prompts with positions of these images (N, M, D).

        To be used inside of `looking_at`.
        """
        net = self.language

        def read(tokens: Tensor, cache: KVCache) -> Tensor:
            hidden = net.hidden(input_embeds=self.embed(tokens, seen), cache=cache)
            return net.output(hidden[:, -1]).float()

        def step(tokens: Tensor, cache: KVCache) -> Tensor:
            return read(tokens[:, None], cache)

        return Decoder(net, step, str(net.output.weight.dtype)[6:], reader=read, choose=choose)


def with_image(ids: Sequence[int], image: int, n_positions: int) -> list[int]:
    """A rendered dialogue with the positions of an image behind its <bos>.

    image: its number in the batch
    """
    first = image * n_positions
    return [ids[0], *range(-1 - first, -1 - first - n_positions, -1), *ids[1:]]


def load(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """Load a checkpoint that answers about images, strictly, in evaluation mode.

    path: a checkpoint, or a run for its newest one
    raises: CheckpointError if it is missing, damaged, or of another kind
    """
    path = find_checkpoint(Path(path))
    info, tokenizer, weights = read_checkpoint(path)
    if info["kind"] != "vqa" or not isinstance(info.get("vqa"), dict):
        raise CheckpointError(
            f"{shown(path)}: wanted a checkpoint of python -m vqa.train, found one of kind "
            f"{info['kind']!r}, which sees no images; for this one use chat.py"
        )
    try:
        kept = dict(info["vqa"]["encoder"])
        kept.pop("eps", None)  # of checkpoints made before
        config = EncoderConfig(**kept | {"depths": tuple(kept["depths"])})
        stored = info["vqa"]["fusion"]
        fusion = FusionConfig(**stored | {"layers": tuple(stored["layers"])})
        # The weights are in the checkpoint; where they once came from is not asked.
        encoder = make_encoder(replace(config, weights=None))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{shown(path)}: model.yaml cannot be, found {error!r}") from None
    encoder.config = config
    model = VqaModel(Transformer(info["model"]), encoder, fusion)
    load_weights(model, weights, path)
    return Loaded(model.to(device).eval(), tokenizer, info["step"], path, info["kind"])
