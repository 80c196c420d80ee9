"""Fine-tuning runs side by side: the same rows and steps, something else changed in each.

    python -m benchmarks.sft_table --config configs/compare/lora.yaml --titles data/raw/csl/csl_title_public
    python -m benchmarks.sft_table --config configs/compare/regularisers.yaml --titles … \\
        --flags "--base out/wiki --device.device cpu"

The config names settings of sft.py that all runs share and, by its name in the table, what each run
changes of them. Each run is a process of its own, so that its peak of memory is its own; one that
is finished is not trained again. Titles are greedy; the last column compares with the first run, row
by row. Prints a Markdown table and writes it with all figures to out/<name>/table.json.
"""  # noqa: E501

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from babyllama.analysis.forgetting import ForgettingConfig, chosen_sources, measure, open_sources
from babyllama.checkpoint import load_model
from babyllama.config import REPO, from_repo, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.rows import write_rows
from babyllama.run_dir import find_checkpoint
from babyllama.sampling import SamplingConfig
from babyllama.scoring import tables
from babyllama.scoring.rouge import ROUGE
from babyllama.scoring.summarise import Asking, summarise
from babyllama.scoring.test_sets import PREDICTION_KEYS, SummarySet, open_set
from babyllama.tuning.average import mean_weights, newest_steps, save

HEAD = [
    "", "parameters that train", "stored, KB", "peak, GB", "minutes", "tokens/s",
    "validation loss (accuracy)", "R-1", "R-2", "R-L", "R-1 against the first (95 %)", "p",
]  # fmt: skip


@dataclass(frozen=True)
class TableConfig:
    """Which runs are compared, and on what.

    Args:
        settings: a config of sft.py, which all runs share
        runs: flags of sft.py that each run adds, by its name in the table
        titles: a test set as eval_rouge.py takes it with --data
        name: the runs go to out/<name>/
        flags: more flags of sft.py, for all runs
        held_out: sets of the validation loss, separated by commas; if absent those of the first run
        mean_of_last: also score the mean of the first run's so many last checkpoints; 0: do not
        split: the part of a test set in a folder
        limit: only so many of its rows
        batch_size: titles written at once
    """

    settings: Path
    titles: Path
    runs: dict[str, str] = field(default_factory=dict)
    name: str = "compare"
    flags: str = ""
    held_out: str = ""
    mean_of_last: int = 0
    split: str = "dev"
    limit: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.runs or self.mean_of_last in (1, *range(-9, 0)):
            raise ConfigError(
                f"wanted a config with `runs`, and mean_of_last 0 or 2 and more, found "
                f"{list(self.runs)} and {self.mean_of_last}; see configs/compare/lora.yaml"
            )


