"""Tables of data sets: lengths in characters and tokens, turns of dialogues, sources, drop reasons.

    python -m data_process.tools.stats inews smalltalk
    python -m data_process.tools.stats csl --tokenizer FILE

A set is a name in data/clean, or a directory of clean rows. Tokens are those that its token files
hold: a text's <eos> counts, labels and templates around dialogues do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, row_kind, texts_of
from data_process.pretokenize import as_content, pieces_of
from data_process.stages import SPLITS
from data_process.tools.list import read_counts
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class StatsConfig:
    """Settings of data_process.tools.stats.

    Args:
        sets: names in data/clean, or directories of clean rows; --sets may be left out
        tokenizer: a SentencePiece .model, to count tokens too
    """

    sets: tuple[str, ...] = ()
    tokenizer: Path | None = None


def place_of(name: str) -> Path:
    """The directory of a set's clean rows.

    raises: DataError if there are none, with the sets that there are
    """
    place = from_repo(name if "/" in name or "\\" in name else Path("data/clean") / name)
    if not any(place.glob("*-*.jsonl")):
        known = sorted({path.parent.name for path in place.parent.glob("*/*-*.jsonl")})
        raise DataError(
            f"{shown(place)}: wanted clean rows such as train-00000.jsonl, found none; "
            f"sets that are there: {', '.join(known) or 'none'}; "
            f"make one: python -m data_process.run {place.name}"
        )
    return place


def measured(place: Path, tokenizer: Tokenizer | None) -> Iterator[dict]:
    """The part, the source and the lengths of each row of a set."""
    for split in SPLITS:
        for path in sorted(place.glob(f"{split}-*.jsonl")):
            for row in tqdm(read_rows(path), path.name, unit=" rows", leave=False, disable=None):
                found = {"set": place.name, "part": split, "source": row["id"].rpartition("/")[0]}
                found["characters"] = sum(map(len, texts_of(row)))
                if tokenizer:
                    kind = row_kind(row)
                    pieces = [as_content(text, kind) for _, text in pieces_of(row)]
                    n_tokens = sum(map(len, tokenizer.encode_batch(pieces)))
                    found["tokens"] = n_tokens + (kind == "text")
                if "messages" in row:
                    found["turns"] = sum(m["role"] == "user" for m in row["messages"])
                yield found


def tables(places: list[Path], tokenizer: Tokenizer | None) -> dict[str, "DataFrame"]:
    """What the user reads, by title."""
    from pandas import DataFrame

    rows = DataFrame(row for place in places for row in measured(place, tokenizer))
    found = {}
    for what in ("characters", "tokens", "turns"):
        if what in rows:
            of_part = rows.dropna(subset=what).groupby(["set", "part"], sort=False)[what]
            spread = of_part.describe(percentiles=[0.5, 0.95, 0.99]).drop(columns=["std", "min"])
            found[what] = spread.assign(sum=of_part.sum())
    sources = rows.groupby(["set", "source"], sort=False).size()
    if len(sources) > len(places):
        found["rows by source"] = sources.to_frame("rows")
    dropped = {}
    for path in (place / "counts.json" for place in places):
        if path.is_file():
            reasons = read_counts(path).get("dropped", {})
            dropped[path.parent.name] = {reason: n["rows"] for reason, n in reasons.items()}
    if any(dropped.values()):
        found["dropped rows"] = DataFrame(dropped)
    return found


def main(cfg: StatsConfig) -> None:
    """Measure the sets and print the tables."""
    if not cfg.sets:
        raise ConfigError("no set to measure: name one, python -m data_process.tools.stats SET")
    tokenizer = Tokenizer(from_repo(cfg.tokenizer)) if cfg.tokenizer else None
    for title, table in tables([place_of(name) for name in cfg.sets], tokenizer).items():
        text = table.to_string(float_format="{:,.0f}".format, na_rep="")
        print(f"{title}\n{text}\n")


if __name__ == "__main__":
    run(main, parse(StatsConfig, __doc__, positional=("sets",)))
