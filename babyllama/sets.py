"""Which sets a run reads: their names and weights in a config, their token files on the disk."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babyllama.cli import from_repo, shown
from babyllama.errors import ConfigError, DataError
from tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Args:
        name: a set's name (data/tokens/<tokenizer>/<name>) or a directory of token files
        weight: how often each row is seen in an epoch; 0.5: half of the rows, 2: every row twice
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Args:
        sources: the mixture
        prompts: wordings for summary rows
        max_val_rows: validation takes the first rows of each source, at most this many
        max_seq_len: longest sequence in tokens, where it is less than the model's context
        weight_by: what counts alike in the loss: every target token, or every row, so that a
            title weighs as much as an essay
    """

    # A tuple, because jsonargparse lays a list over an earlier one of the same length: the weights
    # of a config would pass on to the sets that a flag names.
    sources: tuple[SourceConfig, ...] = ()
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    max_val_rows: int = 256
    max_seq_len: int | None = None
    weight_by: Literal["token", "row"] = "token"

    def __post_init__(self) -> None:
        if self.max_val_rows < 1:
            raise ConfigError(f"data.max_val_rows wants 1 or more, found {self.max_val_rows}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ConfigError(f"data.max_seq_len wants 2 or more, found {self.max_seq_len}")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise ConfigError(
                    f"source {source.name!r} has weight {source.weight}; wanted more than 0, "
                    f"or leave the source out"
                )


def named_sources(text: str) -> tuple[SourceConfig, ...]:
    """The sources that a command line names: "csl" or "csl:2,belle_multiturn:0.5".

    raises: ConfigError if a weight is no number or a name comes twice
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, weight = re.fullmatch(r"(.+?)(?::([^:/\\]*))?", part).groups()
        try:
            found.append(SourceConfig(name.strip(), 1.0 if weight is None else float(weight)))
        except ValueError:
            raise ConfigError(
                f"--dataset: wanted NAME or NAME:WEIGHT, found {part!r}; as in csl:2,belle:0.5"
            ) from None
    names = [source.name for source in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(
            f"--dataset {text!r}: wanted each set once; a weight says how often its rows are seen, "
            f"as in csl:2"
        )
    return tuple(found)


def token_directory(name: str, tokenizer: Tokenizer) -> Path:
    """Where the token files of a source lie."""
    is_path = "/" in name or "\\" in name
    return from_repo(name if is_path else Path("data/tokens") / tokenizer.path.stem / name)


def require_token_files(names: Sequence[str], tokenizer: Tokenizer) -> None:
    """raises: DataError with the commands that make those that are missing"""
    model, missing, commands = shown(tokenizer.path), [], []
    for name in names:
        where = token_directory(name, tokenizer)
        for split in ("train", "val"):
            if not any(where.glob(f"{split}-*.idx")):
                missing.append(f"{shown(where)} ({split}-*.idx)")
                commands.append(f"python -m data_process.run {where.name} --tokenizer {model}")
    if missing:
        raise DataError(
            f"wanted token files, found none in {', '.join(missing)}; make them: "
            f"{' && '.join(dict.fromkeys(commands))}"
        )
