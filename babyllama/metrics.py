"""Scores: ROUGE in three measures, intervals, perplexity, repetition, copying baselines.

Implementation matters as much as the model: on the same predictions the measures below
differ by ten points. So every result carries the name of its measure, which says the
package, its version, and the unit that is compared. F is the F1 of one pair, from 0 to 1.

A text of nothing but white space and full stops is blank: it scores 0 in every measure and
still counts in the mean. No torch.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from babyllama.errors import DataError

ROUGE = ("rouge-1", "rouge-2", "rouge-l")
# `rouge` recurses up to once a character of prediction and reference; Python stops at a depth
# of 1,000 calls, of which the caller needs some.
MAX_ROUGE_CHARACTERS = 850
# 。！？ and their half-width forms; a full stop inside 3.14 or babyllama.py ends nothing.
SENTENCE_END = re.compile(r"[。！？!?\n]|\.(?![0-9A-Za-z])")

ScorePair = Callable[[str, str], Sequence[float]]


@dataclass(frozen=True)
class RougeScores:
    """The F of each pair; `f` maps each name of ROUGE to an (N,) float64 array."""

    measure: str
    f: dict[str, np.ndarray]
    n_blank: int  # predictions that are blank
    n_long: int = 0  # pairs too long for `rouge`, scored with clipped counts instead


def rouge_published(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE as nearly all published Chinese numbers have it: package `rouge`, characters.

    Lower case, one blank between characters, F1 of each pair. What is peculiar to it:
    n-grams are sets, so a prediction said three times keeps its ROUGE-1 and may gain ROUGE-L
    (`rouge_clipped` punishes it); texts are split at "." into sentences, whose dots are
    dropped, whose n-grams run on across them, and whose common subsequences are united;
    ROUGE-L also counts each character once.
    """
    from rouge import Rouge

    rouge, clipped = Rouge(stats=["f"]), _clipped_pair()

    def score(prediction: str, reference: str) -> Sequence[float]:
        if _is_long(prediction, reference):
            return clipped(prediction, reference)
        scores = rouge.get_scores(" ".join(prediction.lower()), " ".join(reference.lower()))[0]
        return [scores[name]["f"] for name in ROUGE]

    n_long = sum(map(_is_long, predictions, references))
    return _score(f"rouge {version('rouge')}, characters", score, predictions, references, n_long)


def rouge_clipped(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE as Lin (2004) defines it: clipped counts, longest common subsequence; characters.

    Lower case, white space dropped. A loop loses precision, as it should.
    """
    name = f"rouge-score {version('rouge-score')}, characters, clipped counts"
    return _score(name, _clipped_pair(), predictions, references)


def rouge_words(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE of jieba's words by `rouge-chinese` in its default mode.

    N-grams are sets, ROUGE-L is the longest common subsequence, case is kept.
    """
    jieba, rouge_chinese = _import_jieba()
    rouge = rouge_chinese.Rouge(stats=["f"])

    def score(prediction: str, reference: str) -> Sequence[float]:
        words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
        scores = rouge.get_scores(*words)[0]
        return [scores[name]["f"] for name in ROUGE]

    name = f"rouge-chinese {version('rouge-chinese')}, jieba words"
    return _score(name, score, predictions, references)


# The headline first.
ROUGE_MEASURES = (rouge_published, rouge_clipped, rouge_words)


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but white space and full stops."""
    return not text.replace(".", "").strip()


def _score(
    measure: str,
    score: ScorePair,
    predictions: Sequence[str],
    references: Sequence[str],
    n_long: int = 0,
) -> RougeScores:
    f = np.zeros((len(ROUGE), len(predictions)))
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if not is_blank(prediction) and not is_blank(reference):
            f[:, i] = score(prediction, reference)
    n_blank = sum(map(is_blank, predictions))
    return RougeScores(measure, dict(zip(ROUGE, f, strict=True)), n_blank, n_long)


def _is_long(prediction: str, reference: str) -> bool:
    return n_characters(prediction) + n_characters(reference) > MAX_ROUGE_CHARACTERS


class _Characters:
    """A tokenizer for `rouge_score`, whose own keeps only a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(text.lower().split()))


def _clipped_pair() -> ScorePair:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Characters())

    def score(prediction: str, reference: str) -> Sequence[float]:
        scores = scorer.score(target=reference, prediction=prediction)
        return [scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]

    return score


def _import_jieba():
    with warnings.catch_warnings():
        # Both packages were written before these warnings; Python gives the first when it
        # compiles them, setuptools < 81 the second when jieba asks it for a path.
        warnings.filterwarnings("ignore", message=".*invalid escape sequence")
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import jieba
        import rouge_chinese
    # It announces the loading of its dictionary on stderr.
    jieba.setLogLevel(logging.WARNING)
    return jieba, rouge_chinese


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, n_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of (N,) values, N >= 1."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ratio(
    parts: np.ndarray, wholes: np.ndarray, seed: int = 0, n_resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of sum(parts) / sum(wholes), resampled in pairs."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(n_resamples):
        chosen = rng.integers(0, len(parts), len(parts))
        ratios.append(parts[chosen].sum() / max(1, wholes[chosen].sum()))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def perplexity(loss_sum: float, n_targets: int) -> float:
    """exp of the mean loss in nats; comparable only within one tokenizer."""
    mean = _ratio(loss_sum, n_targets, "target")
    return math.exp(mean) if mean < 700 else math.inf


def accuracy(n_correct: int, n_targets: int) -> float:
    """The share of targets that were the most probable token."""
    return _ratio(n_correct, n_targets, "target")


def bits_per_byte(loss_sum: float, n_bytes: int) -> float:
    """Bits per UTF-8 byte of the text predicted; comparable across tokenizers."""
    return _ratio(loss_sum, n_bytes, "byte") / math.log(2)


def _ratio(part: float, whole: int, unit: str) -> float:
    if whole <= 0:
        raise DataError(f"a mean needs at least one {unit}, found {whole}; is the set empty?")
    return part / whole


def n_characters(text: str) -> int:
    """The length of a text without its white space."""
    return len("".join(text.split()))


def repeats_ngram(text: str, n: int = 4) -> bool:
    """Whether some run of `n` characters stands in the text twice: the sign of a loop."""
    text = "".join(text.split())
    ngrams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return len(set(ngrams)) < len(ngrams)


def text_statistics(texts: Sequence[str]) -> dict[str, float]:
    """Mean length in characters, and the shares of blank and of looping texts."""
    return {
        "mean_length": float(np.mean([n_characters(text) for text in texts])),
        "share_empty": float(np.mean([is_blank(text) for text in texts])),
        "share_repeated_4gram": float(np.mean([repeats_ngram(text) for text in texts])),
    }


def first_sentence(text: str) -> str:
    """What a summary must beat: the first sentence, without its end mark."""
    return next((part for part in SENTENCE_END.split(text) if part.strip()), text).strip()


def first_characters(text: str, n: int = 25) -> str:
    """What a summary must beat: the first `n` characters."""
    return text.strip()[:n]
