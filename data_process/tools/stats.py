"""Tables and a picture of data sets: rows, lengths, tokens, what was dropped, turns of dialogues.

    python -m data_process.tools.stats inews smalltalk
    python -m data_process.tools.stats csl --tokenizer FILE --picture out/csl.png
    python -m data_process.tools.stats /mnt/corpus/clean/wiki

A set is a name in data/clean, or a directory of clean rows. With a tokenizer the token files
beside it (../../tokens/<tokenizer>/<set>) are measured too. Their tokens are the stored ones: a
text's <eos> counts, labels and templates around dialogues do not. Every row is
read once; 4 bytes a row stay in memory, 8 with tokens.

The labels of the picture are Chinese where there is a font for them, else English. Lengths lie on a
logarithmic axis; the height of a curve is the share of rows that falls into each step of equal
ratio, so that sets of different size can be compared.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from babyllama.config import atomic_write, from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.log import cjk_font
from babyllama.rows import read_rows, texts_of
from babyllama.token_file import TokenFile
from data_process.stages import SPLITS
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#3a6ea5", "#e08e45", "#4f9d7a", "#b5546f", "#8a74b9", "#5fb0c5", "#b79a3b", "#7d7d7d")
SPLIT_COLOURS = {"train": "#5d6d7e", "val": "#aab7c4", "test": "#e3b98b"}
INK, FAINT = "#333333", "#8a8a8a"
MOST_BARS = 12
N_STEPS = 36

WORDS = {
    "title": ("数据集一览", "Data sets"),
    "total": ("{rows:,} 行，{chars:,} 字", "{rows:,} rows, {chars:,} characters"),
    "tokens": ("，{tokens:,} token（{model}）", ", {tokens:,} tokens ({model})"),
    "chars": ("每行的字数", "Characters in a row"),
    "ids": ("每行的 token 数", "Tokens in a row"),
    "ratio": ("每个 token 的字数", "Characters to a token"),
    "rows": ("各来源的行数", "Rows of each source"),
    "dropped": ("清洗时去掉的行", "Rows that were dropped"),
    "turns": ("每段对话的轮数", "Turns in a dialogue"),
    "share": ("占全部行的 %", "% of all rows"),
    "median": ("中位数", "median"),
    "others": ("其余 {n} 项", "{n} others"),
    "train": ("训练", "train"), "val": ("验证", "validation"), "test": ("测试", "test"),
}  # fmt: skip


class Words:
    """The labels in one language."""

    def __init__(self, font: str | None) -> None:
        self._is_english = font is None

    def __call__(self, name: str, **values: object) -> str:
        return WORDS[name][self._is_english].format(**values)

    def name(self, text: str) -> str:
        """A name of the user's; without a Chinese font its other characters are spelled out."""
        return text.encode("ascii", "backslashreplace").decode() if self._is_english else text


