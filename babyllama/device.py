"""Device, number format and memory.

Master weights and optimizer state are float32 always; the format is that of the matrix products.
"""

import contextlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from babyllama.distributed import World, whole
from babyllama.errors import ConfigError
from model import Loss

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DeviceConfig:
    """Device and number format.

    Args:
        device: auto takes cuda, else mps, else cpu
        precision: auto takes the fastest format that is safe on the device
        deterministic: on CUDA cards, too, the same run gives the same bits, and one that goes on
            those of one that never stopped, as on a processor; slower, and wants
            CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment
    """

    device: Device = "auto"
    precision: Precision = "auto"
    deterministic: bool = False


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to use. A card that this torch has no kernels for is left out, with a warning.

    raises: ConfigError if a device is named that is not there, or such a card
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there["cuda"] and wanted in ("auto", "cuda"):
        fault = kernels_missing(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(),
            torch.cuda.get_arch_list(),
        )  # fmt: skip
        if fault and wanted == "cuda":
            raise ConfigError(fault)
        if fault:
            warnings.warn(f"{fault}; computing on the processor", RuntimeWarning, stacklevel=2)
            there["cuda"] = False
    if wanted == "auto":
        wanted = next((name for name, is_there in there.items() if is_there), "cpu")
    if not there.get(wanted, True):
        raise ConfigError(f"device {wanted!r} is not available to torch here; use auto or cpu")
    return torch.device(wanted)


def kernels_missing(card: str, capability: tuple[int, int], kernels: list[str]) -> str:
    """Reason why this torch cannot compute on a card; empty where it can.

    A kernel for sm_86 runs on cards of capability 8.6 to 8.9; compute_90 is compiled for any later.

    kernels: torch.cuda.get_arch_list()
    """
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in kernels]
    for kind, major, minor in (match.groups() for match in known if match):
        made_for = (int(major), int(minor))
        if made_for <= capability and (kind == "compute" or made_for[0] == capability[0]):
            return ""
    found = " ".join(kernels) or "none"
    return (
        f"wanted a torch with kernels for {card} (sm_{capability[0]}{capability[1]}), found one "
        f"for {found}; cards before the RTX 20 series need a build with CUDA 12.6 (cu126), or use "
        f"--device cpu"
    )


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """Let all kernels of a card give the same bits each time; a processor's do anyway.

    raises: ConfigError if the environment lacks what cuBLAS reads before its first call
    """
    if wanted and device.type == "cuda" and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        raise ConfigError(
            "device.deterministic wants CUBLAS_WORKSPACE_CONFIG in the environment, found none; "
            "start with CUBLAS_WORKSPACE_CONFIG=:4096:8 python …"
        )
    torch.use_deterministic_algorithms(wanted and device.type == "cuda")


@contextlib.contextmanager
def for_replies() -> Iterator[None]:
    """A run's samples: nothing is compiled, as each length would be anew, and kernels may add in
    any order, as drawing has no others on a card."""
    is_exact = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.use_deterministic_algorithms(is_exact)


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
    # though its compute capability, 7.5, is that of the RTX 20 series; and on other cards of the
    # same chips, MX450 and T400 to T2000.
    if capability >= (7, 0) and not re.search(r"GTX 16|MX\d|\bT([456][05]0|1[02]00|2000)\b", card):
        return "float16"
    return "float32"


def checked_precision(
    device: str, card: str, capability: tuple[int, int], wanted: str
) -> tuple[str, str]:
    """The format to use and a warning, empty where there is none; arguments as safe_precision."""
    safe = safe_precision(device, card, capability)
    unsafe = {"float16": ("float32",), "bfloat16": ("float32", "float16")}.get(wanted, ())
    is_bad = device == "cuda" and safe in unsafe
    if not is_bad and (device, wanted) != ("cpu", "bfloat16"):
        return (safe if wanted == "auto" else wanted), ""
    why = "gives NaN or is slow" if wanted == "float16" else "is emulated, and slow,"
    return "float32", f"{wanted} {why} on {card or device}; float32 instead"


