"""The picture of data_process/stats.py, and the search for a font that can write Chinese.

Labels are Chinese where there is a font for them, else English. Lengths lie on a logarithmic
axis; the height of a curve is the share of rows that falls into each step of equal ratio, so that
sets of different size can be compared.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from babyllama.log import written_whole
from data_process.split import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from data_process.stats import SetStats

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
        with written_whole(path) as temporary:
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
