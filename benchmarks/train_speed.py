"""Training speed and memory on this processor, beside transformers and the products' own rate.

    python -m benchmarks.train_speed                          all of it, some 5 minutes
    python -m benchmarks.train_speed --names ours hf_float32  two contestants

Contestants take turns, each in a process of its own so that memory peaks do not mix; medians of
tokens/s and peaks of resident memory are printed, last as one JSON line that names the processor.

ours, hf_*: the 43M shape with 65,000 pieces, batch 8 x 512, AdamW, against the usual loop round
transformers' model. 14m, 14m_plain: 256 wide, 12 layers, 16,000 pieces, tied, two micro-batches of
8 x 512 and Muon, with the kernels of babyllama/cpu and without. *_avx2: the same where torch may
use no more than AVX2, as on a processor without bfloat16. product_*: 2048^3, the yardstick: a token
counts 6 x (parameters - untied embedding) floating point operations, attention not among them.
start: seconds from starting Python to the end of the first step of the 14M shape.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from babyllama.config import REPO, parse, run
from babyllama.cpu.fused import fuse
from babyllama.device import DeviceConfig, Scaler, memory_gb, open_scaler
from babyllama.distributed import World
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.trainer import forward_backward
from benchmarks.peers import SHAPE_43M, hf_model, usual_step
from model import ModelConfig, Transformer

LENGTH, MICRO = 512, 8
SHAPE_14M = ModelConfig(vocab_size=16_000, tied=True)
NAMES = (
    "ours", "hf_float32", "hf_bfloat16", "14m", "14m_plain", "product_float32",
    "product_bfloat16", "ours_avx2", "hf_float32_avx2", "product_float32_avx2", "start",
)  # fmt: skip
PAIRS = (
    ("ours", "hf_float32"), ("ours", "hf_bfloat16"), ("ours", "product_bfloat16"),
    ("14m", "14m_plain"), ("14m", "product_bfloat16"), ("ours_avx2", "hf_float32_avx2"),
    ("ours_avx2", "product_float32_avx2"),
)  # fmt: skip
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of a measurement.

    Args:
        rounds: how often each contestant runs
        steps: timed steps of a run, after one that warms up
        names: the contestants
        only: run one contestant in this process (used by the benchmark itself)
    """

    rounds: int = 3
    steps: int = 3
    names: list[str] = field(default_factory=lambda: list(NAMES))
    only: str | None = None


def make_batch(shape: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    """Random ids and their successors."""
    ids = torch.randint(0, shape.vocab_size, (rows, LENGTH + 1))
    return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def our_step(
    shape: ModelConfig, optim: Any, rows: int, micro: int, precision: str, fused: bool
) -> Callable[[], None]:
    """A step of the project's trainer."""
    device = torch.device("cpu")
    model, batch = Transformer(shape), make_batch(shape, rows)
    model = fuse(model) if fused else model
    optimizer = make_optimizer(model, OptimConfig(name=optim))
    scaler, world = Scaler(device, precision), World(0, 1, device)
    parameters = list(model.parameters())
    parts = [
        {name: ids[i : i + micro] for name, ids in batch.items()} for i in range(0, rows, micro)
    ]

    def step() -> None:
        forward_backward(model, parts, world, scaler)
        scaler.step(optimizer, parameters, 1.0)

    return step


def seconds_of(work: Callable[[], object], times: int, warm_up: bool = True) -> float:
    """Seconds of one call, the median of `times` after one that is not counted."""
    found = []
    for _ in range(times + warm_up):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found[warm_up:])


def measure_one(name: str, steps: int) -> dict[str, float]:
    """One contestant in this process."""
    is_avx2 = name.endswith("_avx2")
    auto = "float32" if is_avx2 else open_scaler(torch.device("cpu"), DeviceConfig()).precision
    kind, _, rest = name.removesuffix("_avx2").partition("_")
    if kind == "product":
        a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, rest))
        return {"gflops": 2 * 2048**3 / seconds_of(lambda: a @ b, 10) / 1e9}
    rows, shape = (2 * MICRO, SHAPE_14M) if kind == "14m" else (MICRO, SHAPE_43M)
    if kind == "start":
        import pretrain  # noqa: F401 (what a run imports is part of its start)

        our_step(SHAPE_14M, "muon", MICRO, MICRO, auto, True)()
        return {}
    if kind == "hf":
        # Where bfloat16 is emulated a step takes minutes: one, cold, is enough to see the order.
        steps = 1 if rest == "bfloat16" and auto == "float32" else steps
        step = usual_step(hf_model(SHAPE_43M), make_batch(SHAPE_43M, MICRO)["tokens"], rest)
    elif kind == "ours":
        step = our_step(shape, "adamw", rows, 2 if is_avx2 else MICRO, auto, not is_avx2)
    else:
        step = our_step(shape, "muon", rows, MICRO, auto, rest != "plain")
    tokens_per_s = rows * LENGTH / seconds_of(step, steps, warm_up=steps > 1)
    found = {"tokens_per_s": tokens_per_s, "peak_mb": memory_gb(torch.device("cpu")) * 1000}
    if kind != "hf":
        weights = shape.n_parameters - (0 if shape.tied else shape.vocab_size * shape.dim)
        found["gflops"] = tokens_per_s * 6 * weights / 1e9
    return found


def in_process(name: str, steps: int) -> dict[str, float]:
    """One contestant in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train_speed", "--only", name]
    env = os.environ | (AVX2 if name.endswith("_avx2") else {})
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--steps", str(steps)], cwd=REPO, env=env, stdout=subprocess.PIPE, check=True
    )
    if name == "start":
        return {"seconds": time.perf_counter() - started}
    return json.loads(done.stdout.decode().strip().split("\n")[-1])


def processor() -> dict[str, object]:
    """The processor's name, its cores and its fast formats."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text("utf-8", "replace").splitlines() if told.is_file() else []
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "processor": found.get("model name", "unknown"),
        "threads": torch.get_num_threads(),
        "formats": [name for name in wanted if name in found.get("flags", "").split()],
        "precision": open_scaler(torch.device("cpu"), DeviceConfig()).precision,
    }


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the table of docs/results.md shows, where its contestants ran."""
    return {
        f"{a}/{b} {key}": found[a][key] / found[b][key]
        for a, b in PAIRS
        if {a, b} <= found.keys()
        for key in found[a]
        if key in found[b]
    }


def main(cfg: SpeedConfig) -> None:
    """Measure the contestants in turn and print the medians."""
    if cfg.only:
        print(json.dumps(measure_one(cfg.only, cfg.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cfg.names}
    for _ in range(cfg.rounds):
        for name, found in runs.items():
            found.append(in_process(name, cfg.steps))
            shown = "  ".join(f"{key} {value:,.1f}" for key, value in found[-1].items())
            print(f"{name:<22}{shown}", flush=True)
    medians = {
        name: {
            key: (max if key == "peak_mb" else statistics.median)(one[key] for one in ones)
            for key in ones[0]
        }
        for name, ones in runs.items()
    }
    print(json.dumps({**processor(), **medians, **ratios(medians)}))


if __name__ == "__main__":
    run(main, parse(SpeedConfig, __doc__))
