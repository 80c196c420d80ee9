"""Decoding steps with int8 weights: compiles int8.c, lays out the weights for it, and calls it.

Each output of a matrix has its own scale, so that its largest weight becomes 127. Activations are
not held in int8: the sums of int8.c are as good as those of float32 activations. The file is
compiled when it is first needed, in less than a second, for the processor at hand.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from babyllama.errors import CheckpointError, ConfigError
from model import KVCache, Transformer

_SOURCE = Path(__file__).with_suffix(".c")

# Reordered sums are what vector instructions need; -ffast-math itself would also change how the
# whole process treats tiny numbers.
_FLAGS = "-O3 -shared -fPIC -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -ffinite-math-only"  # noqa: E501
# Not every compiler knows every processor or has OpenMP; the first set that works is taken.
_EXTRA = ("-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native", "")


class _Matrix(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("scales", ctypes.c_void_p)] + [
        (name, ctypes.c_int32) for name in ("n", "d")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Matrix) for name in ("qkv", "wo", "w13", "w2")]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_seq_len"
        )),
        ("eps", ctypes.c_float),
        ("rope", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
    ]  # fmt: skip


def compiler() -> str | None:
    """The C compiler of this machine: $CC, or one of the usual names."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def compiled() -> ctypes.CDLL:
    """int8.c as a library.

    raises: ConfigError if there is no compiler, or it cannot compile the file
    """
    found = compiler()
    if found is None or sys.platform == "win32":
        raise ConfigError(
            "int8 weights need a C compiler (cc, gcc or clang), found none; install one, or "
            "decode with --weights float32"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.so"
        for extra in _EXTRA:
            command = [found, *_FLAGS.split(), *extra.split(), str(_SOURCE), "-o", str(out), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                library = ctypes.CDLL(str(out))
                pointer, number = ctypes.c_void_p, ctypes.c_int
                library.step.argtypes = [
                    ctypes.POINTER(_Model), *[pointer] * 3, *[number] * 3, *[pointer] * 6
                ]  # fmt: skip
                library.step.restype = None
                return library
    reason = " ".join(done.stderr.split())[:200]
    raise ConfigError(
        f"int8 weights need a C compiler that compiles {_SOURCE.name}, found that {found} says: "
        f"{reason}; name another in the variable CC, or decode with --weights float32"
    )


class Int8Step:
    """One step in C; see fast.Decoder for what it takes and returns."""

    def __init__(self, model: Transformer) -> None:
        config = self.config = model.config
        self.model = model
        self.library = compiled()
        self.kept: list[object] = []  # what C points to must stay where it is
        layers = (_Layer * config.n_layers)()
        with torch.no_grad():
            for number, layer in enumerate(model.layers):
                a, f = layer.attention, layer.feed_forward
                qkv = torch.cat((a.wq.weight, a.wk.weight, a.wv.weight))
                w13 = torch.cat((f.w1.weight, f.w3.weight))
                layers[number] = _Layer(
                    self._matrix(qkv * layer.attention_norm.weight),
                    self._matrix(a.wo.weight),
                    self._matrix(w13 * layer.ffn_norm.weight),
                    self._matrix(f.w2.weight),
                )
            head = self._matrix(model.output.weight * model.norm.weight)
        self.kept += [layers, model.rope]
        self.c_model = _Model(
            config.n_layers, config.n_heads, config.kv_heads, config.head_dim, config.hidden_dim,
            config.max_seq_len, config.norm_eps, model.rope.data_ptr(), layers, head,
        )  # fmt: skip

    def _matrix(self, weight: Tensor) -> _Matrix:
        values, scales = quantise(weight)
        self.kept += [values, scales]
        return _Matrix(values.data_ptr(), scales.data_ptr(), *values.shape)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        config, B, size = self.config, len(tokens), cache.buffer.shape[4]
        assert cache.length < size and cache.buffer.is_contiguous()
        assert cache.length - cache.first < config.max_seq_len
        width = max(2 * config.hidden_dim, config.dim + 2 * config.kv_heads * config.head_dim)
        x = self.model.tok_embeddings.weight[tokens]
        rooms = [
            torch.empty(B, width),
            torch.empty(B, width),
            torch.empty(B, config.kv_heads, size),
            torch.empty(B, max(config.dim, config.hidden_dim), dtype=torch.int16),
            torch.empty(B),
        ]
        logits = torch.empty(B, config.vocab_size)
        self.library.step(
            self.c_model, x.data_ptr(), cache.buffer.data_ptr(), cache.start.data_ptr(),
            B, cache.length, size, *(room.data_ptr() for room in rooms), logits.data_ptr(),
        )  # fmt: skip
        cache.length += 1
        return logits


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
