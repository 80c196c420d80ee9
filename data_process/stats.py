"""Tables and a picture of data sets: rows, lengths, tokens, what was dropped, turns of dialogues.

    python -m data_process.stats inews smalltalk
    python -m data_process.stats csl --tokenizer data/tokenizers/sample.model --picture out/csl.png
    python -m data_process.stats /mnt/corpus/clean/wiki

A set is a name in data/clean, or a directory of clean rows. With a tokenizer the token files
beside it (../../tokens/<tokenizer>/<set>) are measured too. Their tokens are the stored ones: a
text's <eos> counts, the labels and wordings that are laid round dialogues do not. Every row is
read once; 4 bytes a row stay in memory, 8 with tokens. The picture is drawn in charts.py.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from babyllama.cli import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.fonts import cjk_font
from babyllama.rows import read_rows, texts_of
from babyllama.token_file import TokenFile
from data_process.charts import draw
from data_process.split import SPLITS
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from pandas import DataFrame

MANY_TURNS = 12  # dialogues with as many turns or more share a line of the table


@dataclass(frozen=True)
class StatsConfig:
    """Settings of data_process.stats.

    Args:
        sets: names in data/clean, or directories of clean rows; --sets may be left out
        tokenizer: a SentencePiece .model, to measure the token files that were made with it
        picture: the PNG to write
        labels: language of the picture; auto: Chinese if a font for it is found
    """

    sets: tuple[str, ...] = ()
    tokenizer: Path | None = None
    picture: Path = Path("out/stats.png")
    labels: Literal["auto", "zh", "en"] = "auto"


@dataclass
class Part:
    """What was measured of one split of a set; the arrays have one entry a row.

    n_ends: how many of the tokens are <eos>, which stands for no character
    turns: dialogues by their number of questions with answers
    sources: rows by the name before the number in their ids
    """

    split: str
    chars: np.ndarray
    tokens: np.ndarray | None = None
    n_ends: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    @property
    def chars_per_token(self) -> float:
        return int(self.chars.sum()) / max(1, int(self.tokens.sum()) - self.n_ends)


@dataclass
class SetStats:
    """What was measured of one set.

    dropped: rows by reason; None where no counts.json tells
    """

    name: str
    parts: list[Part]
    dropped: dict[str, int] | None

    @property
    def chars(self) -> np.ndarray:
        return np.concatenate([part.chars for part in self.parts])

    @property
    def tokens(self) -> np.ndarray | None:
        found = [part.tokens for part in self.parts if part.tokens is not None]
        return np.concatenate(found) if found else None

    @property
    def ratios(self) -> np.ndarray:
        """Characters to a token of each row."""
        return np.concatenate(
            [part.chars / np.maximum(1, part.tokens - (part.n_ends > 0)) for part in self.parts]
        )

    @property
    def turns(self) -> Counter[int]:
        return sum((part.turns for part in self.parts), Counter())

    def by_turns(self) -> dict[str, int]:
        """Dialogues by their number of turns in order, the long ones together."""
        turns = self.turns
        few = {str(n): turns[n] for n in sorted(turns) if n < MANY_TURNS}
        many = sum(n_rows for n, n_rows in turns.items() if n >= MANY_TURNS)
        return few | ({f"{MANY_TURNS}+": many} if many else {})


def files_of(name: str) -> dict[str, list[Path]]:
    """The files of a set's clean rows by split.

    name: of a set in data/clean, or a path
    raises: DataError if there are none, with the sets that there are
    """
    place = from_repo(name if "/" in name or "\\" in name else Path("data/clean") / name)
    files = {split: sorted(place.glob(f"{split}-*.jsonl")) for split in SPLITS}
    if not any(files.values()):
        known = sorted({path.parent.name for path in place.parent.glob("*/*-*.jsonl")})
        raise DataError(
            f"{shown(place)}: wanted clean rows such as train-00000.jsonl, found none; "
            f"sets that are there: {', '.join(known) or 'none'}; "
            f"make one: python -m data_process.run {place.name}"
        )
    return {split: found for split, found in files.items() if found}


def measure(name: str, tokenizer: Tokenizer | None = None) -> SetStats:
    """Read a set once.

    raises: DataError if rows, counts.json or token files are missing, damaged or out of step
    """
    files = files_of(name)
    place = next(iter(files.values()))[0].parent
    counts = _counts_of(place)
    with tqdm(desc=place.name, total=counts.get("rows_out"), unit=" rows", disable=None) as bar:
        parts = [_part(split, found, tokenizer, bar) for split, found in files.items()]
    dropped = {reason: found["rows"] for reason, found in counts.get("dropped", {}).items()}
    return SetStats(place.name, parts, dropped if counts else None)


def _counts_of(place: Path) -> dict:
    path = place / "counts.json"
    if not path.exists():
        return {}
    try:
        counts = json.loads(path.read_text("utf-8"))
        if all(isinstance(found["rows"], int) for found in counts["dropped"].values()):
            return counts
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{shown(path)}: wanted the counts of a set (dropped: reason: rows), found something "
        f"else; make the set again: python -m data_process.run {place.name}"
    )


def _part(split: str, files: list[Path], tokenizer: Tokenizer | None, bar: tqdm) -> Part:
    chars, tokens = array("i"), []
    part = Part(split, np.zeros(0, np.int32))
    for path in files:
        n_before = len(chars)
        for row in read_rows(path):
            chars.append(sum(map(len, texts_of(row))))
            part.sources[row["id"].rpartition("/")[0]] += 1
            if "messages" in row:
                part.turns[sum(m["role"] == "user" for m in row["messages"])] += 1
            bar.update()
        if tokenizer:
            file = token_file(path, tokenizer, len(chars) - n_before)
            tokens.append(lengths(file))
            part.n_ends += file.n_docs if file.kind == "text" else 0
    part.chars = np.frombuffer(chars, np.int32)
    part.tokens = np.concatenate(tokens) if tokenizer else None
    return part


def token_file(rows: Path, tokenizer: Tokenizer, n_rows: int) -> TokenFile:
    """The token file that belongs to a file of clean rows."""
    place, name = rows.parent, tokenizer.path.stem
    stem = place.parent.parent / "tokens" / name / place.name / rows.stem
    command = f"python -m data_process.run {place.name} --tokenizer {shown(tokenizer.path)}"
    if not stem.with_name(stem.name + ".idx").is_file():
        raise DataError(
            f"{shown(stem)}.idx: no such file; wanted the tokens of {shown(rows)}; "
            f"make them: {command}"
        )
    file = TokenFile(stem, tokenizer.fingerprint, verify=False)
    if file.n_docs != n_rows:
        raise DataError(
            f"{shown(file.bin_path)}: wanted the {n_rows:,} rows of {shown(rows)}, found "
            f"{file.n_docs:,}; the rows have changed since, make the tokens again: {command}"
        )
    return file


def lengths(file: TokenFile) -> np.ndarray:
    """Stored tokens of each row: (n_docs,) int32."""
    ends = file.ends
    if file.kind != "text":
        ends = np.concatenate(([0], file.piece_ends))[ends]
    return np.diff(ends, prepend=0).astype(np.int32)


def tables(sets: Sequence[SetStats]) -> dict[str, "DataFrame"]:
    """What the user reads, by title. A table that would be empty is left out."""
    from pandas import DataFrame, MultiIndex

    lines, sources = {}, {}
    for one in sets:
        for part in one.parts:
            line = {("", "rows"): len(part.chars)} | _spread("characters", part.chars)
            if part.tokens is not None:
                line |= _spread("tokens", part.tokens)
                line["tokens", "chars each"] = part.chars_per_token
            lines[one.name, part.split] = line
            for source, n_rows in part.sources.items():
                sources.setdefault((one.name, source), {})[part.split] = n_rows
    lengths_table = DataFrame.from_dict(lines, orient="index")
    lengths_table.columns = MultiIndex.from_tuples(lengths_table.columns)
    found = {"lengths": lengths_table}
    if len(sources) > len(sets):
        found["rows by source"] = DataFrame.from_dict(sources, orient="index")
    found["dropped rows"] = DataFrame({one.name: one.dropped for one in sets if one.dropped})
    turns = DataFrame({one.name: one.by_turns() for one in sets if one.turns})
    found["dialogues by number of turns"] = turns.sort_index(
        key=lambda names: names.map(lambda name: int(name.strip("+")))
    )
    return {title: table for title, table in found.items() if len(table)}


def _spread(what: str, values: np.ndarray) -> dict[tuple[str, str], int]:
    median, high = np.percentile(values, (50, 95)).round().astype(int).tolist()
    figures = {"all": int(values.sum()), "median": median, "95%": high, "most": int(values.max())}
    return {(what, name): value for name, value in figures.items()}


def as_text(table: "DataFrame") -> str:
    """A table for the terminal, with thousands set apart and gaps left blank."""
    from pandas import isna, option_context

    def cell(value: float) -> str:
        if isna(value):
            return ""
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.2f}"

    with option_context("display.unicode.east_asian_width", True):
        return table.map(cell).to_string()


def chosen_font(labels: str) -> str | None:
    """The font for Chinese labels; None for English ones.

    raises: ConfigError if Chinese is asked for and there is no font for it
    """
    font = None if labels == "en" else cjk_font()
    if labels == "zh" and font is None:
        raise ConfigError(
            "--labels zh: wanted a font with Chinese characters, found none; install one "
            "(Noto Sans CJK, WenQuanYi), or leave out --labels"
        )
    return font


def main(cfg: StatsConfig) -> None:
    """Measure the sets, print the tables, draw the picture."""
    if not cfg.sets:
        raise ConfigError("no set to measure: name one, python -m data_process.stats SET")
    font = chosen_font(cfg.labels)
    tokenizer = Tokenizer(from_repo(cfg.tokenizer)) if cfg.tokenizer else None
    sets = [measure(name, tokenizer) for name in dict.fromkeys(cfg.sets)]
    for title, table in tables(sets).items():
        print(f"{title}\n{as_text(table)}\n")
    for one in sets:
        if one.dropped is None:
            print(f"{one.name}: there is no counts.json that says what was dropped")
    cfg.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(sets, cfg.picture, font, tokenizer.path.stem if tokenizer else None)
    print(f"picture: {cfg.picture}")


if __name__ == "__main__":
    run(main, parse(StatsConfig, __doc__, positional=("sets",)))
