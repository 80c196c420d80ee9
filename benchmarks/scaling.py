"""What bounds a model: its parameters or its tokens? Real runs of several sizes and token counts.

    python -m benchmarks.scaling                     nine runs, about 25 minutes of one core
    python -m benchmarks.scaling --also '[out/flagship_base]'   a run made before, beside them
    python -m benchmarks.scaling --titles title_computing --titles_data RAW/csl/csl_title_public
    python -m benchmarks.scaling --sizes '[64x2]' --tokens '[100000]' --out /tmp/few.png

Every run is `pretrain.py` with the released model's recipe, its own shape and its own schedule to
the end, out/<name>_<size>_<tokens>; a finished one is not made again, a stopped one is continued.
With --titles every run is fine-tuned on a summary set for a moment and asked for titles. Prints a
Markdown table and draws validation bits per byte over tokens and over computation, and ROUGE-1 over
tokens. A power law is fitted in the range of the runs and no further: the floor of bits under it
cannot be seen from small runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from babyllama.config import REPO, atomic_write, from_repo, parse, run, shown
from babyllama.device import flops_per_token
from babyllama.errors import CheckpointError, ConfigError
from babyllama.log import read_metrics
from babyllama.run_dir import differences
from model import ModelConfig, Transformer

CONTEXT = 512


@dataclass(frozen=True)
class ScalingConfig:
    """What is trained, and shown.

    Args:
        data: token files, as data_process.run writes them to data/mixtures/
        recipe: all else of a run
        sizes: shapes as <width>x<layers>; heads are 32 wide
        tokens: tokens that a run reads, to its own end of the schedule
        name: what the runs are called
        also: runs made before on the same data, shown beside
        titles: a summary set with token files; null: no titles
        titles_data: what eval_rouge.py takes with --data
        titles_steps: updates on the summary set
        titles_rows: abstracts of its dev part
        out: the picture
    """

    data: Path = Path("release/recipe/pretrain/base.yaml")
    recipe: Path = Path("release/recipe/pretrain/base.yaml")
    sizes: tuple[str, ...] = ("64x2", "96x3", "160x4")
    tokens: tuple[int, ...] = (250_000, 500_000, 1_000_000)
    name: str = "scaling"
    also: tuple[Path, ...] = ()
    titles: str | None = None
    titles_data: Path = Path("data/raw/csl/csl_title_public")
    titles_steps: int = 100
    titles_rows: int = 100
    out: Path = Path("assert/scaling.png")


@dataclass(frozen=True)
class Point:
    """A finished run."""

    run: str
    shape: str
    parameters: int
    tokens: int
    flops: float
    loss: float
    bits: float
    rouge: float | None = None


def command(*words: object) -> None:
    """Run a script of the repository, and say how much of the processor it took.

    raises: CheckpointError if it fails
    """
    line = [sys.executable, *map(str, words)]
    print("+ python", *line[1:], flush=True)
    before = os.times()
    code = subprocess.run(line, cwd=REPO).returncode
    spent = sum(os.times()[2:4]) - sum(before[2:4])  # of children; wall time knows other work too
    print(f"{spent:.0f} s of the processor", flush=True)
    if code:
        raise CheckpointError(
            f"wanted a finished {words[0]}, found exit code {code} ({' '.join(map(str, words))}); "
            f"mend what it says above, then start the same command again"
        )


def pretrain(cfg: ScalingConfig, size: str, tokens: int) -> Path:
    """The directory of a finished run."""
    try:
        dim, n_layers = map(int, size.split("x"))
    except ValueError:
        raise ConfigError(f"--sizes: wanted <width>x<layers> as in 64x2, found {size!r}") from None
    name = f"{cfg.name}_{size}_{tokens}"
    recipe = yaml.safe_load(from_repo(cfg.recipe).read_text("utf-8"))
    per_step = recipe["train"]["batch_size"] * CONTEXT
    steps = max(10, round(tokens / per_step))
    settings = {
        "name": name, "model.dim": dim, "model.n_layers": n_layers,
        "model.n_heads": max(1, dim // 32), "model.max_seq_len": CONTEXT,
        "optim.warmup_steps": min(recipe["optim"]["warmup_steps"], steps // 10),
        "optim.min_lr_ratio": 0.1,
        "train.max_steps": steps, "train.eval_every": steps, "train.save_every": 200,
        "train.keep": 1, "train.keep_best": "false", "train.samples": "[]",
    }  # fmt: skip
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command("pretrain.py", "--config", cfg.recipe, "--config", cfg.data, *flags)
    return REPO / "out" / name


def titles(cfg: ScalingConfig, base: Path) -> float:
    """ROUGE-1 times 100 of greedy titles, after a few steps on the summary set."""
    place = REPO / "out" / f"{cfg.name}_titles" / base.name
    scores = place / "titles.scores.json"
    if not scores.is_file():
        command(
            "sft.py", "--config", "release/recipe/sft/chat.yaml", "--dataset", cfg.titles,
            "--name", place, "--base", base, "--train.max_steps", cfg.titles_steps,
            "--train.eval_every", cfg.titles_steps, "--train.save_every", cfg.titles_steps,
            "--optim.warmup_steps", cfg.titles_steps // 10, "--data.max_val_rows", 64,
            "--train.keep_best", "false", "--train.samples", "[]",
        )  # fmt: skip
        command(
            "eval_rouge.py", place, "--data", cfg.titles_data, "--split", "dev", "--decoding",
            "greedy", "--limit", cfg.titles_rows, "--out", place / "titles.jsonl",
        )  # fmt: skip
    found = next(iter(json.loads(scores.read_text("utf-8"))["scores_x100"].values()))
    return next(iter(found["rouge"].values()))["rouge-1"]["mean"]


def read(place: Path) -> Point:
    """What a finished run says of itself.

    raises: CheckpointError if it has not ended with an evaluation
    """
    records = read_metrics(place)
    if not records or records[-1]["kind"] != "val" or not records[-1]["step"]:
        raise CheckpointError(
            f"{shown(place)}: wanted a run that ended with an evaluation, found "
            f"{len(records)} lines in metrics.jsonl; train it to its end"
        )
    whole = yaml.safe_load((place / "config.yaml").read_text("utf-8"))
    config = whole["model"]
    with torch.device("meta"):
        model = Transformer(ModelConfig(**config))
    tokens = [record for record in records if record["kind"] == "train"][-1]["tokens"]
    if whole.get("base"):  # trained on from another run, or a step of it, whose tokens count, too
        base = from_repo(Path(whole["base"]))
        tokens += read(base if (base / "metrics.jsonl").is_file() else base.parent).tokens
    return Point(
        place.name, f"{config['dim']}x{config['n_layers']}", model.n_parameters(), tokens,
        tokens * flops_per_token(model), records[-1]["loss"], records[-1]["bpb"],
    )  # fmt: skip


def require_same_data(places: Sequence[Path]) -> None:
    """Refuse runs whose figures say nothing beside each other.

    raises: ConfigError
    """
    found = [yaml.safe_load((place / "config.yaml").read_text("utf-8")) for place in places]
    for place, config in zip(places, found, strict=True):
        other = differences(found[0]["data"], config["data"], at="data")
        if other:
            raise ConfigError(
                f"{shown(place)} read other data than {shown(places[0])}: {'; '.join(other)}; "
                f"leave it out of --also"
            )


def fit(points: Sequence[Point]) -> str:
    """bits = c / N^a / D^b through all points by least squares of logarithms, in words."""
    values = np.log([[p.parameters, p.tokens, p.bits] for p in points])
    if len({p.parameters for p in points}) < 2 or len({p.tokens for p in points}) < 2:
        return "no fit: wanted two sizes and two token counts at least"
    design = np.column_stack([values[:, :2], np.ones(len(points))])
    found = np.linalg.lstsq(design, values[:, 2], rcond=None)[0]
    a, b = found[:2]
    worst = float(np.abs(design @ found - values[:, 2]).max())
    return (
        f"bits per byte ~ N^{a:.3f} D^{b:.3f}, at most {np.expm1(worst):.1%} off: twice the "
        f"parameters {2**a - 1:+.1%}, twice the tokens {2**b - 1:+.1%} (in this range)"
    )


def table(points: Sequence[Point]) -> str:
    """Markdown, a line a run."""
    lines = [
        "| shape | parameters | tokens | 10^12 operations | loss | bits per byte | ROUGE-1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in points:
        rouge = "" if p.rouge is None else f"{p.rouge:.1f}"
        lines.append(
            f"| {p.shape} | {p.parameters / 1e6:.2f} M | {p.tokens / 1e6:.2f} M | "
            f"{p.flops / 1e12:,.1f} | {p.loss:.3f} | {p.bits:.3f} | {rouge} |"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    """Bits per byte over tokens and over computation, a line a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titled = any(p.rouge is not None for p in points)
    figure, axes = pyplot.subplots(
        1, 2 + titled, figsize=(10 + 5 * titled, 4.2), constrained_layout=True
    )
    for shape in dict.fromkeys(p.shape for p in points):
        line = sorted((p for p in points if p.shape == shape), key=lambda p: p.tokens)
        label = f"{shape}: {line[0].parameters / 1e6:.2f} M parameters"
        tokens, bits = [p.tokens / 1e6 for p in line], [p.bits for p in line]
        axes[0].plot(tokens, bits, marker="o", label=label)
        axes[1].plot([p.flops / 1e12 for p in line], bits, marker="o", label=label)
        if titled:
            asked = [(p.tokens / 1e6, p.rouge) for p in line if p.rouge is not None]
            axes[2].plot(*np.array(asked).T, marker="o", label=label)
    labels = ("million tokens read", "10^12 operations", "million tokens read")
    for axis, label in zip(axes, labels, strict=False):
        axis.set_xscale("log")
        axis.margins(x=0.16)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=label, ylabel="validation bits per byte")
        axis.grid(alpha=0.3, which="both")
    if titled:
        axes[2].set(ylabel="ROUGE-1 of titles after the same fine-tuning")
    axes[0].legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot.close(figure)


def main(cfg: ScalingConfig) -> None:
    """Train what is missing, then show everything."""
    if not cfg.sizes or not cfg.tokens or min(cfg.tokens) < 1:
        raise ConfigError("wanted at least one of --sizes and --tokens, and tokens from 1")
    made = {(s, n): pretrain(cfg, s, n) for n in sorted(cfg.tokens) for s in cfg.sizes}
    others = [from_repo(place) for place in cfg.also]
    require_same_data([*made.values(), *others])
    asked = [*made.values(), *others] if cfg.titles else []
    rouge = {place: titles(cfg, place) for place in asked}
    points = [
        Point(**asdict(read(place)) | {"rouge": rouge.get(place)})
        for place in (*made.values(), *others)
    ]
    points.sort(key=lambda p: (p.parameters, p.tokens))
    print(table(points))
    print(fit(points))
    out = from_repo(cfg.out)
    draw(points, out)
    print(shown(out))
    print(json.dumps([asdict(point) for point in points]))


if __name__ == "__main__":
    run(main, parse(ScalingConfig, __doc__))
