"""Scores of a set's titles by every protocol, and the tables that show them.

The first measure is the protocol of published figures (published.yaml), so published systems stand
in its columns alone. Length, loops, novelty and wrong numbers need no reference, and the
references' own figures say what is usual.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from rich.cells import cell_len

from babyllama.sampling import repeats, squeeze
from babyllama.scoring import rouge
from babyllama.scoring.rouge import bootstrap_interval, is_blank, ngrams, paired_difference

# 3, 3.14, 1,000 and 50%; numbers written in Chinese are left alone: 一 is often no number.
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*%?")
_NATURE = {
    "mean_length": "length", "percent_empty": "% empty", "percent_repeated_4gram": "% loops",
    "percent_novel_1grams": "% new 1-grams", "percent_novel_2grams": "2-grams",
    "percent_novel_4grams": "4-grams", "percent_wrong_number": "% wrong numbers",
    "n_with_number": "of",
}  # fmt: skip


USUAL = "the usual question"


def table(lines: Sequence[Sequence[object]]) -> str:
    """Cells in columns as a terminal shows them, where a Chinese character takes two places.

    The first column is aligned to the left, the others to the right.
    """
    cells = [list(map(str, line)) for line in lines]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    rows = []
    for line in cells:
        space = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        rest = [before + cell for before, cell in zip(space[1:], line[1:], strict=True)]
        rows.append("  ".join([line[0] + space[0], *rest]).rstrip())
    return "\n".join(rows)


class Published(NamedTuple):
    """One row of published.yaml; what its source does not state is None."""

    system: str
    r1: float | None
    r2: float | None
    rl: float | None
    bleu: float | None
    source: str


def published_sets() -> dict[str, list[Published]]:
    """Published systems by test set."""
    found = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
    return {name: [Published(*row) for row in rows] for name, rows in found.items()}


@dataclass
class System:
    """A line of the tables: a checkpoint in one way to decode, a file of titles or a baseline.

    seconds: what its titles took; None where they were there before
    n_cut, n_lead_ins: texts cut to the context, and replies whose lead-in was taken off
    """

    name: str
    titles: list[str]
    seconds: float | None = None
    n_cut: int = 0
    n_lead_ins: int = 0

    def score(self, texts: Sequence[str], references: Sequence[str]) -> "System":
        """Score the titles by every protocol; done once, as the published package is slow."""
        self.rouge = [measure(self.titles, references) for measure in rouge.ROUGE_MEASURES]
        self.bleu = rouge.bleu_published(self.titles, references)
        self.nature = nature(self.titles, texts)
        return self

    def summary(self) -> dict:
        """Means and intervals, times 100, ROUGE by measure and name; and what the titles are
        like."""
        return {
            "rouge": {
                each.measure: {name: _interval(100 * f) for name, f in each.f.items()}
                for each in self.rouge
            },
            "bleu": _interval(100 * self.bleu),
            "n_too_long_for_rouge": self.rouge[0].n_long,
        } | self.nature


def normalised(text: str) -> str:
    """A text without white space, in lower case, full-width letters and digits made half-width."""
    return squeeze(unicodedata.normalize("NFKC", text).lower())


def novelty(summary: str, text: str, n: int) -> float | None:
    """The share of the summary's n-grams that the text does not hold; None where it has none."""
    found = set(ngrams(normalised(summary), n))
    return len(found - set(ngrams(normalised(text), n))) / len(found) if found else None


def numbers(text: str) -> set[str]:
    """The numbers of a text, written in one way: 1,000 is 1000, and 50% is 50."""
    text = unicodedata.normalize("NFKC", text)
    return {found.rstrip("%").replace(",", "") for found in _NUMBER.findall(text)}


def wrong_numbers(summary: str, text: str) -> set[str]:
    """Numbers that a summary states and its text does not."""
    return numbers(summary) - numbers(text)


