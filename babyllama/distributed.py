"""One process or many: start, wrap, sum. The training loop holds a World and no `if` about it.

A launcher (torchrun, Slurm) is recognised by the environment that it sets; without one there is
one process. Engines are branches of `wrap`: DDP (Li et al. 2020, arXiv:2006.15704) keeps a copy
of everything in each process; FSDP2 (torch's fully_shard) keeps a share of weights, gradients and
optimizer state in each. Names and checkpoints are the same for all of them.
"""

import contextlib
import datetime
import functools
import gc
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from babyllama.config import BAD_INPUT
from babyllama.errors import ConfigError, require


@dataclass(frozen=True)
class ParallelConfig:
    """Several processes, started by torchrun or Slurm.

    Args:
        engine: ddp: everything in each process; fsdp2: a share in each, for models that do not
            fit one card; auto: ddp
        timeout_s: a process that waits longer than this for the others ends the job; while the
            main one writes or computes for all, nobody counts
    """

    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    timeout_s: int = 50  # torch's own is 30 minutes

    def __post_init__(self) -> None:
        require("parallel", self, {"timeout_s": ("1 or more", self.timeout_s >= 1)})


# Graphs that torch.compile keeps of one function, of which it allows 8. Windows and packed rows,
# one row and several, each length, with and without gradients: about 11 are made, and what is
# beyond the limit runs uncompiled.
GRAPHS = 64
# How long the others wait while the main process saves, or reads a set of images.
PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process in its process group.

    patient: a group of the same processes for what takes the main one long; null: the default one
    """

    rank: int
    size: int
    device: torch.device
    engine: str = "auto"
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, patient: bool = False) -> bool:
        """True if the flag is up on any rank.

        patient: ask through the group that waits for what takes one process long
        """
        if self.size == 1:
            return flag
        group = self.patient if patient else None
        flags = torch.full((), float(flag), device="cpu" if group else self.device)
        dist.all_reduce(flags, group=group)
        return bool(flags > 0)

    def on_main(self, act: Callable[[], object]) -> None:
        """Act in the main process while the others wait; where it fails, all of them end."""
        error = None
        if self.is_main:
            try:
                act()
            except Exception as caught:
                error = caught
        if self.any(error is not None, patient=True):
            raise error or SystemExit(BAD_INPUT)  # the main process alone says what it was

    def wrap(self, model: nn.Module, compiled: bool = False, recompute: bool = False) -> nn.Module:
        """The model as the loop calls it; the names of its parameters stay the model's own.

        With fsdp2 its parameters become shares: the optimizer is made afterwards.

        compiled: each layer runs as torch.compile makes it
        recompute: activation checkpointing, a layer keeps only its input for the backward pass
        """
        if compiled or self.device.type == "cuda":
            torch._dynamo.config.recompile_limit = GRAPHS
        for layer in model.layers if compiled else ():
            _require_compiler(self.device)
            layer.forward = torch.compile(layer.forward)
        # Outside of the compiled function: torch.compile leaves one alone that checkpoints.
        for layer in model.layers if recompute else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        return model if self.size == 1 else self.distribute(model)

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as the engine holds it."""
        if self.engine != "fsdp2":
            # Gradients lie in the buckets that are exchanged, and buffers are constants; the word
            # for these is another one since torch 2.13.
            known = inspect.signature(DistributedDataParallel).parameters
            words = ("forward_sync_buffers", "broadcast_buffers")
            still = {next(word for word in words if word in known): False}
            return DistributedDataParallel(model, gradient_as_bucket_view=True, **still)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)


def _require_compiler(device: torch.device) -> None:
    """raises: ConfigError where torch.compile would find no C++ compiler"""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, filter(None, names))):
        raise ConfigError(
            "train.compile needs a C++ compiler on a CPU, found neither g++, clang++ nor cl; "
            "install one, or leave the setting out"
        )


@contextlib.contextmanager
def start(device: torch.device, config: ParallelConfig | None = None) -> Iterator[World]:
    """Join the launcher's process group, if there is one, for as long as the block runs."""
    config = config or ParallelConfig()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, device)
        return
    backend, card = "gloo", None
    if device.type == "cuda":
        rank, torchrun = os.environ.get("LOCAL_RANK"), os.environ.get("TORCHELASTIC_RUN_ID")
        backend, number = "nccl", own_card(rank, torchrun, torch.cuda.device_count())
        device = card = torch.device("cuda", number)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    dist.init_process_group(backend, timeout=timeout, device_id=card)
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(dist.get_rank(), size, device, config.engine, patient)
        dist.barrier()  # nobody leaves while another still listens
    finally:
        gc.collect()  # wrapped models hold on to the group that ends here
        dist.destroy_process_group()


def own_card(local_rank: str | None, torchrun: str | None, n_cards: int) -> int:
    """Number of this process's own card among those that it may see.

    A launcher may show each process its own card alone, as Slurm does with --gpus-per-task.

    local_rank: number among the processes of this machine, as the launcher has it
    torchrun: its run, which shows all cards to all processes
    raises: ConfigError if there is none left
    """
    number = int(local_rank or 0)
    if number >= n_cards and (torchrun or n_cards != 1):
        raise ConfigError(
            f"wanted a card for each process, found {n_cards} for process {number + 1} of this "
            f"machine; start at most {n_cards} (torchrun --nproc_per_node {n_cards})"
        )
    return min(number, n_cards - 1)


@contextlib.contextmanager
def no_sync(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Exchange gradients in the last micro-batch of a step only."""
    if is_shared(model):
        model.set_requires_gradient_sync(is_last)
        yield
    elif isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
    else:
        yield


def inner(model: nn.Module) -> nn.Module:
    """The model itself, to be called by all processes together, without exchange of gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_shared(model: nn.Module) -> bool:
    """Whether each process holds a share of the model."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a share. All processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The whole tensors in the processor's memory, put together one at a time, as a card may have
    no room for all. All processes must ask for it.

    keep: else this process only takes part, and gets none
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found


def share_of(like: Tensor, full: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as `like` is, on its device."""
    full = full.to(like.device)
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
