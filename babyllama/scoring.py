"""Scores of a set's titles by every protocol, and the tables that show them. No torch.

A system is a list of titles under a name: a checkpoint's, a file's, a baseline's. The first measure
is the protocol of published figures, so published systems stand in its columns alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babyllama import metrics, quality
from babyllama.published import Published


class Measured(NamedTuple):
    """The scores of each title by every protocol."""

    rouge: list[metrics.RougeScores]
    bleu: np.ndarray


def measure(titles: Sequence[str], references: Sequence[str]) -> Measured:
    """Score titles; done once, as the published package is slow."""
    rouge = [measure(titles, references) for measure in metrics.ROUGE_MEASURES]
    return Measured(rouge, metrics.bleu_published(titles, references))


def summary(measured: Measured) -> dict:
    """Means and intervals, times 100; ROUGE by measure and name."""
    return {
        "rouge": {
            each.measure: {name: _interval(100 * f) for name, f in each.f.items()}
            for each in measured.rouge
        },
        "bleu": _interval(100 * measured.bleu),
        "n_too_long_for_rouge": measured.rouge[0].n_long,
    }


def nature(titles: Sequence[str], texts: Sequence[str]) -> dict:
    """What the titles are like (quality.py), shares times 100."""
    found = quality.statistics(titles, texts)
    return {
        name.replace("share", "percent"): 100 * value
        if name.startswith("share") and value is not None
        else value
        for name, value in found.items()
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = metrics.bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def differences(a: Measured, b: Measured) -> dict:
    """By how many points `a` is above `b`, and how likely that is by chance, in each measure."""
    found = {
        ours.measure: {
            name: metrics.paired_difference(100 * ours.f[name], 100 * theirs.f[name])
            for name in metrics.ROUGE
        }
        for ours, theirs in zip(a.rouge, b.rouge, strict=True)
    }
    first = next(iter(found))
    found[first]["bleu"] = metrics.paired_difference(100 * a.bleu, 100 * b.bleu)
    return found


def score_table(scores: dict[str, dict], published: Sequence[Published]) -> str:
    """One line a system; the measures are numbered and named beneath."""
    measures = list(next(iter(scores.values()))["rouge"])
    head = [f"R-{n} ({i})" for i in range(1, len(measures) + 1) for n in "12L"]
    head.insert(3, "BLEU (1)")
    lines = [["", *head, "95 % of R-1 (1)"]]
    for name, row in scores.items():
        means = [f["mean"] for measure in measures for f in row["rouge"][measure].values()]
        means.insert(3, row["bleu"]["mean"])
        interval = "{low:.1f} - {high:.1f}".format(**row["rouge"][measures[0]]["rouge-1"])
        lines.append([name, *map(_shown, means), interval])
    for each in published:
        figures = [each.r1, each.r2, each.rl, each.bleu] + [None] * (len(head) - 4)
        name = f"{each.system}, {each.train} [{each.source}]"
        lines.append([name, *map(_shown, figures), "-"])
    notes = [f"({i}) {measure}" for i, measure in enumerate(measures, 1)]
    notes[0] += ": the protocol of published numbers"
    if published:
        notes.append("[source]: published figures, over the whole of the part that they name")
    n_long = sum(row["n_too_long_for_rouge"] for row in scores.values())
    if n_long:
        notes.append(f"{n_long} texts were too long for (1); there they have the counts of (2)")
    return "\n".join([aligned(lines), "", *notes])


def nature_table(natures: dict[str, dict], seconds: dict[str, float]) -> str:
    """What the titles are like, whatever the references say."""
    head = ["length", "% empty", "% loops", "% new 1-grams", "2-grams", "4-grams"]
    lines = [["", *head, "% wrong numbers", "of", "seconds"]]
    for name, row in natures.items():
        keys = ["mean_length", "percent_empty", "percent_repeated_4gram"]
        keys += [f"percent_novel_{n}grams" for n in (1, 2, 4)] + ["percent_wrong_number"]
        figures = [_shown(row[key]) for key in keys]
        lines.append([name, *figures, str(row["n_with_number"]), _shown(seconds.get(name))])
    return "\n".join([
        aligned(lines), "",
        "loops: some run of 4 characters stands in the title twice; new: not in the text",
        "wrong numbers: of the titles that state a number, those with one the text does not hold",
    ])  # fmt: skip


def difference_table(found: dict, names: tuple[str, str]) -> str:
    """The paired comparison of two systems."""
    head = ["measure", "", "difference", "95 %", "p"]
    lines = [head]
    for measure, row in found.items():
        for name, d in row.items():
            interval = f"{d['low']:+.2f} to {d['high']:+.2f}"
            lines.append([measure, name, f"{d['mean']:+.2f}", interval, f"{d['p']:.4f}"])
    return f"{names[0]} minus {names[1]}, row by row:\n{aligned(lines)}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns: names to the left, figures to the right."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        first, *rest = (
            (cell, " " * (width - _width(cell))) for cell, width in zip(line, widths, strict=True)
        )
        rows.append("  ".join(["".join(first), *(pad + cell for cell, pad in rest)]))
    return "\n".join(rows)


def _width(text: str) -> int:
    """Columns on a terminal, where a Chinese character takes two."""
    return sum(1 + (ord(c) >= 0x2E80) for c in text)
