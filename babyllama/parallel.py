"""One process or many: start, wrap, sum. The training loop holds a World and no `if` about it.

A launcher (torchrun, Slurm) is recognised by the environment that it sets; without one there is
one process. Engines are added here, as branches of `wrap`.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from babyllama.cli import BAD_INPUT

# A rank that waits longer than this for the others ends the job (torch's default is 30 minutes).
TIMEOUT = datetime.timedelta(seconds=50)


@dataclass(frozen=True)
class World:
    """This process among its fellows."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def on_main(self, act: Callable[[], object]) -> None:
        """Act in the main process while the others wait; where it fails, all of them end."""
        error = None
        if self.is_main:
            try:
                act()
            except Exception as caught:
                error = caught
        if self.any(error is not None):
            raise error or SystemExit(BAD_INPUT)  # the main process alone says what it was

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it; its parameters and names stay the model's own."""
        return DistributedDataParallel(model) if self.size > 1 else model


@contextlib.contextmanager
def start(device: torch.device) -> Iterator[World]:
    """Join the launcher's process group, if there is one, for as long as the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def no_sync(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients in the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()
