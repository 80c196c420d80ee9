"""Training in bfloat16 on processors that multiply it: layers and loss in few passes over memory.

`fuse` changes a finished model from outside. A layer is then one autograd function: the products
are torch's, attention and all that stands between the products is train.c's. Losses and gradients
equal those of model.py under autocast to the format's rounding. Whatever the kernels do not cover
(float32, a KV cache, adapters, hooks, odd widths) runs as model.py has it.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from babyllama.cpu.compile import compiled, library
from model import DecoderLayer, KVCache, SlicedLoss, Transformer

# Positions whose logits exist at a time, as bfloat16, and outputs of the head taken together, whose
# logits stay near the processor. The head's gradient is added up once for so many positions.
_ROWS, _OUTPUTS = 1024, 4096
# Parts of a batch whose gradients of a norm's weight are summed up by themselves (train.c).
_CHUNKS = 16


class _Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in "BTHKC"] + [
        (name, ctypes.c_void_p)
        for name in (
            "qkv", "cosine", "sine", "segments", "out", "powers", "grad_out", "grad_qkv"
        )
    ]  # fmt: skip


def suits(model: Transformer) -> bool:
    """True if the kernels exist here and cover the model's shape."""
    config = model.config
    return (
        model.rope.device.type == "cpu"
        and torch.cpu._is_avx512_bf16_supported()
        and config.head_dim in (32, 64, 96, 128)
        and config.hidden_dim % 16 == 0
        and (found := library()) is not None
        and bool(found.has_bf16())
    )


def fuse(model: Transformer, blocks: bool = True) -> Transformer:
    """The model, which from now on computes by the kernels where they suit it.

    blocks: on a card packed documents are attended to block by block, where that runs
    """
    if model.rope.is_cuda:
        from babyllama.cuda.attention import on_card  # takes its time, for cards alone

        return on_card(model, blocks)
    if not suits(model):
        return model
    for layer in model.layers:
        layer.forward = partial(_layer_forward, layer)
    model.segment_mask = _segment_ids
    model.sliced_loss = FusedLoss.apply
    model.kernels = " with fused kernels"  # for the log
    return model


def _segment_ids(segments: Tensor) -> Tensor:
    """What stands for the mask: the numbers themselves (B, T)."""
    return segments.to(torch.int32).contiguous()


def _layer_forward(
    layer: DecoderLayer,
    x: Tensor,
    rope: Tensor,
    mask: Tensor | None,
    cache: KVCache | None,
    number: int,
) -> Tensor:
    """As DecoderLayer.forward."""
    if cache is None and _is_covered(layer, x):
        a, f = layer.attention, layer.feed_forward
        return FusedLayer.apply(
            x, rope, mask, a.head_dim, layer.ffn_norm.eps, layer.attention_norm.weight,
            a.wq.weight, a.wk.weight, a.wv.weight, a.wo.weight, layer.ffn_norm.weight,
            f.w1.weight, f.w3.weight, f.w2.weight,
        )  # fmt: skip
    if mask is not None and mask.dim() == 2:
        mask = Transformer.segment_mask(mask)
    return DecoderLayer.forward(layer, x, rope, mask, cache, number)


def _is_bf16() -> bool:
    """True if products are taken in bfloat16 here."""
    is_on = torch.is_autocast_enabled("cpu")
    return is_on and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _is_covered(layer: DecoderLayer, x: Tensor) -> bool:
    """True if this call may be fused: bfloat16, and every part is as model.py made it."""
    if torch.compiler.is_compiling() or not _is_bf16() or x.dtype != torch.float32:
        return False
    a, f = layer.attention, layer.feed_forward
    matrices = (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3)
    hooked = (a, f, layer.attention_norm, layer.ffn_norm, *matrices)
    return all(type(part) is nn.Linear for part in matrices) and not any(
        part._forward_hooks or part._forward_pre_hooks for part in hooked
    )


