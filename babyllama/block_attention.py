"""Attention inside the documents of a packed row, block by block, on CUDA cards.

A mask of T x T booleans makes every token look at every other, and then forget most of them.
flex_attention (Dong et al. 2024, arXiv:2412.05496) leaves out the blocks in which no token sees
another. The losses are the same to rounding. `by_blocks` changes a finished model from outside;
elsewhere, and where no document shares its row, a model keeps the attention that it has.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model import Attention, Transformer

# Rows are filled up to a multiple of a block, so that few lengths are compiled.
BLOCK = 128


def suits(device: torch.device) -> bool:
    """Whether the kernels exist here: Triton, and a card of the RTX 30 series or later."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def by_blocks(model: Transformer, compiled: bool = True) -> Transformer:
    """The model, which from now on attends to packed documents block by block.

    compiled: as one kernel; else step by step, with all scores in memory, to compare with
    """
    kernel = torch.compile(flex_attention) if compiled else flex_attention
    model.segment_mask = block_mask
    for layer in model.layers:
        layer.attention.attend = functools.partial(attend, kernel)
    return model


def block_mask(segments: Tensor) -> BlockMask:
    """Which blocks hold a token that sees another; segments (B, T), as in the model's forward."""
    filled = F.pad(segments, (0, -segments.shape[1] % BLOCK), value=-1)

    def sees(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (filled[batch, query] == filled[batch, key]) & (query >= key)

    n_rows, length = filled.shape
    return create_block_mask(sees, n_rows, None, length, length, device=segments.device)


def attend(
    kernel: object, q: Tensor, k: Tensor, v: Tensor, mask: object, is_causal: bool
) -> Tensor:
    """(B, H, T, C), as model.Attention.attend; by the kernel where the mask is one of blocks."""
    if not isinstance(mask, BlockMask):
        return Attention.attend(q, k, v, mask, is_causal)
    length = q.shape[2]
    q, k, v = (F.pad(part, (0, 0, 0, -length % BLOCK)) for part in (q, k, v))
    out = kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[:, :, :length]
