"""One checkpoint out of several: the mean of their weights.

    python -m babyllama.tuning.average out/csl --last 3 --out out/csl_mean   the last few of a run
    python -m babyllama.tuning.average release out/csl --out out/both        the newest of several

Late checkpoints of a run lie round the bottom that it goes to; their mean lies nearer than each
(Izmailov et al. 2018, arXiv:1803.05407); so does the mean of a run and of one that went on from it
(Wortsman et al. 2022, arXiv:2203.05482). A run keeps as many as train.keep says. Adapters are
averaged as the whole weights that they make; the result is a plain model for use, without training
state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from babyllama.checkpoint import Loaded, Snapshot, load_model, model_weights, save_checkpoint
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.run_dir import find_checkpoint, list_checkpoints


@dataclass(frozen=True)
class AverageConfig:
    """Checkpoints to average.

    Args:
        runs: run directories, out/<name>, or checkpoints, as release/
        last: of one run, how many of its newest checkpoints; of several, each gives its newest
        out: run directory of the result; if absent <first run>_mean
    """

    runs: tuple[Path, ...] = ()
    last: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.last < 2:
            raise ConfigError(f"--last wants 2 or more, found {self.last}")


def newest_steps(run: Path, last: int) -> list[Path]:
    """The newest checkpoints of a run, oldest first.

    raises: ConfigError if there are fewer
    """
    steps = list_checkpoints(run)
    if len(steps) < last:
        raise ConfigError(
            f"wanted {last} checkpoints to average, found {len(steps)} in {shown(run)}; name a run "
            f"that keeps as many (--train.keep {last} when it trains), or a lower --last"
        )
    return steps[-last:]


def mean_weights(steps: Sequence[Path]) -> Loaded:
    """The newest checkpoint with the mean of the weights of all.

    raises: CheckpointError if they are not of one shape and tokenizer
    """
    sums: dict[str, Tensor] = {}
    kinds = set()
    for step in steps:
        loaded = load_model(step)
        kinds.add((loaded.config, loaded.tokenizer.fingerprint))
        if len(kinds) > 1:
            raise CheckpointError(
                f"{shown(step)}: wanted the shape and the tokenizer of {shown(steps[0])}, found "
                f"others; average checkpoints of one run"
            )
        for name, weight in model_weights(loaded.model).items():
            sums[name] = sums.get(name, 0) + weight.double()
    with torch.no_grad():
        parameters = dict(loaded.model.named_parameters())
        for name, total in sums.items():
            parameters[name].copy_(total / len(steps))
    return loaded


def save(loaded: Loaded, out: Path) -> Path:
    """Write a model as a checkpoint for use, whole or not at all."""
    made = Snapshot(out, loaded.model, loaded.tokenizer, loaded.kind, shown(loaded.path))
    return save_checkpoint(made, loaded.step)


def main(cfg: AverageConfig) -> None:
    """Average and write."""
    if not cfg.runs:
        raise ConfigError("name a run: python -m babyllama.tuning.average out/csl --last 3")
    places = [from_repo(run).resolve() for run in cfg.runs]
    place = places[0]
    out = from_repo(cfg.out) if cfg.out else place.with_name(f"{place.name}_mean")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {shown(out)}: wanted a new directory, found files; name another")
    alone = len(places) == 1
    steps = newest_steps(place, cfg.last) if alone else list(map(find_checkpoint, places))
    print(f"{shown(save(mean_weights(steps), out))}: the mean of {', '.join(map(shown, steps))}")


if __name__ == "__main__":
    run(main, parse(AverageConfig, __doc__, positional=["runs"]))
