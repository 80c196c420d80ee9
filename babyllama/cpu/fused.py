"""Training on processors in bfloat16 or float32: layers and loss in few passes over memory.

`fuse` changes a finished model from outside. A layer is then one autograd function: the products
are torch's, attention and all that stands between the products is train.c's in bfloat16 (where the
processor multiplies it) and train32.c's in float32. Losses and gradients equal those of model.py to
the format's rounding. Whatever the kernels do not cover (a KV cache, adapters, hooks, odd widths)
runs as model.py has it.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from babyllama.cpu.compile import compiled, library
from model import DecoderLayer, KVCache, SlicedLoss, Transformer

# Positions whose logits exist at a time, as bfloat16, and outputs of the head taken together, whose
# logits stay near the processor; in float32 half and twice as many. The head's gradient is added up
# once for so many positions.
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
        and config.head_dim in (32, 64, 96, 128)
        and config.hidden_dim % 16 == 0
        and (found := library()) is not None
        and bool(found.has_f32())
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


def _format() -> torch.dtype | None:
    """What products are taken in here, if there are kernels for it."""
    is_on, has_bf16 = torch.is_autocast_enabled("cpu"), compiled().has_bf16()
    format = torch.get_autocast_dtype("cpu") if is_on else torch.float32
    return format if format == torch.float32 or (format == torch.bfloat16 and has_bf16) else None


def _is_covered(layer: DecoderLayer, x: Tensor) -> bool:
    """True if this call may be fused: by its format, and every part is as model.py made it."""
    if torch.compiler.is_compiling() or _format() is None or x.dtype != torch.float32:
        return False
    a, f = layer.attention, layer.feed_forward
    matrices = (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3)
    hooked = (a, f, layer.attention_norm, layer.ffn_norm, *matrices)
    return all(type(part) is nn.Linear for part in matrices) and not any(
        part._forward_hooks or part._forward_pre_hooks for part in hooked
    )


def _call(function: str, *arguments: Tensor | float | None) -> None:
    """Call a function of train.c (for bfloat16) or train32.c: tensors by where they stand."""
    is_bf16 = any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in arguments)
    run = getattr(compiled(), function + ("_bf16" if is_bf16 else "_f32"))
    kinds: dict[type, Callable] = {
        int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p
    }  # fmt: skip
    run(
        *(
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else kinds[type(a)](a)
            for a in arguments
        )
    )


def _joined(format: torch.dtype, *weights: Tensor) -> Tensor:
    """Matrices below each other, in a format."""
    room = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=format)
    return torch.cat(weights, out=room)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the total is float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        _call("add", total, a @ b, total, total.numel())


def _norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, format: torch.dtype
) -> tuple[Tensor, ...]:
    """x + y (N, D) float32, its RMSNorm in the format, and the scales (N) of the rows."""
    (N, D), total = x.shape, x if y is None else torch.empty_like(x)
    normed, scales = torch.empty(N, D, dtype=format), torch.empty(N)
    _call("norm_forward", x, y, total, weight, normed, scales, N, D, eps)
    return total, normed, scales


def _norm_back(
    x: Tensor, scales: Tensor, weight: Tensor, grad_normed: Tensor, grad: Tensor, narrowed: bool
) -> tuple[Tensor, ...]:
    """Add to grad (N, D) what comes through the norm; returns the weight's gradient, and grad in
    the products' format if wanted."""
    N, D = x.shape
    sums = torch.empty(_CHUNKS, D)
    is_other = narrowed and grad_normed.dtype != grad.dtype
    small = torch.empty_like(grad_normed) if is_other else None
    _call("norm_backward", x, scales, weight, grad_normed, grad, small, sums, N, D)
    return sums.sum(0), grad if small is None else small


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
    run = compiled().attention_f32 if qkv.dtype == torch.float32 else compiled().attention_bf16
    run(ctypes.byref(asked), ctypes.c_int64(grads is not None))


class FusedLayer(torch.autograd.Function):
    """A decoder layer; x (B, T, D) and weights float32, products in the format of `_format`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, rope: Tensor, segments: Tensor | None, head_dim: int, eps: float,
        norm_1: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, norm_2: Tensor,
        w1: Tensor, w3: Tensor, w2: Tensor,
    ) -> Tensor:  # fmt: skip
        B, T, D = x.shape
        x = x.reshape(-1, D).contiguous()
        shape = (B, T, len(wq) // head_dim, len(wk) // head_dim, head_dim)
        format = _format()
        qkv_weight, out_weight = _joined(format, wq, wk, wv), wo.to(format)
        up_weight, down_weight = _joined(format, w1, w3), w2.to(format)
        _, normed_1, scales_1 = _norm(x, None, norm_1, eps, format)
        qkv = normed_1 @ qkv_weight.t()
        seen = torch.empty(B * T, len(wq), dtype=format)
        powers = torch.empty(B, shape[2], T)
        _attention(shape, qkv, rope, segments, seen, powers)
        middle, normed_2, scales_2 = _norm(x, seen @ out_weight.t(), norm_2, eps, format)
        up = normed_2 @ up_weight.t()
        gated = torch.empty(B * T, len(w1), dtype=format)
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
        small = grad.to(down_weight.dtype)
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
    """model.SlicedLoss, each slice of logits in few passes."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """As SlicedLoss.forward."""
        format = _format()
        is_f32 = format == torch.float32
        if format is None or (is_f32 and not hidden.dtype == weight.dtype == format):
            return SlicedLoss.forward(ctx, hidden, weight, targets)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        (N, _), V = hidden.shape, len(weight)
        x, w = hidden.to(format), weight.to(format)
        grad_hidden = torch.zeros(hidden.shape) if want_hidden else None
        grad_weight = torch.zeros(weight.shape) if want_weight else None
        largest, (powers, aimed) = torch.full((N,), -1e30), torch.zeros(2, N)
        n_rows, n_outputs = (_ROWS // 2, 2 * _OUTPUTS) if is_f32 else (_ROWS, _OUTPUTS)
        room = torch.empty(min(N, n_rows) * V, dtype=format)
        outputs = [slice(first, min(first + n_outputs, V)) for first in range(0, V, n_outputs)]
        for first in range(0, N, n_rows):
            part = slice(first, min(first + n_rows, N))
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
                    _add_product(grad_hidden[part], own, w[o])
                if grad_weight is not None:
                    _add_product(grad_weight[o], own.t(), rows)
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
