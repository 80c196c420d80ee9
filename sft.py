"""Fine-tune a base checkpoint on dialogues and summaries: base -> chat checkpoint.

    python sft.py --rows my.jsonl                     release/ learns dialogues of your own
    python sft.py --rows my.xlsx --base out/wiki      … or questions and answers in a table
    python sft.py --dataset sample                    the quick start's run
    python sft.py --dataset csl --base out/wiki       titles for CSL abstracts
    python sft.py --dataset redgpt --optim.lr 2e-5    any setting can be a flag; later wins
    python sft.py --dataset csl_lora --lora.rank 32   adapters beside the frozen base (LoRA)
    python sft.py --dataset csl:2,belle_multiturn:1   several sets: every row of csl comes twice
    python sft.py --dataset csl --inspect             show the first batch, train nothing

--rows takes a file or a folder: dialogues, instructions or texts with titles, as JSON, tables or
labelled text; tokens and settings are made to fit (data_process/own.py). --dataset NAME reads
configs/sft/NAME.yaml or the set's line in configs/sft/datasets.yaml, else the defaults hold; of
several sets those of the first one. Only the assistant's tokens are learnt. Summary rows become
dialogues in a new wording each epoch. The same command, started again, continues a stopped run.
Ctrl-C saves first.
"""

import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from babyllama.analysis.estimate import adapter_line, dry_run
from babyllama.analysis.inspect_batch import shown_batch
from babyllama.analysis.terminal_text import has_colours
from babyllama.analysis.watch import WATCH
from babyllama.checkpoint import load_model
from babyllama.config import parse, run, shown
from babyllama.cpu.fused import fuse
from babyllama.data import open_data
from babyllama.device import pick_device
from babyllama.distributed import start
from babyllama.errors import ConfigError
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig
from babyllama.run_dir import chosen_run, open_run, read_base, read_info
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig, SourceConfig
from babyllama.trainer import Objective, RunConfig, TrainConfig, train
from babyllama.tuning import preference
from babyllama.tuning.regularise import RegulariseConfig, regularise
from data_process import own
from data_process.registry import require_known, settings_of, weighted_names

# What a run shows of itself at each evaluation.
SAMPLES = ("你好！", "请介绍一下你自己。", "秋天有什么特点？")


@dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Settings of a fine-tuning run.

    Args:
        rows: dialogues, instructions or titles of your own, a file or a folder; starts from release
            unless --base says another, with settings that fit their number
        dataset: a set, whose settings are in configs/sft where it needs any; or several with
            weights, csl:2,belle:0.5
        name: the run's directory, out/<name>; null: the names of its sets
        base: run or checkpoint to start from; null: the newest pretraining run
        data: what is trained on; no sources: the set named by dataset
        lora: train adapters beside frozen weights; null: train the weights
        train: the loop; a batch is a number of dialogues
        regularise: against overfitting a small set
        objective: next_token: say what the rows say; dpo: prefer one answer to another, from rows
            of two (python -m babyllama.tuning.preference)
        dpo_beta: how dear it is to leave the base; less lets the answers change more
        dry_run: only print parameters, memory and time
        inspect: only print the first batch, with what is learnt in colour
    """

    rows: Path | None = None
    dataset: str | None = None
    name: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, warmup_steps=50))
    lora: LoraConfig | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3.0, samples=SAMPLES))
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)
    objective: Literal["next_token", "dpo"] = "next_token"
    dpo_beta: float = 0.1
    dry_run: bool = False
    inspect: bool = False


def resolve(cfg: SftConfig) -> SftConfig:
    """The config with its blanks filled in: sources, name and base.

    raises: ConfigError if there is nothing to train on or to start from
    """
    wanted = weighted_names(cfg.dataset) if cfg.dataset is not None else {}
    named = tuple(SourceConfig(*each) for each in wanted.items())
    if not named and not cfg.data.sources:
        raise ConfigError(
            "nothing to train on: name a file of your own, python sft.py --rows my.jsonl, or a "
            "set, python sft.py --dataset sample"
        )
    # The name of one set alone can be that of a config with sources of its own.
    if named and (not cfg.data.sources or cfg.dataset != named[0].name):
        cfg = replace(cfg, data=replace(cfg.data, sources=named))
    name = cfg.name or "+".join(Path(source.name).name for source in named)
    if not name:
        raise ConfigError("the run has no name: give --name, or --dataset to take that")
    require_known(source.name for source in cfg.data.sources)
    base = chosen_run(cfg.base, kind="pretrain")
    return replace(cfg, name=name, base=base.resolve() if base.exists() else base)


def main(cfg: SftConfig) -> int:
    """Fine-tune; returns the exit code."""
    cfg = resolve(cfg)
    assert cfg.base and cfg.name
    base = load_model(cfg.base)
    readers = preference.READERS if cfg.objective == "dpo" else READERS
    data = open_data(cfg.data, base.tokenizer, base.config.max_seq_len, cfg.train, readers)
    if cfg.inspect:
        n = cfg.train.micro_batch_size
        print(*shown_batch(data.train, n, base.tokenizer, has_colours()), sep="\n")
        return 0
    with start(pick_device(cfg.device.device), cfg.parallel) as world:
        model = base.model.to(world.device)
        objective = Objective()
        if cfg.objective == "dpo":  # which compares with a copy of the base
            objective = preference.dpo(copy.deepcopy(model), cfg.dpo_beta)
        if cfg.lora:
            apply_lora(model, cfg.lora, base=shown(base.path), seed=cfg.train.seed)
            if world.is_main:
                print(adapter_line(model), file=sys.stderr)
        regularise(fuse(model, cfg.train.blocks), cfg.regularise)
        earlier = read_info(base.path).get("tasks", [])
        model.more_info = {"tasks": list(dict.fromkeys([*data.train.teaches, *earlier]))}
        if cfg.dry_run:
            return dry_run(model, data.train, cfg, world, objective)
        with open_run(cfg.name, cfg, world) as directory:
            return train(
                model, data, base.tokenizer, cfg, world, directory, "sft", objective, WATCH
            )


def start_run() -> int:
    """Read the command line, with the settings that fit the user's own rows below it."""
    cfg = parse(SftConfig, __doc__, [*settings_of(sys.argv[1:]), *sys.argv[1:]])
    if not cfg.rows:
        return main(cfg)
    if cfg.dataset:
        raise ConfigError(f"--rows or --dataset, not both; found {cfg.rows} and {cfg.dataset}")
    first = own.settings_for(cfg.rows, "dialogue", cfg.base, cfg.name, read_base)
    return main(parse(SftConfig, __doc__, ["--config", str(first), *sys.argv[1:]]))


if __name__ == "__main__":
    run(start_run)