def nature(titles: Sequence[str], texts: Sequence[str]) -> dict[str, float | int | None]:
    """Length, and shares times 100 of what needs no reference.

    n_with_number: titles that state a number; percent_wrong_number: of these, those with one that
    the text does not hold; None where no title states one
    """
    pairs = list(zip(titles, texts, strict=True))
    wrong = [bool(wrong_numbers(*pair)) for pair in pairs if numbers(pair[0])]

    def percent(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return 100 * float(np.mean(known)) if known else None

    return {
        "mean_length": float(np.mean([len(squeeze(title)) for title in titles])),
        "percent_empty": percent([is_blank(title) for title in titles]),
        "percent_repeated_4gram": percent([repeats(squeeze(title), 4) for title in titles]),
        **{
            f"percent_novel_{n}grams": percent([novelty(*pair, n) for pair in pairs])
            for n in (1, 2, 4)
        },
        "n_with_number": len(wrong),
        "percent_wrong_number": percent(wrong),
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def differences(a: System, b: System) -> dict:
    """By how many points `a` is above `b`, and how likely that is by chance, in each measure."""
    found = {
        ours.measure: {
            name: paired_difference(100 * ours.f[name], 100 * theirs.f[name])
            for name in rouge.ROUGE
        }
        for ours, theirs in zip(a.rouge, b.rouge, strict=True)
    }
    first = next(iter(found))
    found[first]["bleu"] = paired_difference(100 * a.bleu, 100 * b.bleu)
    return found


def opening(name: str, n_texts: int, published: str | None, systems: Sequence[System]) -> str:
    """What was scored, which published figures stand beside it, and what was cut or taken off."""
    known = "no published set that is known here"
    if published:
        n = len(published_sets()[published]) or "no"
        known = f"published as {published}, {n} systems known by this protocol"
    lines = [
        f"{s.name}: {s.n_cut} of {n_texts} texts cut to fit, {s.n_lead_ins} answers with a "
        f"lead-in, which was taken off"
        for s in systems
        if s.seconds is not None
    ]
    return "\n".join([*lines, f"{name}: {n_texts} texts; {known}"])


def score_table(systems: Sequence[System], published: Sequence[Published]) -> str:
    """One line a system; the measures are numbered and named beneath."""
    measures = [each.measure for each in systems[0].rouge]
    head = [f"R-{n} ({i})" for i in range(1, len(measures) + 1) for n in "12L"]
    head.insert(3, "BLEU (1)")
    lines = [["", *head, "95 % of R-1 (1)"]]
    for system in systems:
        means = [100 * f.mean() for each in system.rouge for f in each.f.values()]
        means.insert(3, 100 * system.bleu.mean())
        interval = _interval(100 * system.rouge[0].f["rouge-1"])
        lines.append(
            [system.name, *map(_figure, means), "{low:.1f} - {high:.1f}".format(**interval)]
        )
    for name, *figures, source in published:
        figures += [None] * (len(head) - len(figures))
        lines.append([f"{name} [{source}]", *map(_figure, figures), "-"])
    notes = [f"({i}) {measure}" for i, measure in enumerate(measures, 1)]
    notes[0] += ": the protocol of published numbers"
    if published:
        notes.append("[source]: published figures, over the whole of the part that they name")
    n_long = sum(system.rouge[0].n_long for system in systems)
    if n_long:
        notes.append(f"{n_long} texts were too long for (1); there they have the counts of (2)")
    return "\n".join([table(lines), "", *notes])


def nature_table(systems: Sequence[System], references: dict) -> str:
    """What the titles are like, whatever the references say."""
    natures = [(s.name, s.nature, s.seconds) for s in systems]
    lines = [["", *_NATURE.values(), "seconds"]]
    for name, row, seconds in [*natures, ("the references", references, None)]:
        figures = [str(row[k]) if k.startswith("n_") else _figure(row[k]) for k in _NATURE]
        lines.append([name, *figures, _figure(seconds)])
    return "\n".join([
        table(lines), "",
        "loops: some run of 4 characters stands in the title twice; new: not in the text",
        "wrong numbers: of the titles that state a number, those with one the text does not hold",
    ])  # fmt: skip


def wording_table(found: dict) -> str:
    """One line a wording, the best first, and what the unseen are together."""
    lines = [["wording", *rouge.ROUGE, "lead-ins"]]
    rows = sorted(found["wordings"].items(), key=lambda pair: -pair[1]["rouge-1"])
    for question, row in rows:
        figures = [f"{row[name]:.1f}" for name in rouge.ROUGE]
        lines.append([question.replace("\n", "⏎"), *figures, row["n_lead_ins"]])
    for way in ("mean", "deviation", "lowest", "highest"):
        figures = [f"{found['spread'][name][way]:.1f}" for name in rouge.ROUGE]
        lines.append([f"unseen: {way}", *figures, ""])
    return table(lines)


def difference_table(found: dict, first: str, second: str) -> str:
    """The paired comparison of two systems."""
    lines = [["measure", "", "difference", "95 %", "p"]]
    for measure, row in found.items():
        for name, d in row.items():
            interval = f"{d['low']:+.2f} to {d['high']:+.2f}"
            lines.append([measure, name, f"{d['mean']:+.2f}", interval, f"{d['p']:.4f}"])
    return f"{first} minus {second}, row by row:\n{table(lines)}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
