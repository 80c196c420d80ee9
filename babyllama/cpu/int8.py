"""Decoding steps with int8 weights: lays out the weights for int8.c, and calls it.

Each output of a matrix has its own scale, so that its largest weight becomes 127. Activations are
not held in int8: the sums of int8.c are as good as those of float32 activations. The same rounding
makes the small files of a released model (export/release.py).
"""

import ctypes
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from babyllama.cpu.compile import compiled
from babyllama.errors import CheckpointError
from model import KVCache, Transformer

# Outputs of a matrix that int8.c computes together.
_WIDE = 16
# Rows that are computed together, of a prompt: what they need stays near the processor.
_MOST_ROWS = 512
# Few rows gain nothing from more threads, as they wait for memory, or for each other.
_MANY_ROWS, _MOST_THREADS = 16, 8
# After so many steps, so many of each kind find out whether one thread is faster than all.
_TRIAL_EVERY, _TRIAL = 100, 4


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (n, d) as int8 values and one float32 scale an output (n,).

    raises: CheckpointError if a weight is not finite
    """
    largest = weight.abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError(
            "wanted weights to hold in int8, found some that are not finite numbers; the "
            "checkpoint is damaged, use an earlier one"
        )
    scales = (largest / 127).clamp(min=1e-30)
    values = (weight / scales[:, None]).round_().to(torch.int8)
    return values.contiguous(), scales.float().contiguous()


class _Matrix(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("scales", ctypes.c_void_p)] + [
        (name, ctypes.c_int32) for name in ("n", "d")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("attention_norm", ctypes.c_void_p), ("ffn_norm", ctypes.c_void_p)] + [
        (name, _Matrix) for name in ("qkv", "wo", "w13", "w2")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_seq_len"
        )),
        ("eps", ctypes.c_float),
        ("rope", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("head", _Matrix),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_rows", "n_logits", "n_sequences", "size", "is_half"
        )),
        *((name, ctypes.c_void_p) for name in (
            "sequences", "columns", "start", "x", "cache", "a", "b", "scores", "q", "units",
            "logits",
        )),
    ]  # fmt: skip


class Team:
    """Number of threads of a step of few rows: all, or one where that is faster.

    So it is where other programs use the processor: a step then waits for the thread that has no
    place to run. What is not in use is tried for a few steps now and then.
    """

    def __init__(self) -> None:
        self.is_alone, self.n_steps = False, 0
        self.seconds: dict[bool, float] = {}  # of the last trial, by whether a thread was alone

    def pick(self, most: int) -> int:
        """The number of threads of the next step, of `most` that there are."""
        place = self.n_steps % _TRIAL_EVERY
        is_trial = _TRIAL <= place < 2 * _TRIAL
        return 1 if self.is_alone != is_trial else most

    def took(self, seconds: float) -> None:
        """Time that the step took."""
        place = self.n_steps % _TRIAL_EVERY
        self.n_steps += 1
        if place >= 2 * _TRIAL:
            return
        tried = self.is_alone != (place >= _TRIAL)
        if place % _TRIAL == 0:  # threads that have slept wake up in it: it does not count
            self.seconds[tried] = 0.0
        else:
            self.seconds[tried] += seconds
        if place == 2 * _TRIAL - 1:
            self.is_alone = self.seconds[True] < self.seconds[False]


class Int8Step:
    """Steps in C; see fast.Decoder for what it takes and returns."""

    def __init__(self, model: Transformer) -> None:
        config = self.config = model.config
        self.model = model
        self.library = compiled()
        self.team = Team()
        # Keys and values of many replies are as many bytes as the weights: half as many in float16.
        self.cache_dtype = torch.float16 if self.library.has_half() else torch.float32
        self.kept: list[object] = []  # what C points to must stay where it is
        layers = (_Layer * config.n_layers)()
        with torch.no_grad():
            for number, layer in enumerate(model.layers):
                a, f = layer.attention, layer.feed_forward
                layers[number] = _Layer(
                    self._keep(layer.attention_norm.weight),
                    self._keep(layer.ffn_norm.weight),
                    self._matrix(torch.cat((a.wq.weight, a.wk.weight, a.wv.weight))),
                    self._matrix(a.wo.weight),
                    self._matrix(torch.cat((f.w1.weight, f.w3.weight))),
                    self._matrix(f.w2.weight),
                )
            head = self._matrix(model.output.weight)
        self.kept.append(layers)
        self.c_model = _Model(
            config.n_layers, config.n_heads, config.kv_heads, config.head_dim, config.hidden_dim,
            config.max_seq_len, config.norm_eps, self._keep(model.rope), layers,
            self._keep(model.norm.weight), head,
        )  # fmt: skip

    def _keep(self, tensor: Tensor) -> int:
        """Where the numbers of a tensor stand, for as long as this object lives."""
        kept = tensor.detach().contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    def _matrix(self, weight: Tensor) -> _Matrix:
        """A matrix as int8.c wants it: pairs of weights of 16 outputs side by side."""
        values, scales = quantise(weight)
        n, d = values.shape
        values = F.pad(values, (0, d % 2, 0, -n % _WIDE))
        packed = values.view(-1, _WIDE, values.shape[1] // 2, 2).transpose(1, 2)
        scales = F.pad(scales, (0, -n % _WIDE))
        return _Matrix(self._keep(packed), self._keep(scales), n, values.shape[1])

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The newest token of each sequence (B,), which is added to the cache, to logits (B, V)."""
        return self.read(tokens[:, None], cache)

    def read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The next tokens of each sequence (B, T), to the logits after the last (B, V).

        Padding on the left is left out.
        """
        B, T = tokens.shape
        logits = torch.empty(B, self.config.vocab_size)
        n_columns = max(1, _MOST_ROWS // B)
        for first in range(0, T, n_columns):
            is_last = first + n_columns >= T
            self._add(tokens[:, first : first + n_columns], cache, logits if is_last else None)
        return logits

    def _add(self, tokens: Tensor, cache: KVCache, logits: Tensor | None) -> None:
        """Add tokens (B, T) to the cache; write the logits after the last of each sequence."""
        config, (B, T), size = self.config, tokens.shape, cache.buffer.shape[4]
        assert cache.length + T <= size and cache.buffer.is_contiguous()
        assert cache.length + T - cache.first <= config.max_seq_len
        columns = torch.arange(cache.length, cache.length + T, dtype=torch.int32)
        columns = columns.repeat_interleave(B)
        sequences = torch.arange(B, dtype=torch.int32).repeat(T)
        ids = tokens.t().reshape(-1)
        if cache.ragged:
            real = columns >= cache.start[sequences]
            columns, sequences, ids = columns[real], sequences[real], ids[real]
        N, n_threads = len(ids), torch.get_num_threads()
        if is_small := N < _MANY_ROWS and n_threads > 1:
            n_threads = self.team.pick(min(n_threads, _MOST_THREADS))
        width = max(2 * config.hidden_dim, config.dim + 2 * config.kv_heads * config.head_dim)
        rooms = (
            sequences,
            columns,
            cache.start,
            self.model.tok_embeddings.weight[ids],
            cache.buffer,
            torch.empty(N, width),
            torch.empty(N, width),
            torch.empty(n_threads, size),
            torch.empty(N, max(config.dim, config.hidden_dim + 1), dtype=torch.int16),
            torch.empty(N),
            torch.empty(0) if logits is None else logits,
        )
        n_logits = 0 if logits is None else B
        is_half = cache.buffer.dtype == torch.float16
        rows = _Rows(N, n_logits, B, size, is_half, *(room.data_ptr() for room in rooms))
        started = time.perf_counter()
        self.library.step(ctypes.byref(self.c_model), ctypes.byref(rows), n_threads)
        if is_small:
            self.team.took(time.perf_counter() - started)
        cache.length += T
