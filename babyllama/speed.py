"""How much a token costs and how much the device can do: the two halves of MFU.

MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the share of the device's greatest
rate of multiplications that training uses. Recomputed activations do not count as work.
"""

import time

import torch

from babyllama.parallel import World
from model import Transformer

# Dense rates in 10^12 operations a second by the makers' data sheets, with float32 sums:
# (name contains, float32, float16, bfloat16). The first that fits is taken.
CARDS = (
    ("H200", 67, 989, 989),
    ("H100 PCIe", 51, 756, 756),
    ("H100", 67, 989, 989),
    ("A100", 19.5, 312, 312),
    ("A10G", 31.2, 70, 70),
    ("L40S", 91.6, 362, 362),
    ("L4", 30.3, 121, 121),
    ("V100", 15.7, 125, 0),
    ("T4", 8.1, 65, 0),
    ("4090", 82.6, 165, 165),
    ("3090", 35.6, 71, 71),
    ("3080", 29.8, 59.5, 59.5),
    ("3060", 12.7, 25.6, 25.6),
    ("2080 Ti", 13.4, 53.8, 0),
    ("1660 Ti", 5.4, 0, 0),
)


def flops_per_token(model: Transformer) -> int:
    """Operations of a training step for one token: six for each weight of a matrix product, and
    those of causal attention over a full context. The embedding only looks up."""
    config = model.config
    weights = sum(w.numel() for w in model.layers.parameters() if w.dim() == 2)
    weights += model.output.weight.numel()
    return 6 * weights + 6 * config.n_layers * config.dim * config.max_seq_len


def mfu_per_rate(model: Transformer, world: World, precision: str) -> float:
    """The share of all devices' rate that one token a second uses."""
    return flops_per_token(model) / (peak_flops(world.device, precision)[0] * world.size)


def tabulated_peak(card: str, precision: str) -> float:
    """Operations a second of a card as its maker states them; 0 where the table does not know."""
    column = ("float32", "float16", "bfloat16").index(precision) + 1
    return next((row[column] * 1e12 for row in CARDS if row[0] in card), 0.0)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Operations a second that the device can do, and whether that is stated or measured."""
    if device.type == "cuda":
        stated = tabulated_peak(torch.cuda.get_device_name(device), precision)
        if stated:
            return stated, "stated"
    return measured_peak(device, precision), "measured"


def measured_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a square product, the best of three. Random state stays untouched."""
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    best = 0.0
    for _ in range(4):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
