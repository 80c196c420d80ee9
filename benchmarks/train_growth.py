"""How tokens/s and peak memory of a training step grow with batch, context, vocabulary and layers.

    python -m benchmarks.train_growth            about 10 minutes on two cores; out/growth.png
    python -m benchmarks.train_growth --batch '[1,4]' --layers '[6,12]' --context '[]' \\
        --vocabulary '[]' --out /tmp/few.png     a few points

The 43M shape, with one size changed at a time: sequences computed at once (of 512), context (4
sequences), pieces and layers (8 sequences of 512). Every point is a process of its own, so that
peaks of memory do not mix: one step of at most 8 sequences warms up, the next one or two are
timed. A dashed line is what `--dry-run` would have said of the memory. The last line is JSON.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from babyllama.analysis.estimate import memory_by_part
from babyllama.config import REPO, atomic_write, from_repo, parse, run, shown
from babyllama.device import Scaler, flops_per_token, memory_gb, pick_precision
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.trainer import forward_backward, next_token_loss
from benchmarks.peers import SHAPE_43M
from model import ModelConfig, Transformer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GrowthConfig:
    """What to measure.

    Args:
        batch: sequences of 512 tokens computed at a time
        context: tokens of each of 4 sequences
        vocabulary: pieces, with 8 sequences of 512
        layers: with 8 sequences of 512
        out: the picture
        only: measure one point in this process, e.g. "8 512 65000 12" (used by the benchmark)
    """

    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    context: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    vocabulary: tuple[int, ...] = (8_000, 16_000, 32_000, 65_000, 128_000)
    layers: tuple[int, ...] = (6, 12, 24, 48)
    out: Path = Path("out/growth.png")
    only: str | None = None


class Point(NamedTuple):
    """The sizes of one measurement."""

    batch: int = 8
    context: int = 512
    vocabulary: int = 65_000
    layers: int = 12


def points_of(cfg: GrowthConfig) -> dict[str, list[Point]]:
    """The measurements by the size that changes."""
    return {
        "batch": [Point(batch=n) for n in cfg.batch],
        "context": [Point(batch=4, context=n) for n in cfg.context],
        "vocabulary": [Point(vocabulary=n) for n in cfg.vocabulary],
        "layers": [Point(layers=n) for n in cfg.layers],
    }


def measure(point: Point) -> dict[str, float]:
    """One point in this process: a step of the project's trainer."""
    steps(replace(SHAPE_43M, dim=32, vocab_size=64, n_layers=1, max_seq_len=8), [1])
    program_gb = memory_gb(CPU)  # with all the code that a step brings in
    config = replace(
        SHAPE_43M, max_seq_len=point.context, vocab_size=point.vocabulary, n_layers=point.layers
    )
    model, seconds = steps(config, [min(point.batch, 8), point.batch, point.batch])
    parts = memory_by_part(config, model.n_parameters(), point.batch, pick_precision(CPU))
    computed = sum(parts.values())
    rate = point.batch * point.context / min(seconds[1:])
    return {
        "tokens_per_s": rate,
        "gflops": rate * flops_per_token(model) / 1e9,
        "peak_gb": memory_gb(CPU),
        "computed_gb": computed + program_gb,
    }


def steps(config: ModelConfig, batches: list[int]) -> tuple[Transformer, list[float]]:
    """Steps of the project's trainer with so many sequences each: the model, and the seconds of
    each step. Where the second takes long, it is the last."""
    model, world = Transformer(config), World(0, 1, CPU)
    optimizer, scaler = make_optimizer(model, OptimConfig()), Scaler(CPU, pick_precision(CPU))
    seconds: list[float] = []
    for batch in batches:
        if len(seconds) == 2 and seconds[1] > 5:
            break
        ids = torch.randint(0, config.vocab_size, (batch, config.max_seq_len + 1))
        parts = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
        started = time.perf_counter()
        forward_backward(model, [parts], world, scaler, next_token_loss)
        scaler.step(optimizer, list(model.parameters()), 1.0)
        seconds.append(time.perf_counter() - started)
    return model, seconds


def in_process(point: Point) -> dict[str, float] | None:
    """One point in a fresh process; None where the machine has too little memory for it."""
    config = replace(SHAPE_43M, max_seq_len=point.context, n_layers=point.layers)
    tables = 2 * point.vocabulary * config.dim
    wanted = sum(memory_by_part(config, tables, point.batch, "float32").values())
    there = psutil.virtual_memory().available / 1e9
    if 1.2 * wanted > there:
        print(f"{point}: left out, it takes about {wanted:.0f} GB and {there:.0f} are free")
        return None
    numbers = " ".join(map(str, point))
    command = [sys.executable, "-m", "benchmarks.train_growth", "--only", numbers]
    out = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(out.strip().split("\n")[-1])
    print(numbers, " ".join(f"{key} {value:,.1f}" for key, value in found.items()), flush=True)
    return found


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Above, the speed; below, the memory; a column for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {name: found for name, found in results.items() if found}
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(4 * len(columns), 6), constrained_layout=True, squeeze=False
    )
    for column, (name, found) in enumerate(columns.items()):
        sizes = [point[name] for point in found]
        speed, memory = axes[:, column]
        speed.plot(sizes, [point["tokens_per_s"] for point in found], marker="o")
        speed.set(title=name, ylabel="" if column else "tokens/s")
        memory.plot(sizes, [p["peak_gb"] for p in found], marker="o", label="measured")
        memory.plot(sizes, [p["computed_gb"] for p in found], ls="--", label="computed")
        memory.set(xlabel=name, ylabel="" if column else "peak memory, GB")
        for axis in (speed, memory):
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[1, 0].legend()
    figure.suptitle("A training step of the 43M shape, one size changed at a time")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot.close(figure)


def growth(name: str, found: list[dict]) -> str:
    """From the smallest to the largest size: what changes, and what memory a unit more takes."""
    first, last = found[0], found[-1]
    more = (last["peak_gb"] - first["peak_gb"]) / (last[name] - first[name]) * 1000
    return (
        f"{name} {first[name]:,} to {last[name]:,}: tokens/s x "
        f"{last['tokens_per_s'] / first['tokens_per_s']:.2f}, GFLOP/s x "
        f"{last['gflops'] / first['gflops']:.2f}, {more:,.3f} MB more for each; memory over the "
        f"computed: {min(p['peak_gb'] / p['computed_gb'] for p in found):.2f} to "
        f"{max(p['peak_gb'] / p['computed_gb'] for p in found):.2f}"
    )


def main(cfg: GrowthConfig) -> None:
    """Measure every point, print what grows, and draw it."""
    if cfg.only:
        print(json.dumps(measure(Point(*map(int, cfg.only.split())))))
        return
    results: dict[str, list[dict]] = {}
    measured: dict[Point, dict | None] = {}
    for name, points in points_of(cfg).items():
        for point in points:
            if point not in measured:
                measured[point] = in_process(point)
        results[name] = [point._asdict() | measured[point] for point in points if measured[point]]
    if not any(results.values()):
        raise ConfigError("nothing to measure: give at least one size, --batch '[1,8]'")
    for name, found in results.items():
        if len(found) > 1:
            print(growth(name, found))
    out = from_repo(cfg.out)
    draw(results, out)
    print(shown(out))
    print(json.dumps({"config": asdict(cfg) | {"out": str(cfg.out)}, "results": results}))


if __name__ == "__main__":
    run(main, parse(GrowthConfig, __doc__))