def trained(cfg: TableConfig, name: str) -> Path:
    """The directory of a run, trained to its end.

    raises: ConfigError if sft.py fails, which has said why
    """
    place = f"{cfg.name}/{re.sub(r'[^0-9a-z]+', '_', name.lower()).strip('_')}"
    flags = [*shlex.split(cfg.flags), *shlex.split(cfg.runs[name])]
    words = ["sft.py", "--config", str(cfg.settings), "--name", place, *flags]
    print(f"python {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words], cwd=REPO).returncode
    if code:
        raise ConfigError(f"the run {name!r} ended with exit code {code}; see above")
    return REPO / "out" / place


def cost(run: Path) -> dict[str, float]:
    """What a run took, evaluation and saving left out, as its own log tells."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps], steps)]  # noqa: B905
    seconds = sum(n / row["tokens_per_s"] for n, row in zip(tokens, steps, strict=True))
    peak = max(row["mem_gb"] for row in steps)
    return {"seconds": seconds, "tokens_per_s": sum(tokens) / seconds, "peak_gb": peak}


def stored(step: Path) -> dict[str, int]:
    """Numbers and bytes of what a checkpoint holds: the weights that were trained."""
    adapter = step / "adapter.safetensors"
    path = adapter if adapter.is_file() else step / "model.safetensors"
    n = sum(tensor.numel() for tensor in load_file(path).values())
    return {"n_trained": n, "n_bytes": path.stat().st_size}


def mean_of(run: Path, last: int) -> Path:
    """A run's directory with the mean of its last checkpoints."""
    out = run.with_name(f"{run.name}_mean")
    if not out.exists():
        save(mean_weights(newest_steps(run, last)), out)
    return out


def scored(
    step: Path, names: Sequence[str], found: SummarySet, cfg: TableConfig
) -> tuple[dict, tables.Measured]:
    """Validation figures of a checkpoint and the scores of its titles, which are kept beside it."""
    loaded, texts = load_model(step), found.column("text")
    with torch.inference_mode():
        each = measure(loaded, open_sources(loaded, names, ForgettingConfig()), 16)
    greedy = SamplingConfig(max_new_tokens=48, temperature=0.0)
    how = Asking(greedy, ForgettingConfig().prompts, cfg.batch_size)
    titles = summarise(loaded, texts, how).titles
    cells = zip(found.column("id"), texts, found.column("summary"), titles, strict=True)
    rows = (dict(zip(PREDICTION_KEYS, row, strict=True)) for row in cells)
    write_rows(step.parent / "titles.jsonl", rows)
    n_targets = sum(one["n_targets"] for one in each.values())
    both = {
        key: sum(one[key] * one["n_targets"] for one in each.values()) / n_targets
        for key in ("loss", "accuracy")
    }
    scores = tables.measure(titles, found.column("summary"))
    nature = tables.nature(titles, texts)
    return {**both, "sources": each, "scores": tables.summary(scores), "nature": nature}, scores


def line(name: str, row: dict) -> list[str]:
    """A run's cells."""
    rouge = next(iter(row["scores"]["rouge"].values()))
    found = [f"{row['loss']:.3f} ({row['accuracy']:.1%})"]
    found += [f"{rouge[key]['mean']:.1f}" for key in ROUGE]
    if "difference" in row:
        d = row["difference"]["rouge-1"]
        found += [f"{d['mean']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})", f"{d['p']:.3f}"]
    else:
        found += ["", ""]
    took = ["", "", "", "", ""]
    if "seconds" in row:
        took = [f"{row['n_trained']:,}", f"{row['n_bytes'] / 1000:,.0f}", f"{row['peak_gb']:.2f}",
                f"{row['seconds'] / 60:.1f}", f"{row['tokens_per_s']:,.0f}"]  # fmt: skip
    return [name, *took, *found]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rest))


def main(cfg: TableConfig) -> None:
    """Train what is not trained, score all, print, write."""
    found = open_set(cfg.titles, "", cfg.split, cfg.limit)
    runs = {name: trained(cfg, name) for name in cfg.runs}
    rows = {name: cost(place) | stored(find_checkpoint(place)) for name, place in runs.items()}
    first = next(iter(runs.values()))
    if cfg.mean_of_last:
        runs[f"mean of its last {cfg.mean_of_last}"] = mean_of(first, cfg.mean_of_last)
    names = chosen_sources(cfg.held_out, find_checkpoint(first), flag="--held_out")
    base: tables.Measured | None = None
    for name, place in runs.items():
        figures, scores = scored(find_checkpoint(place), names, found, cfg)
        rows[name] = rows.get(name, {}) | figures
        if base is not None:
            differences = tables.differences(scores, base)
            rows[name]["difference"] = next(iter(differences.values()))
        base = base or scores
    table = markdown([HEAD, *(line(name, row) for name, row in rows.items())])
    print(f"\n{len(found.rows)} titles of {found.name}\n\n{table}")
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(cfg).items()}
    settings["shared"] = yaml.safe_load(from_repo(cfg.settings).read_text("utf-8"))
    out = first.parent / "table.json"
    write_rows(out, [{"settings": settings, "rows": rows, "table": table}])
    print(f"\nfigures: {shown(out)}")
    print(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    run(main, parse(TableConfig, __doc__))