def _call(function: str, *arguments: Tensor | float | None) -> None:
    """Call a function of train.c: tensors by where they stand, whole numbers as int64."""
    kinds: dict[type, Callable] = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float}
    getattr(compiled(), function)(
        *(
            ctypes.c_void_p(value.data_ptr() if isinstance(value, Tensor) else value)
            if value is None or isinstance(value, Tensor)
            else kinds[type(value)](value)
            for value in arguments
        )
    )


def _bf16(*weights: Tensor) -> Tensor:
    """Matrices below each other, in bfloat16."""
    rows = sum(len(weight) for weight in weights)
    out = torch.empty(rows, weights[0].shape[1], dtype=torch.bfloat16)
    for part, weight in zip(out.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return out


def _add(total: Tensor, part: Tensor) -> None:
    """total += part; float32 and bfloat16."""
    _call("add", total, part, total, total.numel())


def _norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """x + y (N, D) float32, its RMSNorm in bfloat16, and the scales (N) of the rows."""
    (N, D), total = x.shape, x if y is None else torch.empty_like(x)
    normed, scales = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(N)
    _call("norm_forward", x, y, total, weight, normed, scales, N, D, eps)
    return total, normed, scales


def _norm_back(
    x: Tensor, scales: Tensor, weight: Tensor, grad_normed: Tensor, grad: Tensor, narrowed: bool
) -> tuple[Tensor, ...]:
    """Add to grad (N, D) what comes through the norm; returns the weight's gradient, and grad in
    bfloat16 if wanted."""
    N, D = x.shape
    sums = torch.empty(_CHUNKS, D)
    small = torch.empty(N, D, dtype=torch.bfloat16) if narrowed else None
    _call("norm_backward", x, scales, weight, grad_normed, grad, small, sums, N, D)
    return sums.sum(0), small


def _attention(
    shape: tuple[int, ...],
    qkv: Tensor,
    rope: Tensor,
    segments: Tensor | None,
    out: Tensor,
    powers: Tensor,
    grads: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill out and powers, or the second of grads from the first; shape: B, T, H, K, C."""
    assert rope.shape[1] == 1 and rope[0].is_contiguous()
    parts = (qkv, rope[0], rope[1], segments, out, powers, *(grads or (None, None)))
    asked = _Attention(*shape, *(None if part is None else part.data_ptr() for part in parts))
    compiled().attention(ctypes.byref(asked), ctypes.c_int64(grads is not None))


class FusedLayer(torch.autograd.Function):
    """A decoder layer; x (B, T, D) float32, weights float32, products bfloat16."""

    @staticmethod
    def forward(
        ctx, x: Tensor, rope: Tensor, segments: Tensor | None, head_dim: int, eps: float,
        norm_1: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, norm_2: Tensor,
        w1: Tensor, w3: Tensor, w2: Tensor,
    ) -> Tensor:  # fmt: skip
        B, T, D = x.shape
        x = x.reshape(-1, D).contiguous()
        shape = (B, T, len(wq) // head_dim, len(wk) // head_dim, head_dim)
        qkv_weight, out_weight = _bf16(wq, wk, wv), _bf16(wo)
        up_weight, down_weight = _bf16(w1, w3), _bf16(w2)
        _, normed_1, scales_1 = _norm(x, None, norm_1, eps)
        qkv = normed_1 @ qkv_weight.t()
        seen = torch.empty(B * T, len(wq), dtype=torch.bfloat16)
        powers = torch.empty(B, shape[2], T)
        _attention(shape, qkv, rope, segments, seen, powers)
        middle, normed_2, scales_2 = _norm(x, seen @ out_weight.t(), norm_2, eps)
        up = normed_2 @ up_weight.t()
        gated = torch.empty(B * T, len(w1), dtype=torch.bfloat16)
        _call("gate_forward", up, gated, B * T, len(w1))
        ctx.save_for_backward(
            rope, segments, x, norm_1, normed_1, scales_1, qkv, seen, powers, middle, norm_2,
            normed_2, scales_2, up, qkv_weight, out_weight, up_weight, down_weight,
        )  # fmt: skip
        ctx.shape, ctx.sizes = shape, [len(wq), len(wk), len(wv)]
        down = gated @ down_weight.t()
        out = torch.empty_like(x)
        _call("add", middle, down, out, out.numel())
        return out.view(B, T, D)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (
            rope, segments, x, norm_1, normed_1, scales_1, qkv, seen, powers, middle, norm_2,
            normed_2, scales_2, up, qkv_weight, out_weight, up_weight, down_weight,
        ) = ctx.saved_tensors  # fmt: skip
        N, D = x.shape
        grad = grad_out.reshape(N, D).clone(memory_format=torch.contiguous_format)
        small = grad.bfloat16()
        grad_gated = small @ down_weight
        gated = torch.empty_like(grad_gated)
        grad_up = torch.empty_like(up)
        _call("gate_backward", up, grad_gated, gated, grad_up, N, gated.shape[1])
        grad_w2 = small.t() @ gated
        grad_w13 = grad_up.t() @ normed_2
        grad_norm_2, small = _norm_back(
            middle, scales_2, norm_2, grad_up @ up_weight, grad, narrowed=True
        )
        grad_seen, grad_qkv = small @ out_weight, torch.empty_like(qkv)
        grad_wo = small.t() @ seen
        _attention(ctx.shape, qkv, rope, segments, seen, powers, (grad_seen, grad_qkv))
        grad_wqkv = grad_qkv.t() @ normed_1
        grad_norm_1, _ = _norm_back(
            x, scales_1, norm_1, grad_qkv @ qkv_weight, grad, narrowed=False
        )
        wq, wk, wv = (part.float() for part in grad_wqkv.split(ctx.sizes))
        w1, w3 = (part.float() for part in grad_w13.chunk(2))
        return (
            grad.view(grad_out.shape), None, None, None, None, grad_norm_1, wq, wk, wv,
            grad_wo.float(), grad_norm_2, w1, w3, grad_w2.float(),
        )  # fmt: skip


class FusedLoss(torch.autograd.Function):
    """model.SlicedLoss, each slice of logits in one pass; float32 goes the usual way."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """As SlicedLoss.forward."""
        if not _is_bf16():
            return SlicedLoss.forward(ctx, hidden, weight, targets)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        (N, _), V = hidden.shape, len(weight)
        x, w = hidden.bfloat16(), _bf16(weight)
        grad_hidden = torch.zeros(hidden.shape) if want_hidden else None
        grad_weight = torch.zeros(weight.shape) if want_weight else None
        largest, (powers, aimed) = torch.full((N,), -1e30), torch.zeros(2, N)
        room = torch.empty(min(N, _ROWS) * V, dtype=torch.bfloat16)
        outputs = [slice(first, min(first + _OUTPUTS, V)) for first in range(0, V, _OUTPUTS)]
        for first in range(0, N, _ROWS):
            part = slice(first, min(first + _ROWS, N))
            rows, goals, n = x[part], targets[part], len(x[part])
            logits = [room[n * o.start : n * o.stop].view(n, -1) for o in outputs]
            for o, own in zip(outputs, logits, strict=True):
                torch.mm(rows, w[o].t(), out=own)
                _call(
                    "softmax_look", own, goals, largest[part], powers[part], aimed[part], n,
                    own.shape[1], o.start,
                )  # fmt: skip
            for o, own in zip(outputs, logits, strict=True):
                if not (want_hidden or want_weight):
                    break
                _call(
                    "softmax_error", own, goals, largest[part], powers[part], n, own.shape[1],
                    o.start,
                )  # fmt: skip
                if grad_hidden is not None:
                    _add(grad_hidden[part], own @ w[o])
                if grad_weight is not None:
                    _add(grad_weight[o], own.t() @ rows)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        # Where all logits are equal none is the largest: a collapsed model is right nowhere.
        hits = (aimed >= largest) & (powers < 0.999 * V)
        losses = powers.log() + largest - aimed
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        n_targets, n_correct = torch.tensor(N), hits.sum()
        ctx.mark_non_differentiable(n_targets, n_correct)
        return losses.sum(), n_targets, n_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return SlicedLoss.backward(ctx, grad_loss)
