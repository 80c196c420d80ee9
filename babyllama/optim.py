"""AdamW and the learning rate.

AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only; linear warm-up, then half a
cosine down to a tenth.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from babyllama.errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        lr: highest learning rate
        min_lr_ratio: the schedule ends at this share of lr
        warmup_steps: steps from 0 up to lr
        weight_decay: on matrices; norms have none
        beta1: decay of the mean gradient
        beta2: decay of the mean squared gradient
        max_grad_norm: longer gradients are shortened to this
    """

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        # Written so that NaN, which compares as false, is refused.
        wanted = {
            "lr": ("a number above 0", 0 < self.lr < math.inf),
            "min_lr_ratio": ("0 to 1", 0 <= self.min_lr_ratio <= 1),
            "warmup_steps": ("0 or more", self.warmup_steps >= 0),
            "weight_decay": ("0 or more", 0 <= self.weight_decay < math.inf),
            "beta1": ("0 to below 1", 0 <= self.beta1 < 1),
            "beta2": ("0 to below 1", 0 <= self.beta2 < 1),
            "max_grad_norm": ("more than 0", self.max_grad_norm > 0),
        }
        bad = [
            f"optim.{name} wants {what}, found {getattr(self, name)}"
            for name, (what, is_good) in wanted.items()
            if not is_good
        ]
        if bad:
            raise ConfigError("; ".join(bad))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that train, in two groups: decayed matrices and the rest."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in trained if w.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of the update that follows `step` finished ones."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
