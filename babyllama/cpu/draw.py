"""Drawing a token in C: sampling.choose in a sixth of the time, on a processor."""

from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from babyllama.cpu.compile import compiled, library
from babyllama.sampling import COLDEST, SamplingConfig
from babyllama.sampling import choose as choose_in_torch

# Of choose.c: numbers that are summed together.
_RUN = 256


def choose(logits: Tensor, sampling: SamplingConfig, chances: Tensor) -> Tensor:
    """As sampling.choose, which it leaves to where C cannot help."""
    if logits.device.type == "cpu" and library() and not sampling.top_k:
        return _choose_in_c(logits, sampling, chances)
    return choose_in_torch(logits, sampling, chances)


def _choose_in_c(logits: Tensor, sampling: SamplingConfig, chances: Tensor) -> Tensor:
    logits, chances = logits.float().contiguous(), chances.float().contiguous()
    (B, V), n = logits.shape, chances.shape[1]
    n_threads = min(B, torch.get_num_threads())
    room = torch.empty(n_threads, V + V // _RUN + 1)
    tokens = torch.empty(B, dtype=torch.int64)
    temperature = 0 if sampling.temperature < COLDEST else sampling.temperature
    compiled().choose(
        c_void_p(logits.data_ptr()), B, V,
        *map(c_float, (temperature, sampling.top_p, sampling.min_p)),
        c_void_p(chances.data_ptr()), n, c_void_p(room.data_ptr()), c_void_p(tokens.data_ptr()),
        n_threads,
    )  # fmt: skip
    if int(tokens.min()) < 0:
        rows = (tokens < 0).nonzero().squeeze(1)
        tokens[rows] = choose_in_torch(logits[rows], sampling, chances[rows, -1:])
    return tokens
