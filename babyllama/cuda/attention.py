"""Attention inside the documents of packed rows, and the loss, as CUDA cards do them fast.

A mask of T x T booleans makes every token look at every other, and then forget most of them.
flex_attention (Dong et al. 2024, arXiv:2412.05496) leaves out the blocks in which no token sees
another; where a card cannot run it, the mask becomes a bias once for all layers, which torch would
else make, and keep, in each of them. The losses are the same to rounding. `on_card` changes a
finished model from outside; where no document shares its row, nothing changes.
"""

import functools
import importlib.util
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model import Attention, SlicedLoss, Transformer, matmul_dtype

# Rows are padded to a multiple of a block, so that few lengths are compiled.
BLOCK = 128
# What the kernels read of a bias begins at multiples of this.
_ALIGNED = 8


def suits(device: torch.device, head_dim: int) -> bool:
    """True if flex_attention's kernels exist here: Triton, a card of the RTX 30 series or later,
    heads of 16 or more; and whether they work, which is tried once."""
    return (
        device.type == "cuda"
        and head_dim >= 16
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
        and works(device, head_dim)
    )


@functools.cache
def works(device: torch.device, head_dim: int) -> bool:
    """True if a block can be attended to, forward and backward; warns where not.

    Triton needs a C compiler and Python's headers, which small images do not have.
    """
    try:
        with torch.inference_mode(False):  # a run's first packed row comes in its validation
            q = torch.ones(1, 1, BLOCK, head_dim, device=device, requires_grad=True)
            mask = block_mask(torch.ones(1, BLOCK, dtype=torch.int64, device=device))
            compiled(q, q, q, block_mask=mask).sum().backward()
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"packed documents are attended to by a mask, which is slower: block attention does "
            f"not run here ({type(error).__name__}: {reason}); it needs a C compiler and Python's "
            f"headers (apt install gcc python3-dev)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def compiled(*args: object, **kwargs: object) -> Tensor:
    """flex_attention as one kernel."""
    return _compiler()(*args, **kwargs)


@functools.cache
def _compiler() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def on_card(model: Transformer, blocks: bool = True) -> Transformer:
    """The model, which from now on computes losses, and attention in packed documents, as cards do
    it fast.

    blocks: by flex_attention, where that runs; it is tried when the first packed row comes
    """
    model.sliced_loss = card_loss
    return attend_by(model, compiled if blocks else None)


def attend_by(model: Transformer, kernel: Callable | None, always: bool = False) -> Transformer:
    """on_card with a kernel of one's own, or with none, for a bias.

    always: blocks on devices without the kernels, too, to compare with
    """
    head_dim = model.config.head_dim

    def mask(segments: Tensor) -> BlockMask | Tensor:
        if kernel is not None and (always or suits(segments.device, head_dim)):
            return block_mask(segments)
        return bias(segments)

    model.segment_mask = mask
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


def bias(segments: Tensor) -> Tensor:
    """What is added to the scores, (B, 1, T, T) in the format of the products: 0 or -inf."""
    seen = Transformer.segment_mask(segments)
    (B, T), device = segments.shape, segments.device.type
    narrow = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if narrow else torch.float32
    made = torch.zeros(B, 1, T, T + -T % _ALIGNED, dtype=dtype, device=segments.device)[..., :T]
    return made.masked_fill_(~seen, -torch.inf)


def attend(kernel: Any, q: Tensor, k: Tensor, v: Tensor, mask: object, is_causal: bool) -> Tensor:
    """(B, H, T, C), as model.Attention.attend; by the kernel where the mask is one of blocks."""
    groups = q.shape[1] // k.shape[1]
    if isinstance(mask, Tensor) and groups > 1:
        # With a mask the fast kernels take no grouped heads.
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    if not isinstance(mask, BlockMask):
        return Attention.attend(q, k, v, mask, is_causal)
    length = q.shape[2]
    q, k, v = (F.pad(part, (0, 0, 0, -length % BLOCK)) for part in (q, k, v))
    out = kernel(q, k, v, block_mask=mask, enable_gqa=groups > 1)
    return out[:, :, :length]


# A card adds to the whole gradient of the head once a slice, so fewer and larger ones are faster.
CARD_SLICE = 1024


def card_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """model.SlicedLoss as cards compute it fast."""
    dtype = matmul_dtype(hidden)
    own: list[Callable] = [functools.partial(softmax_loss, dtype=dtype)]
    if dtype != torch.float32:  # whose products a card adds up and gives unrounded
        own += [functools.partial(torch.mm, out_dtype=torch.float32), add_narrow_product]
    return SlicedLoss.apply(hidden, weight, targets, CARD_SLICE, *own)


def add_narrow_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b of a narrow format to the float32 total, without a tensor between them."""
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def softmax_loss(
    logits: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """model._softmax_loss in four passes over the memory, for which a card waits, not in ten.

    dtype: of the gradient
    """
    log_probs = logits.log_softmax(dim=1)
    aimed = log_probs.gather(1, targets[:, None])  # (N, 1)
    even = 1.001 / logits.shape[1]  # of equal logits none is the largest
    hits = ((aimed >= log_probs.amax(dim=1, keepdim=True)) & (aimed.exp() > even)).squeeze(1)
    error = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=dtype))
    # Near 1 a narrow format would round a probability's distance from 1 away.
    error.scatter_(1, targets[:, None], (aimed.exp() - 1).to(dtype))
    return -aimed.squeeze(1), hits, error
