"""Pretrain a model on token files: token files -> base checkpoint.

    python pretrain.py                                        43M on Chinese Wikipedia
    python pretrain.py --config configs/pretrain/sample.yaml  the quick start's run
    python pretrain.py --text diary.txt                       release/ learns to write as you do
    python pretrain.py --name deepctrl --base out/wiki        continue from another run's weights
    python pretrain.py --dry-run                              parameters, memory, time; no training

--text takes .txt, .md, .docx, JSON or tables, or a folder of them; tokens and settings are made to
fit (data_process/own.py). Any setting below can be given as a flag or in a YAML file. The same
command, started again, continues a stopped run. Ctrl-C saves first.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import babyllama  # noqa: F401  (says what to do where nothing is installed)

# isort: split
import torch

from babyllama.analysis.estimate import dry_run
from babyllama.analysis.plan import missing, plan
from babyllama.analysis.watch import WATCH
from babyllama.checkpoint import load_model
from babyllama.config import from_repo, parse, run, shown
from babyllama.cpu.fused import fuse
from babyllama.data import open_data
from babyllama.device import pick_device
from babyllama.distributed import start
from babyllama.errors import ConfigError
from babyllama.run_dir import open_run, read_base, require_same
from babyllama.scoring.prompts import READERS
from babyllama.sources import DataConfig
from babyllama.trainer import Objective, RunConfig, TrainConfig, train
from babyllama.tuning.regularise import RegulariseConfig, regularise
from data_process import own
from data_process.registry import require_known
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

# What a run shows of itself at each evaluation.
SAMPLES = ("今天", "中国的", "科学家发现")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of a pretraining run.

    Args:
        name: the run's directory, out/<name>
        tokenizer: SentencePiece model; token files lie in data/tokens/<its name>/<set>
        text: texts of your own, a file or a folder; starts from release unless --base says another,
            with its tokenizer and settings that fit their length
        base: start from the weights of this run or checkpoint instead of random ones
        model: shape of the model (configs/model/*.yaml)
        data: what is trained on
        regularise: against overfitting a small set
        dry_run: only print parameters, memory and time
    """

    name: str
    tokenizer: Path
    text: Path | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(samples=SAMPLES))
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)
    dry_run: bool = False


def make_model(cfg: PretrainConfig, tokenizer: Tokenizer) -> Transformer:
    """A new model with the tokenizer's vocabulary, or the base's weights and shape if there is one.

    raises: ConfigError if the base or model.vocab_size belongs to another tokenizer
    """
    if cfg.base is not None:
        loaded = load_model(from_repo(cfg.base))
        if loaded.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"--base {shown(loaded.path)} was trained with tokenizer {loaded.tokenizer.name} "
                f"({loaded.tokenizer.fingerprint[:12]}…), --tokenizer {shown(tokenizer.path)} is "
                f"another ({tokenizer.fingerprint[:12]}…); use the same for both"
            )
        return loaded.model
    if cfg.model.vocab_size not in (0, tokenizer.vocab_size):
        raise ConfigError(
            f"model.vocab_size is {cfg.model.vocab_size}, that of {shown(tokenizer.path)} is "
            f"{tokenizer.vocab_size}; leave model.vocab_size out"
        )
    shape = replace(cfg.model, vocab_size=tokenizer.vocab_size)
    if not cfg.dry_run:  # before memory is taken for a shape that may be a mistake
        require_same(cfg.name, replace(cfg, model=shape))
    torch.manual_seed(cfg.train.seed)
    return Transformer(shape)


def main(cfg: PretrainConfig) -> int:
    """Train; returns the exit code."""
    require_known(source.name for source in cfg.data.sources)
    objective = Objective()
    if cfg.dry_run and not cfg.base and (lacking := missing(cfg)):
        return plan(cfg, lacking, objective)
    tokenizer = Tokenizer(from_repo(cfg.tokenizer))
    model = make_model(cfg, tokenizer)
    cfg = replace(cfg, model=model.config)
    data = open_data(cfg.data, tokenizer, model.config.max_seq_len, cfg.train, READERS)
    with start(pick_device(cfg.device.device), cfg.parallel) as world:
        regularise(fuse(model.to(world.device), cfg.train.blocks), cfg.regularise)
        if cfg.dry_run:
            return dry_run(model, data.train, cfg, world, objective)
        with open_run(cfg.name, cfg, world) as directory:
            return train(
                model, data, tokenizer, cfg, world, directory, "pretrain", objective, WATCH
            )


def start_run() -> int:
    """Read the command line, with the settings that fit the user's own texts below it."""
    cfg = parse(PretrainConfig, __doc__, default_config=Path("configs/pretrain/wiki.yaml"))
    if cfg.text:
        name = cfg.name if cfg.name != "wiki" else None
        first = own.settings_for(cfg.text, "text", cfg.base, name, read_base)
        cfg = parse(PretrainConfig, __doc__, ["--config", str(first), *sys.argv[1:]])
    return main(cfg)


if __name__ == "__main__":
    run(start_run)