def open_scaler(device: torch.device, config: DeviceConfig) -> "Scaler":
    """Scaler of a device, as the settings say; its `warning` says what is done otherwise."""
    set_deterministic(device, config.deterministic)
    kind, card, capability = device.type, "", (0, 0)
    if kind == "cuda":
        card = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
    elif kind == "cpu" and torch.cpu._is_avx512_bf16_supported():
        kind = "cpu-bf16"
    found = checked_precision(kind, card, capability, config.precision)
    return Scaler(device, *found)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch where the model is.

    Not to wait for a card, it goes there from pinned memory, and with the positions that have a
    target (`chosen` of the model's forward).
    """
    if device.type == "cpu":
        return batch
    batch = batch | {"chosen": (batch["targets"].reshape(-1) >= 0).nonzero().squeeze(1)}
    pinned = device.type == "cuda"
    return {
        key: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        for key, value in batch.items()
    }


def ahead(
    make: Callable[[int], list[dict[str, Tensor]]], steps: range, device: torch.device
) -> Iterator[list[dict[str, Tensor]]]:
    """The batches that `make` gives for each step; where a card computes, a thread makes those of
    the next step meanwhile.

    A processor that trains has no core to spare.
    """
    if device.type == "cpu":
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in steps:
            made = (coming or thread.submit(make, step)).result()
            coming = thread.submit(make, step + 1) if step + 1 in steps else None
            yield made


def summed(losses: Sequence[Loss], n: float, world: World) -> Tensor:
    """The three sums over some losses, and n, over all ranks; (4,) float64 on the CPU, as Apple's
    GPUs do not have it.

    Read at once: whoever reads a number from a card waits until it has done all its work.
    """
    sums = torch.tensor([0, 0, 0, n], dtype=torch.float64)
    if losses:
        parts = [torch.stack([part.detach().float() for part in loss]) for loss in losses]
        sums[:3] = sum(torch.stack(parts).cpu().double())
    return world.sum(sums.float().to(world.device)).cpu().double() if world.size > 1 else sums


class Scaler:
    """Autocast, backward and optimizer step in one format.

    float16 needs its loss scaled up so that small gradients do not vanish; the scale is halved
    when a gradient overflows, and that step is skipped (Micikevicius et al. 2018, section 3.2).
    All processes decide by the same norm, so their scales stay equal with any engine.
    """

    FIRST, EVERY = 2.0**16, 2000  # the scale, doubled after so many good steps in a row

    def __init__(self, device: torch.device, precision: str, warning: str = "") -> None:
        self.device, self.precision, self.warning = device, precision, warning
        self._scales = precision == "float16"
        self._scale, self._good_steps = (self.FIRST if self._scales else 1.0), 0

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def backward(self, loss: Tensor) -> None:
        (loss * self._scale if self._scales else loss).backward()

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
        if self._scales:
            torch._foreach_mul_([w.grad for w in parameters if w.grad is not None], 1 / self._scale)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
        self._adapt(math.isfinite(norm))
        norm = norm if math.isfinite(loss) else math.nan
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _adapt(self, is_good: bool) -> None:
        if not self._scales:
            return
        self._good_steps = self._good_steps + 1 if is_good else 0
        if not is_good:
            self._scale /= 2
        elif self._good_steps == self.EVERY:
            self._scale, self._good_steps = self._scale * 2, 0

    def state(self) -> dict:
        return {"scale": self._scale, "good_steps": self._good_steps} if self._scales else {}

    def load(self, state: dict) -> None:
        # Empty where the run was saved on a device that needs no scaling.
        if state and self._scales:
            self._scale, self._good_steps = state["scale"], state.get("good_steps", 0)


def memory_gb(device: torch.device) -> float:
    """The most memory that was in use so far: of a CUDA card, else of the process (macOS: now)."""
    if device.type == "cuda":  # of tensors: what nvidia-smi shows holds gaps and context, too
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: ru_maxrss would begin with what the parent process had
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    used = psutil.Process().memory_info()
    return getattr(used, "peak_wset", used.rss) / 1e9  # Windows alone keeps the peak
