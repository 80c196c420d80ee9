"""Score a checkpoint on the named benchmarks, from local files, with Chinese prompts.

    python -m bench.run out/sample_sft --tasks math,reading,reasoning --data data/benchmarks
    python -m bench.run out/sample --tasks cmmlu,cmmlu_cloze,c3 --limit 500 --shots 2
    python -m bench.run out/sample --tasks mmlu --prompts official        the harness' own prompt
    python -m bench.run out/sample --tasks humaneval --execute_model_code true
    python -m bench.run --list true                                       every task and its files

lm-evaluation-harness asks and scores (requirements/bench.txt); nothing is fetched. A second call
continues where the first one stopped. The report is <run>/bench-<step>/card.md and card.json;
beside it lies, for each task, every question with its reply. Groups: math, reading, reasoning,
knowledge, grammar, code, cloze (options scored by their own text), all.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babyllama.checkpoint import Loaded, load_model
from babyllama.config import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError, require
from babyllama.run_dir import chosen_run
from babyllama.scoring.test_sets import beside, checksums
from bench import contamination
from bench import report as cards
from bench.harness import Store, for_harness
from bench.run_task import ask
from bench.sandbox import run as sandbox
from bench.scoring import verdict
from bench.tasks import Rows, Task, choose, rows_of, tasks

HARNESS = "0.4.13"


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark run.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest run in out/
        tasks: groups and names, with commas
        data: folder with a folder for each benchmark, packed as published or not
        limit: rows of each task at most, evenly spread; if absent all
        shots: examples before each question; fewer where the context does not hold them
        prompts: zh: ours; official: those of the harness, mostly English
        out: folder for the report; if absent <run>/bench-<step>
        training: files or folders with all training rows, for a checkpoint whose runs are not here
        batch_size: questions at a time
        device: auto, cpu, cuda or mps
        execute_model_code: let HumanEval run the programs that the model writes, shut in
        list: print the tasks with their files and leave
    """

    checkpoint: Path | None = None
    tasks: str = "math,reading,reasoning"
    data: Path = Path("data/benchmarks")
    limit: int | None = None
    shots: int = 0
    prompts: Literal["zh", "official"] = "zh"
    out: Path | None = None
    training: tuple[Path, ...] = ()
    batch_size: int = 16
    device: Device = "auto"
    execute_model_code: bool = False
    list: bool = False

    def __post_init__(self) -> None:
        wanted = {
            "limit": ("1 or more", self.limit is None or self.limit >= 1),
            "shots": ("0 or more", self.shots >= 0),
            "batch_size": ("1 or more", self.batch_size >= 1),
        }
        require("bench", self, wanted)


def go_offline() -> None:
    """No library that the harness brings may look anything up."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    # Read when it was imported, which something else may have done before.
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


def require_harness() -> None:
    """raises: ConfigError if the harness is missing or another release"""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        found = "none"
    if found != HARNESS:
        raise ConfigError(
            f"wanted lm-eval {HARNESS}, found {found}; "
            f"pip install -r requirements/bench.txt -c constraints.txt"
        )


def read_tasks(cfg: BenchConfig) -> tuple[dict[str, tuple[Task, Rows]], dict[str, str]]:
    """Task and rows by name; and the tasks of groups that cannot be run here, with the reason.

    raises: DataError if the files of a task are missing that was asked for by its name
    """
    words = [word.strip() for word in cfg.tasks.split(",") if word.strip()]
    found, skipped = {}, {}
    for name in choose(words):
        task = tasks()[name]
        if task.score == "code" and not cfg.execute_model_code:
            why = "it runs what the model writes; --execute_model_code true allows that"
            if name in words:
                raise ConfigError(f"{name}: {why}")
            skipped[name] = why
            continue
        if cfg.prompts == "official" and not task.official and name not in words:
            skipped[name] = "the harness has no prompt for it"
            continue
        try:
            found[name] = task, rows_of(task, from_repo(cfg.data), cfg.limit)
        except DataError as error:
            if name in words or "found none" not in str(error):
                raise
            skipped[name] = str(error).removeprefix(f"{name}: ")
    if not found:
        raise DataError(f"no task can be run: {'; '.join(skipped.values())}")
    return found, skipped


def about(cfg: BenchConfig, loaded: Loaded) -> dict:
    """What every answer depends on beside its question."""
    return {
        "checkpoint_sha256": checksums(loaded.path),
        "harness": HARNESS,
        "prompts": cfg.prompts,
        "form": "text" if loaded.kind == "pretrain" else "dialogue",
        "shots": cfg.shots,
        "device": str(loaded.model.rope.device),
    }


def score(cfg: BenchConfig, loaded: Loaded, out: Path) -> dict:
    """Ask all tasks; each answer is kept as soon as it is there."""
    chosen, skipped = read_tasks(cfg)
    if any(task.score == "code" for task, _ in chosen.values()):
        sandbox.require()
    settings = about(cfg, loaded)
    print(f"{shown(loaded.path)}: {len(chosen)} tasks, "
          f"{sum(len(r.scored) for _, r in chosen.values()):,} questions")  # fmt: skip
    training = contamination.training_of(loaded.path, cfg.training)
    leaked = contamination.count({n: r.scored for n, (_, r) in chosen.items()}, training)
    reports = []
    for name, (task, rows) in chosen.items():
        store = Store(out / f"{name}.answers.jsonl", settings)
        lm = for_harness(loaded, cfg.batch_size, settings["form"] == "dialogue", store)
        report = ask(task, rows, lm, cfg.shots, cfg.prompts, out / f"{name}.samples.jsonl")
        worth = [report[key] for key in ("low", "high", "chance", "constant")]
        report |= {"verdict": verdict(*worth), "leaked": leaked.get(name)}
        reports.append(report)
        print(f"{name}: {report['score']:.1%} ({report['low']:.1%} – {report['high']:.1%}), "
              f"chance {report['chance']:.1%}: {report['verdict']}")  # fmt: skip
    return {
        "checkpoint": shown(loaded.path),
        "model": {"step": loaded.step, "kind": loaded.kind, "context": loaded.config.max_seq_len,
                  "n_parameters": loaded.model.n_parameters()},
        "about": settings | {"commit": cards.commit(), "limit": cfg.limit,
                             "batch_size": cfg.batch_size},
        "training": {"files": [shown(p) for p in training.files],
                     "missing": list(training.missing)},
        "skipped": skipped,
        "tasks": reports,
    }  # fmt: skip


def main(cfg: BenchConfig) -> None:
    """Score, print, write."""
    if cfg.list:
        for name, task in tasks().items():
            files = " or ".join(task.files["scored"])
            print(f"{name:24} {', '.join(task.groups):10} {task.folder}/{files}  {task.title}")
        return
    require_harness()
    go_offline()
    path = chosen_run(cfg.checkpoint)
    loaded = load_model(path, pick_device(cfg.device))
    out = from_repo(cfg.out) if cfg.out else beside(loaded.path) / f"bench-{loaded.path.name}"
    out.mkdir(parents=True, exist_ok=True)
    found = score(cfg, loaded, out)
    print("", cards.markdown(found), *map(shown, cards.write(found, out)), sep="\n")


def cli(argv: Sequence[str] | None = None) -> BenchConfig:
    return parse(BenchConfig, __doc__, argv, positional=("checkpoint",))


if __name__ == "__main__":
    run(main, cli())
