"""Regularisation against overfitting a small set: dropout of what embedding and layers add (Vaswani
et al. 2017, section 5.4), by hooks.

It works in training alone. What is drawn belongs to the step (the loop seeds it), so a run that
goes on draws what it would have drawn. The average of checkpoints is in average.py.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from babyllama.errors import require
from model import Transformer


@dataclass(frozen=True)
class RegulariseConfig:
    """Against overfitting, for sets that are small.

    Args:
        dropout: share of the numbers that are dropped from what embedding and layers add
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        require("regularise", self, {"dropout": ("0 to below 1", 0 <= self.dropout < 1)})


def regularise(model: Transformer, cfg: RegulariseConfig) -> Transformer:
    """The model with dropout, which evaluation does not see. Weights keep their names.

    To be called before the model is wrapped or compiled.
    """
    if cfg.dropout:

        def drop(module: nn.Module, _: tuple, out: Tensor) -> Tensor:
            return F.dropout(out, cfg.dropout, module.training)

        model.tok_embeddings.register_forward_hook(drop)
        for layer in model.layers:
            layer.attention.register_forward_hook(drop)
            layer.feed_forward.register_forward_hook(drop)
    return model
