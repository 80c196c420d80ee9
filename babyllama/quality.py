"""What summaries are like beside their texts: length, loops, novelty, wrong numbers. No torch.

None of it needs a reference, and the references' own figures say what is usual. All shares are
from 0 to 1.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from babyllama.metrics import is_blank, n_characters

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