def draw(sets: Sequence["SetStats"], path: Path, font: str | None, tokenizer: str | None) -> None:
    """Write the picture.

    font: for Chinese labels; None: English ones
    tokenizer: its name, where tokens were measured
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    words = Words(font)
    panels = panels_of(sets)
    per_line = {1: [1], 2: [2], 3: [3], 4: [2, 2], 5: [3, 2], 6: [3, 3]}[len(panels)]
    style = {
        "font.family": [*([font] if font else []), "DejaVu Sans"], "font.size": 10,
        "axes.unicode_minus": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": FAINT, "axes.labelcolor": FAINT, "text.color": INK,
        "xtick.color": FAINT, "ytick.color": FAINT, "axes.titlesize": 12,
        "axes.titlelocation": "left", "axes.titlepad": 10, "legend.fontsize": 9,
        "legend.edgecolor": "none", "legend.framealpha": 0.85,
        "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.12,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(15, 0.6 + 4.2 * len(per_line)), layout="constrained")
        # A line keeps its own margins: long names below do not push the curves above aside.
        lines = figure.subfigures(len(per_line), 1, squeeze=False)[:, 0]
        places = [
            a
            for line, n in zip(lines, per_line, strict=True)
            for a in line.subplots(1, n, squeeze=False)[0]
        ]
        for panel, axes in zip(panels, places, strict=True):
            panel(axes, sets, words)
        figure.suptitle(_title(sets, words, tokenizer), x=0.01, ha="left", fontsize=14)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def panels_of(sets: Sequence["SetStats"]) -> list[Callable]:
    """The panels for which there is something to show."""
    has_tokens = any(one.tokens is not None for one in sets)
    found = [_chars, *([_tokens, _ratio] if has_tokens else []), _rows]
    found += [_dropped] * any(one.dropped for one in sets)
    return found + [_turns] * any(one.turns for one in sets)


def _title(sets: Sequence["SetStats"], words: Words, tokenizer: str | None) -> str:
    names = "  ".join(words.name(one.name) for one in sets[:6]) + " …" * (len(sets) > 6)
    total = words("total", rows=sum(len(one.chars) for one in sets),
                  chars=sum(int(one.chars.sum()) for one in sets))  # fmt: skip
    if tokenizer:
        n_tokens = sum(int(one.tokens.sum()) for one in sets)
        total += words("tokens", tokens=n_tokens, model=words.name(tokenizer))
    return f"{words('title')}    {names}    {total}"


def _coloured(sets: Sequence["SetStats"]) -> list[tuple[object, "SetStats"]]:
    """Every set with a colour of its own."""
    from matplotlib import colormaps

    colours = COLOURS
    if len(sets) > len(COLOURS):
        colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(sets)))
    return list(zip(colours, sets, strict=False))


def _chars(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    _lengths(axes, [one.chars for one in sets], sets, words)
    axes.set_title(words("chars"))


def _tokens(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    _lengths(axes, [one.tokens for one in sets], sets, words)
    axes.set_title(words("ids"))


def _lengths(
    axes: "Axes", values: list[np.ndarray], sets: Sequence["SetStats"], words: Words
) -> None:
    lowest, highest = max(1, min(map(np.min, values))), max(map(np.max, values)) + 1
    edges = np.unique(np.ceil(np.geomspace(lowest, highest, N_STEPS + 1)))
    # Whole numbers make the narrow steps uneven; a step twice as wide counts half.
    weight = np.log(highest / lowest) / N_STEPS / np.diff(np.log(edges))
    _curves(axes, values, edges, weight, sets, words, ",.0f")
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    ticks = [m * 10**k for k in range(8) for m in ((1, 2, 5) if highest < 200 * lowest else (1,))]
    ticks = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _ratio(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    values = [one.ratios for one in sets]
    lowest = min(np.percentile(v, 0.5) for v in values)
    highest = max(np.percentile(v, 99.5) for v in values)
    edges = np.linspace(lowest, highest + 1e-3, N_STEPS + 1)
    _curves(axes, values, edges, np.ones(N_STEPS), sets, words, ".2f")
    axes.set_title(words("ratio"))


def _curves(axes: "Axes", values: list[np.ndarray], edges: np.ndarray, weight: np.ndarray,
            sets: Sequence["SetStats"], words: Words, form: str) -> None:  # fmt: skip
    """One curve a set: the share of rows in each step, and a dotted line at the median."""
    for (colour, one), found in zip(_coloured(sets), values, strict=True):
        share = np.histogram(found, edges)[0] / len(found) * 100 * weight
        median = float(np.median(found))
        label = f"{words.name(one.name)}  {words('median')} {median:{form}}"
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.14)
        axes.stairs(share, edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(median, color=colour, linewidth=1, linestyle=":")
    n_lines = -(-len(sets) // 2) if len(sets) > 5 else len(sets)
    axes.set_ylabel(words("share"))
    axes.set_ylim(0, axes.get_ylim()[1] * (1 + 0.09 * n_lines))
    axes.legend(loc="upper left", ncols=-(-len(sets) // n_lines))


def _rows(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    bars: dict[str, Counter[str]] = {}
    for one in sets:
        sources = {source for part in one.parts for source in part.sources}
        for part in one.parts:
            for source, n_rows in part.sources.items():
                name = one.name if len(sources) == 1 else f"{one.name} · {source}"
                bars.setdefault(name, Counter())[part.split] += n_rows
    bars = _most(bars, words)
    splits = [split for split in SPLITS if any(bar[split] for bar in bars.values())]
    for split in splits:
        left = [sum(bar[s] for s in splits[: splits.index(split)]) for bar in bars.values()]
        axes.barh(range(len(bars)), [bar[split] for bar in bars.values()], left=left, height=0.6,
                  color=SPLIT_COLOURS[split], label=words(split))  # fmt: skip
    parts = [
        " + ".join(f"{bar[split]:,}" for split in splits if bar[split]) for bar in bars.values()
    ]
    _finish_bars(axes, bars, parts, words)
    axes.legend(loc="upper left", ncols=len(splits), bbox_to_anchor=(0, 0))
    axes.set_title(words("rows"))


def _dropped(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    bars: dict[str, Counter[int]] = {}
    for number, one in enumerate(sets):
        for reason, n_rows in (one.dropped or {}).items():
            bars.setdefault(reason, Counter())[number] += n_rows
    bars = _most(dict(sorted(bars.items(), key=lambda bar: -bar[1].total())), words)
    left = np.zeros(len(bars))
    for number, (colour, one) in enumerate(_coloured(sets)):
        width = [bar[number] for bar in bars.values()]
        label = words.name(one.name) if sum(width) else None
        axes.barh(range(len(bars)), width, left=left, height=0.6, color=colour, label=label)
        left += width
    axes.legend(loc="upper left", ncols=6, bbox_to_anchor=(0, 0))
    _finish_bars(axes, bars, [f"{bar.total():,}" for bar in bars.values()], words)
    axes.set_title(words("dropped"))


def _most(bars: dict[str, Counter], words: Words) -> dict[str, Counter]:
    """The first bars; what does not find room becomes one."""
    if len(bars) <= MOST_BARS:
        return bars
    kept, rest = list(bars.items())[: MOST_BARS - 1], list(bars.values())[MOST_BARS - 1 :]
    return dict(kept) | {words("others", n=len(rest)): sum(rest, Counter())}


def _finish_bars(axes: "Axes", bars: dict[str, Counter], texts: list[str], words: Words) -> None:
    """Names on the left, figures at the ends, the first bar on top."""
    longest = max(bar.total() for bar in bars.values())
    for place, (bar, text) in enumerate(zip(bars.values(), texts, strict=True)):
        axes.text(bar.total() + longest * 0.01, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [words.name(name) for name in bars])
    axes.tick_params("y", length=0, labelcolor=INK)
    axes.set_xlim(0, longest * (1.1 + 0.013 * max(map(len, texts))))
    middle, room = (len(bars) - 1) / 2, max(len(bars), 4) / 2 + 0.1
    axes.set_ylim(middle + room, middle - room)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _turns(axes: "Axes", sets: Sequence["SetStats"], words: Words) -> None:
    chats = [(colour, one) for colour, one in _coloured(sets) if one.turns]
    # Known turns of all sets in order; "12+" comes last.
    names = sorted(
        {name for _, one in chats for name in one.by_turns()}, key=lambda s: int(s.strip("+"))
    )
    width = 0.8 / len(chats)
    for number, (colour, one) in enumerate(chats):
        share = [one.by_turns().get(name, 0) / one.turns.total() * 100 for name in names]
        places = np.arange(len(names)) + (number + 0.5) * width - 0.4
        axes.bar(places, share, width * 0.92, color=colour, label=words.name(one.name))
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
    axes.set_ylabel(words("share"))
    axes.legend(loc="upper right")
    axes.set_title(words("turns"))


if TYPE_CHECKING:
    from pandas import DataFrame

MANY_TURNS = 12  # dialogues with as many turns or more share a line of the table


@dataclass(frozen=True)
class StatsConfig:
    """Settings of data_process.tools.stats.

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
    place, name = rows.parent, tokenizer.name
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
        raise ConfigError("no set to measure: name one, python -m data_process.tools.stats SET")
    font = chosen_font(cfg.labels)
    tokenizer = Tokenizer(from_repo(cfg.tokenizer)) if cfg.tokenizer else None
    sets = [measure(name, tokenizer) for name in dict.fromkeys(cfg.sets)]
    for title, table in tables(sets).items():
        print(f"{title}\n{as_text(table)}\n")
    for one in sets:
        if one.dropped is None:
            print(f"{one.name}: there is no counts.json that says what was dropped")
    cfg.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(sets, cfg.picture, font, tokenizer.name if tokenizer else None)
    print(f"picture: {cfg.picture}")


if __name__ == "__main__":
    run(main, parse(StatsConfig, __doc__, positional=("sets",)))
