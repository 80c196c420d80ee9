"""AdamW, Muon and the learning rate.

AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only; Muon (Jordan et al. 2024) for
the layers' matrices as an option; linear warm-up, then half a cosine or a straight line down.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from babyllama.distributed import share_of, whole
from babyllama.errors import require


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        name: adamw, or muon for the matrices of the layers and adamw for all else
        lr: highest learning rate
        min_lr_ratio: the schedule ends at this share of lr
        warmup_steps: steps from 0 up to lr
        decay: from lr to its share along half a cosine or a straight line; a share of 1 holds lr,
            so that a run can be ended at any step, and another one goes on and decays to 0
        from_base: begin with the state of the base's optimizer, not only with its weights
        weight_decay: on matrices; norms have none
        beta1: decay of the mean gradient
        beta2: decay of the mean squared gradient
        momentum: of muon
        max_grad_norm: longer gradients are shortened to this
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    from_base: bool = False
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        wanted = {
            "lr": ("a number above 0", 0 < self.lr < math.inf),
            "min_lr_ratio": ("0 to 1", 0 <= self.min_lr_ratio <= 1),
            "warmup_steps": ("0 or more", self.warmup_steps >= 0),
            "weight_decay": ("0 or more", 0 <= self.weight_decay < math.inf),
            "beta1": ("0 to below 1", 0 <= self.beta1 < 1),
            "beta2": ("0 to below 1", 0 <= self.beta2 < 1),
            "momentum": ("0 to below 1", 0 <= self.momentum < 1),
            "max_grad_norm": ("more than 0", self.max_grad_norm > 0),
        }
        require("optim", self, wanted)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of the parameters that train: decayed matrices and the rest in groups."""
    by_muon, rest = [], []
    for name, weight in model.named_parameters():
        is_inner = name.startswith("layers.") and weight.dim() == 2
        if weight.requires_grad:
            (by_muon if config.name == "muon" and is_inner else rest).append(weight)
    groups = [
        {"params": [w for w in rest if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [part for group in groups for part in by_rate(group, model)]
    if by_muon:
        muon = {"params": by_muon, "weight_decay": config.weight_decay}
        groups.append({**muon, "momentum": config.momentum})
    kind = MuonAdamW if by_muon else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def by_rate(group: dict, model: nn.Module) -> list[dict]:
    """A group divided by the shares of lr that `model.rates`, if it has that, gives to names by
    their beginnings."""
    rates, parts = getattr(model, "rates", {}), {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for weight in group["params"] if rates else ():
        name = names[id(weight)]
        rate = next((rate for start, rate in rates.items() if name.startswith(start)), 1.0)
        parts.setdefault(rate, []).append(weight)
    return [group | {"params": part, "rate": rate} for rate, part in parts.items()] or [group]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with a `momentum` are updated by Muon instead.

    torch.optim.Muon multiplies in bfloat16, which processors without such instructions emulate
    forty times slower; and it has no part for the parameters that are no matrices.
    """

    param_groups: list[dict]

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._update(group)

    def _update(self, group: dict) -> None:
        """A step of Muon; matrices of one shape are turned together."""
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            mean = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
            ahead = whole(weight.grad.lerp(mean, group["momentum"]))  # Nesterov
            alike.setdefault(ahead.shape, []).append((weight, ahead))
        for shape, pairs in alike.items():
            # So its elements are as large as those of an AdamW update, and lr means the same
            # (Liu et al. 2025, arXiv:2502.16982, section 2.2).
            size = 0.2 * math.sqrt(max(shape))
            turned = orthogonal(torch.stack([ahead for _, ahead in pairs]))
            for (weight, _), update in zip(pairs, turned, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(share_of(weight, update), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrices with orthogonal rows or columns: every singular value becomes 0.7
    to 1.2, by a Newton-Schulz iteration with Jordan's coefficients.

    matrices: (..., n, m); multiplied in bfloat16 where the device has fast products of it
    """
    is_fast = matrices.is_cuda or (matrices.is_cpu and torch.cpu._is_avx512_bf16_supported())
    lengths = matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = (matrices / lengths).to(torch.bfloat16 if is_fast else matrices.dtype)
    x = x.reshape(-1, *matrices.shape[-2:])
    x = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(steps):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    x = x.mT if matrices.shape[-2] > matrices.shape[-1] else x
    return x.reshape(matrices.shape).to(matrices.dtype)


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, torch.Size]]:
    """State of each parameter by shapes, once the optimizer has made a step."""
    return {
        weight: (
            {"momentum_buffer": weight.shape}
            if "momentum" in group
            else {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        )
        for group in optimizer.param_groups
        for weight in group["params"]
    }


def n_kept(optimizer: torch.optim.Optimizer) -> int:
    """Count of the numbers that the optimizer keeps once it has made a step."""
    shapes = (shape for state in state_shapes(optimizer).values() for shape in state.values())
    return sum(shape.numel() for shape in shapes)


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of the update that follows `step` finished ones."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
