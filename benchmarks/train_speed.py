"""Training speed and memory of the 43M shape on this processor, beside transformers.

    python -m benchmarks.train_speed              about 10 minutes where bfloat16 is emulated
    python -m benchmarks.train_speed --rounds 5 --peers hf_float32

Batch 8 x 512, 65,000 pieces, AdamW; ours in four micro-batches of 2, as `train.micro_batch_size`
has it (same gradients, less memory). Every contestant runs in a process of its own, in turn, as
many rounds as asked; medians of tokens/s and peaks of resident memory are printed, last as one
JSON line. The yardstick is the head-shaped product (4096 x 256 by 256 x 65,000) in the same run;
a token counts 6 x (parameters - embedding table) floating point operations.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from babyllama.config import REPO, parse, run
from babyllama.device import Scaler, memory_gb, pick_precision
from babyllama.distributed import World
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.trainer import forward_backward, next_token_loss
from benchmarks.peers import SHAPE_43M
from model import Transformer

BATCH, MICRO, LENGTH = 8, 2, 512
FLOPS_PER_TOKEN = 6 * (43_510_016 - 65_000 * 256)


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure.

    Args:
        rounds: how often each contestant runs
        steps: timed steps of a run, after one that warms up
        peers: contestants beside ours
        only: run one contestant in this process (used by the benchmark itself)
    """

    rounds: int = 3
    steps: int = 3
    peers: list[str] = field(default_factory=lambda: ["hf_float32", "hf_bfloat16"])
    only: str | None = None


def make_batch() -> dict[str, torch.Tensor]:
    """Random ids and their successors."""
    ids = torch.randint(0, SHAPE_43M.vocab_size, (BATCH, LENGTH + 1))
    return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def our_step() -> Callable[[], None]:
    """A step of the project's trainer, in the format that it picks for this processor."""
    device = torch.device("cpu")
    model, batch = Transformer(SHAPE_43M), make_batch()
    optimizer = make_optimizer(model, OptimConfig())
    scaler, world = Scaler(device, pick_precision(device)), World(0, 1, device)
    parameters = list(model.parameters())
    parts = [
        {name: ids[i : i + MICRO] for name, ids in batch.items()} for i in range(0, BATCH, MICRO)
    ]

    def step() -> None:
        forward_backward(model, parts, world, scaler, next_token_loss)
        scaler.step(optimizer, parameters, 1.0)

    return step


def hf_step(dtype: torch.dtype) -> Callable[[], None]:
    """The usual loop round transformers' model: its own loss, torch's AdamW, clipping."""
    from benchmarks.peers import hf_model

    model, batch = hf_model(SHAPE_43M), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def product_gflops(dtype: torch.dtype) -> float:
    """Rate of the head-shaped product, 10^9 operations a second."""
    a, b = torch.randn(4096, 256, dtype=dtype), torch.randn(256, 65_000, dtype=dtype)
    seconds = timed(lambda: a @ b, 2, warm_up=dtype == torch.float32)
    return 2 * 4096 * 256 * 65_000 / seconds / 1e9


def timed(work: Callable[[], object], times: int, warm_up: bool = True) -> float:
    """Seconds of one call, the mean of `times` after one that is not counted."""
    if warm_up:
        work()
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def measure_one(name: str, steps: int) -> dict:
    """One contestant in this process."""
    if name.startswith("product"):
        return {"gflops": product_gflops(getattr(torch, name.removeprefix("product_")))}
    step = our_step() if name == "ours" else hf_step(getattr(torch, name.removeprefix("hf_")))
    tokens_per_s = BATCH * LENGTH / timed(step, steps, warm_up=steps > 1)
    return {"tokens_per_s": tokens_per_s, "peak_mb": memory_gb(torch.device("cpu")) * 1000}


def in_process(name: str, cfg: SpeedConfig) -> dict:
    """One contestant in a fresh process, so that memory peaks do not mix."""
    # Where bfloat16 is emulated a step takes minutes: one, cold, is enough to see the order.
    emulated = pick_precision(torch.device("cpu")) == "float32"
    steps = 1 if name == "hf_bfloat16" and emulated else cfg.steps
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_speed",
        "--only",
        name,
        "--steps",
        str(steps),
    ]
    out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    result = json.loads(out.strip().split("\n")[-1])
    print(f"{name:<18}", "  ".join(f"{key} {value:,.1f}" for key, value in result.items()))
    return result


def main(cfg: SpeedConfig) -> None:
    """Measure all contestants in turn and print the medians."""
    if cfg.only:
        print(json.dumps(measure_one(cfg.only, cfg.steps)))
        return
    products = ["product_float32", "product_bfloat16"]
    results: dict[str, list[dict]] = {name: [] for name in ["ours", *cfg.peers, *products]}
    for turn in range(cfg.rounds):
        for name, found in results.items():
            if turn == 0 or name not in ("hf_bfloat16", "product_bfloat16"):
                found.append(in_process(name, cfg))
    summary: dict[str, object] = {
        name: {
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in found),
            "peak_mb": max(r["peak_mb"] for r in found),
        }
        for name, found in results.items()
        if name not in products
    }
    ours = summary["ours"]["tokens_per_s"] * FLOPS_PER_TOKEN / 1e9
    summary["precision"] = pick_precision(torch.device("cpu"))
    summary["ours_gflops"] = ours
    for name in products:
        rate = statistics.median(r["gflops"] for r in results[name])
        summary[f"{name}_gflops"] = rate
        summary[f"share_of_{name}"] = ours / rate
    print(json.dumps(summary))


if __name__ == "__main__":
    run(main, parse(SpeedConfig, __doc__))
