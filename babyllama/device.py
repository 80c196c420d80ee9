"""Which device, which number format, how much memory.

Master weights and optimizer state are float32 always; the format is that of the matrix products.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from babyllama.errors import ConfigError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DeviceConfig:
    """Where and in which format to compute.

    Args:
        device: auto takes cuda, else mps, else cpu
        precision: auto takes the fastest format that is safe on the device
    """

    device: Device = "auto"
    precision: Precision = "auto"


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to use.

    raises: ConfigError if a device is named that is not there
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next((name for name, is_there in there.items() if is_there), "cpu")
    if not there.get(wanted, True):
        raise ConfigError(f"device {wanted!r} is not available to torch here; use auto or cpu")
    return torch.device(wanted)


def safe_precision(device: str, card: str = "", capability: tuple[int, int] = (0, 0)) -> str:
    """The fastest format that trains safely.

    device: cuda, mps, cpu, or "cpu-bf16" for a processor with bfloat16 matrix instructions
    card, capability: name and compute capability of a CUDA card
    """
    if device == "cpu-bf16":
        return "bfloat16"
    if device != "cuda":
        return "float32"  # without such instructions bfloat16 is emulated, 40 times slower
    if capability >= (8, 0):
        return "bfloat16"
    # float16 gives NaN on the GTX 16 series (pytorch issue 58123), which has no bfloat16 either,
    # though its compute capability, 7.5, is that of the RTX 20 series.
    if capability >= (7, 0) and not re.search(r"GTX 16|MX\d", card):
        return "float16"
    return "float32"


def pick_precision(device: torch.device, wanted: str = "auto") -> str:
    """The format to use on a device: as wanted, or the fastest safe one."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return safe_precision(
            "cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        )
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return safe_precision("cpu-bf16")
    return safe_precision(device.type)


class Scaler:
    """Autocast, backward and optimizer step in one format.

    float16 needs its loss scaled up so that small gradients do not vanish; the scale is halved
    when a gradient overflows, and that step is skipped.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[Tensor],
        max_norm: float,
        loss: float = 0.0,
    ) -> float:
        """Clip and update. A loss or a gradient that is not finite changes no weight.

        returns: the gradient's norm before clipping; NaN where the loss is not finite
        """
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        norm = norm if math.isfinite(loss) else math.nan
        if math.isfinite(norm):
            self._scaler.step(optimizer)
        self._scaler.update()  # halves the scale where unscale_ met a gradient that overflowed
        optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict:
        return self._scaler.state_dict()

    def load(self, state: dict) -> None:
        # Empty where the run was saved on a device that needs no scaling.
        if state:
            self._scaler.load_state_dict(state)


def memory_gb(device: torch.device) -> float:
    """Memory in use: the peak on a CUDA card, else the process's resident set now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9
