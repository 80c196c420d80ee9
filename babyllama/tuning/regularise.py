"""Regularisation against overfitting a small set: dropout and noise by hooks; label smoothing.

Each is off by default and works in training alone. What is drawn belongs to the step (the loop
seeds it), so a run that goes on draws what it would have drawn. The average of weights is in
optim.py (`ema`), that of checkpoints in average.py.

Sources: dropout of what a layer adds (Vaswani et al. 2017, section 5.4), label smoothing (Szegedy
et al. 2016), NEFTune (Jain et al. 2023, arXiv:2310.05914).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.errors import require
from model import Transformer


@dataclass(frozen=True)
class RegulariseConfig:
    """Regularisers, for sets that are small.

    Args:
        dropout: share of the numbers that are dropped from what embedding and layers add
        label_smoothing: share of each target that is spread over the whole vocabulary
        noise: NEFTune's alpha, the size of the noise on the embeddings; 5 to 15 are usual
    """

    dropout: float = 0.0
    label_smoothing: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        wanted = {
            "dropout": ("0 to below 1", 0 <= self.dropout < 1),
            "label_smoothing": ("0 to below 1", 0 <= self.label_smoothing < 1),
            "noise": ("0 or more", 0 <= self.noise < math.inf),
        }
        require("regularise", self, wanted)


def regularise(model: Transformer, cfg: RegulariseConfig) -> Transformer:
    """The model with dropout and noise, which evaluation does not see. Weights keep their names.

    To be called before the model is wrapped or compiled.
    """
    if cfg.noise:
        noise = Noise(cfg.noise)
        model.register_forward_pre_hook(noise.look, with_kwargs=True)
        model.tok_embeddings.register_forward_hook(noise.add)
    if cfg.dropout:

        def drop(module: nn.Module, _: tuple, out: Tensor) -> Tensor:
            return F.dropout(out, cfg.dropout, module.training)

        model.tok_embeddings.register_forward_hook(drop)
        for layer in model.layers:
            layer.attention.register_forward_hook(drop)
            layer.feed_forward.register_forward_hook(drop)
    return model


class Noise:
    """Uniform noise on embeddings, alpha / sqrt(L D) at most, L the length of the document."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None

    def look(self, _: nn.Module, __: tuple, kwargs: dict) -> None:
        """Note how long the document is that each position belongs to."""
        segments = kwargs.get("segments")
        self._lengths = None if segments is None else lengths_of(segments)

    def add(self, module: nn.Module, _: tuple, out: Tensor) -> Tensor:
        """The embeddings (B, T, D) with noise."""
        if not module.training:
            return out
        lengths = out.shape[1] if self._lengths is None else self._lengths[..., None]  # (B, T, 1)
        noise = torch.rand_like(out) * 2 - 1
        return out + noise * (self.alpha / (lengths * out.shape[2]) ** 0.5)


def lengths_of(segments: Tensor) -> Tensor:
    """Number of positions of its sequence that have the number of each, (B, T)."""
    # There are no more of them than positions; the largest number is the card's to know.
    counts = segments.new_zeros(len(segments), segments.shape[1] + 1)
    counts = counts.scatter_add(1, segments, torch.ones_like(segments))
    return counts.gather(1, segments)
