"""A language model that sees: encoder and connector in front of an unchanged Transformer.

In a sequence, positions of pictures have negative ids: -1 - n is position n of all positions of
the batch's pictures, one picture after the other. The embeddings of such positions are what the
connector gives; they are no targets. With fusion "cross" there are none, and `picture_of` says
which picture each row looks at. The Transformer gets `input_embeds` and knows of nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from babyllama.checkpoint import load_weights, read_checkpoint
from babyllama.config import shown
from babyllama.cpu import draw
from babyllama.errors import CheckpointError, ConfigError
from babyllama.generate import Decoder
from babyllama.run_dir import find_checkpoint
from model import KVCache, Loss, ModelConfig, Transformer
from tokenizer import Tokenizer
from vqa.encoders import Encoder, EncoderConfig, make_encoder
from vqa.fusion import Connector, FusionConfig, n_positions
from vqa.images import normalise

PARTS = ("encoder", "connector", "language")


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
                return None  # a dialogue without a picture
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
        encoder = {**asdict(self.encoder.config), "eps": getattr(self.encoder.net, "eps", None)}
        return {"vqa": {"encoder": _plain(encoder), "fusion": _plain(asdict(self.fusion))}}

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
        """What the language model gets of pictures: (N, M, D).

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
        picture_of: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits (B, T, V), or with targets the summed loss, as model.py has it.

        picture_of: (B,) the picture of each row, a number below N
        pixels, features: as in `see`
        """
        seen = self.see(pixels, features)
        embeds = self.embed(tokens, seen)
        with self.looking_at(seen[picture_of]):
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
        """What writes replies (generate.py) to prompts with positions of these pictures (N, M, D).

        To be used inside of `looking_at`.
        """
        net = self.language

        def read(tokens: Tensor, cache: KVCache) -> Tensor:
            hidden = net.hidden(input_embeds=self.embed(tokens, seen), cache=cache)
            return net.output(hidden[:, -1]).float()

        def step(tokens: Tensor, cache: KVCache) -> Tensor:
            return read(tokens[:, None], cache)

        return Decoder(net, step, str(net.output.weight.dtype)[6:], reader=read, choose=draw.choose)


def _plain(settings: dict) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def with_picture(ids: Sequence[int], picture: int, n_positions: int) -> list[int]:
    """A rendered dialogue with the positions of a picture behind its <bos>.

    picture: its number in the batch
    """
    first = picture * n_positions
    return [ids[0], *range(-1 - first, -1 - first - n_positions, -1), *ids[1:]]


class Loaded(NamedTuple):
    """A checkpoint that answers about pictures, ready to use."""

    model: VqaModel
    tokenizer: Tokenizer
    step: int
    path: Path


def load(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """Load a checkpoint strictly, in evaluation mode.

    path: a checkpoint, or a run for its newest one
    raises: CheckpointError if it is missing, damaged, or of another kind
    """
    path = find_checkpoint(Path(path))
    info, tokenizer, weights = read_checkpoint(path)
    if info["kind"] != "vqa" or not isinstance(info.get("vqa"), dict):
        raise CheckpointError(
            f"{shown(path)}: wanted a checkpoint of python -m vqa.train, found one of kind "
            f"{info['kind']!r}, which sees no pictures; for this one use chat.py"
        )
    try:
        kept = dict(info["vqa"]["encoder"])
        eps = kept.pop("eps")
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        # The weights are in the checkpoint; where they once came from is not asked.
        config, origin = EncoderConfig(**{**kept, "weights": None}), kept["weights"]
        fusion = dict(info["vqa"]["fusion"])
        fusion = FusionConfig(**{**fusion, "layers": tuple(fusion["layers"])})
        encoder = make_encoder(config)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{shown(path)}: model.yaml cannot be, found {error!r}") from None
    encoder.config = EncoderConfig(**{**kept, "weights": origin})
    if eps is not None:
        encoder.net.set_eps(eps)
    model = VqaModel(Transformer(info["model"]), encoder, fusion)
    load_weights(model, weights, path)
    return Loaded(model.to(device).eval(), tokenizer, info["step"], path)
