"""Scores of a set's titles by every protocol, and the tables that show them. No torch.

A system is a list of titles under a name: a checkpoint's, a file's, a baseline's. The first measure
is the protocol of published figures, so published systems stand in its columns alone.

Published figures, by test set: ROUGE and BLEU times 100, characters, package `rouge`.

Two sets are called CSL. csl_title_public (CLGE, 2019) has computer-science abstracts of at most 256
characters, 3,000 / 500 / 500 pairs, or 10,000 to train on; `ts` of the CSL benchmark (2022) has all
thirteen categories, 8,000 / 1,000 / 1,000. Figures of one say nothing of the other.

What summaries are like beside their texts, length, loops, novelty, wrong numbers: none of it needs
a reference, and the references' own figures say what is usual. All shares are from 0 to 1.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babyllama.scoring import rouge as metrics
from babyllama.scoring.rouge import is_blank, n_characters


class Published(NamedTuple):
    """One row of a paper or a README; what it does not state is None.

    train: pairs it was fine-tuned on, and how it decodes
    """

    system: str
    train: str
    r1: float | None
    r2: float | None
    rl: float | None
    bleu: float | None
    source: str


_CLGE = "CLGE, 500 dev"
_PEGASUS = "T5-PEGASUS"
_TORCH = "bert4torch, test"

CSL_TITLE_PUBLIC = (
    Published("LSTM seq2seq", "3k", 46.5, 30.5, 41.8, 22.0, _CLGE),
    Published("ALBERT-tiny UniLM (4M)", "3k", 52.8, 38.0, 48.1, 21.6, _CLGE),
    Published("RoBERTa-wwm-ext UniLM", "3k", 63.2, 50.7, 59.0, 41.3, _CLGE),
    Published("BERT-base UniLM", "3k", 63.8, 51.3, 59.8, 41.5, _CLGE),
    Published("WoBERT", "1k, greedy", 60.4, 49.1, 59.3, 37.9, _PEGASUS),
    Published("mT5", "1k, greedy", 61.5, 50.4, 59.9, 40.9, _PEGASUS),
    Published("T5-PEGASUS (275M)", "1k, greedy", 65.3, 54.5, 63.1, 43.6, _PEGASUS),
    Published("BERT UniLM", "10k, greedy", 65.5, 54.9, 63.8, 45.5, _PEGASUS),
    Published("WoBERT", "10k, greedy", 68.2, 57.8, 66.4, 47.8, _PEGASUS),
    Published("mT5", "10k, greedy", 69.0, 58.7, 67.0, 49.8, _PEGASUS),
    Published("T5-PEGASUS (275M)", "10k, greedy", 69.9, 59.8, 67.7, 49.4, _PEGASUS),
    Published("T5-PEGASUS (275M)", "10k, beam 3", 70.5, 60.7, 68.4, 50.2, _PEGASUS),
    Published("BERT UniLM", "10k", 66.3, 54.8, 63.0, 44.6, _TORCH),
    Published("BART-base", "10k", 68.4, 57.3, 65.0, 47.7, _TORCH),
    Published("mT5", "10k", 69.4, 59.1, 66.0, 50.1, _TORCH),
)
LCSTS = (
    Published("BERT UniLM", "greedy", 29.6, 18.0, 28.0, None, _PEGASUS),
    Published("WoBERT", "greedy", 32.9, 21.1, 31.5, None, _PEGASUS),
    Published("mT5", "greedy", 30.8, 19.5, 28.9, None, _PEGASUS),
    Published("T5-PEGASUS (275M)", "greedy", 33.5, 21.5, 31.2, None, _PEGASUS),
    Published("T5-PEGASUS (275M)", "beam 3", 34.1, 22.2, 31.8, None, _PEGASUS),
    Published("BART-base", "whole train", None, None, 37.8, None, "CPT, one score, taken for R-L"),
    Published("CPT-large", "whole train", None, None, 42.0, None, "CPT, one score, taken for R-L"),
    Published("Randeng-Pegasus-523M", "mixture", 46.9, 33.9, 43.5, None, "its model card"),
    Published("MoCoBart", "not stated", 42.04, 27.22, 38.34, None, "its repository, 725 test rows"),
)
# Of `ts` no figures of this protocol were found: the paper's are ROUGE-L alone.
SETS: dict[str, tuple[Published, ...]] = {
    "csl_title_public": CSL_TITLE_PUBLIC,
    "csl_ts": (),
    "lcsts": LCSTS,
}

# 3, 3.14, 1,000 and 50%; numbers written in Chinese are left alone: 一 is often no number.
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*%?")


def squeezed(text: str) -> str:
    """A text without white space, in lower case, full-width letters and digits made half-width."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def ngrams(text: str, n: int) -> list[str]:
    """Every run of `n` characters, white space left out."""
    text = "".join(text.split())
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def repeats_ngram(text: str, n: int = 4) -> bool:
    """Whether some run of `n` characters stands in the text twice: the sign of a loop."""
    found = ngrams(text, n)
    return len(set(found)) < len(found)


def novelty(summary: str, text: str, n: int) -> float | None:
    """The share of the summary's n-grams that the text does not hold; None where it has none."""
    found = set(ngrams(squeezed(summary), n))
    return len(found - set(ngrams(squeezed(text), n))) / len(found) if found else None


def numbers(text: str) -> set[str]:
    """The numbers of a text, written in one way: 1,000 is 1000, and 50% is 50."""
    text = unicodedata.normalize("NFKC", text)
    return {found.rstrip("%").replace(",", "") for found in _NUMBER.findall(text)}


def wrong_numbers(summary: str, text: str) -> set[str]:
    """Numbers that a summary states and its text does not."""
    return numbers(summary) - numbers(text)


def statistics(summaries: Sequence[str], texts: Sequence[str]) -> dict[str, float | int | None]:
    """Figures of a whole set.

    n_with_number: summaries that state a number; share_wrong_number: of these, those with one
    that the text does not hold; None where no summary states one
    """
    n_with_number = sum(bool(numbers(summary)) for summary in summaries)
    pairs = list(zip(summaries, texts, strict=True))
    n_wrong = sum(bool(wrong_numbers(*pair)) for pair in pairs)
    return {
        "mean_length": float(np.mean([n_characters(summary) for summary in summaries])),
        "share_empty": float(np.mean([is_blank(summary) for summary in summaries])),
        "share_repeated_4gram": float(np.mean([repeats_ngram(summary) for summary in summaries])),
        "share_novel_1grams": _mean([novelty(*pair, 1) for pair in pairs]),
        "share_novel_2grams": _mean([novelty(*pair, 2) for pair in pairs]),
        "share_novel_4grams": _mean([novelty(*pair, 4) for pair in pairs]),
        "n_with_number": n_with_number,
        "share_wrong_number": n_wrong / n_with_number if n_with_number else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
    """What the titles are like (tables.py), shares times 100."""
    found = statistics(titles, texts)
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
