"""Scores: ROUGE in three measures, BLEU, intervals, significance; what copying scores. No torch.

Implementation matters as much as the model: on the same predictions the measures below
differ by ten points. So every result carries the name of its measure, which says the
package, its version, and the unit that is compared. F is the F1 of one pair, from 0 to 1.

A text of nothing but white space and full stops is blank: it scores 0 in every measure and
still counts in the mean.

A summary must beat copies of its text's beginning, which know nothing but the text. `best_sentence`
looks at the reference: no system that copies one whole sentence can do better.
"""

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain

import numpy as np

ROUGE = ("rouge-1", "rouge-2", "rouge-l")
# `rouge` recurses up to once a character of prediction and reference; Python stops at a depth
# of 1,000 calls, of which the caller needs some.
MAX_ROUGE_CHARACTERS = 850

ScorePair = Callable[[str, str], Sequence[float]]


@dataclass(frozen=True)
class RougeScores:
    """The F of each pair; `f` maps each name of ROUGE to an (N,) float64 array."""

    measure: str
    f: dict[str, np.ndarray]
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

    rouge = Rouge(stats=["f"])

    def score(prediction: str, reference: str) -> Sequence[float]:
        if _is_long(prediction, reference):
            return clipped_pair(prediction, reference)
        scores = rouge.get_scores(" ".join(prediction.lower()), " ".join(reference.lower()))[0]
        return [scores[name]["f"] for name in ROUGE]

    n_long = sum(map(_is_long, predictions, references))
    return _score(f"rouge {version('rouge')}, characters", score, predictions, references, n_long)


def rouge_clipped(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE as Lin (2004) defines it: clipped counts, longest common subsequence; characters.

    Lower case, white space dropped. A loop loses precision, as it should.
    """
    return _score("ours, characters, clipped counts", clipped_pair, predictions, references)


def rouge_words(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE of jieba's words by `rouge-chinese` in its default mode.

    N-grams are sets, ROUGE-L is the longest common subsequence, case is kept.
    """
    jieba, rouge_chinese = import_jieba()
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
    """True if a text holds nothing but white space and full stops."""
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
    return RougeScores(measure, dict(zip(ROUGE, f, strict=True)), n_long)


def _is_long(prediction: str, reference: str) -> bool:
    return n_characters(prediction) + n_characters(reference) > MAX_ROUGE_CHARACTERS


def clipped_pair(prediction: str, reference: str) -> tuple[float, float, float]:
    """Clipped ROUGE-1, ROUGE-2 and ROUGE-L of one pair; those of the package `rouge-score`."""
    a, b = ("".join(text.lower().split()) for text in (prediction, reference))
    shared = [_counts(a, n) & _counts(b, n) for n in (1, 2)]
    lengths = [len(a) + len(b) - 2 * (n - 1) for n in (1, 2)]
    r1, r2 = (2 * c.total() / n if c else 0.0 for c, n in zip(shared, lengths, strict=True))
    return r1, r2, 2 * common_subsequence(a, b) / lengths[0] if a or b else 0.0


def clipped_f_of_all(texts: Sequence[str], n: int, beta: float) -> np.ndarray:
    """Clipped ROUGE-n of each text as the prediction of each other, (N, N) float64, as F_beta, in
    which recall counts beta times as much.

    What two texts share, min(a, b) of each n-gram, is the number of k with a >= k and b >= k: a
    product of matrices for each k.
    """
    counts = [_counts("".join(text.lower().split()), n) for text in texts]
    places = {gram: i for i, gram in enumerate(dict.fromkeys(chain.from_iterable(counts)))}
    table = np.zeros((len(texts), len(places)), dtype=np.float32)  # whole numbers below 2**24
    for row, mine in zip(table, counts, strict=True):
        row[[places[gram] for gram in mine]] = list(mine.values())
    levels = ((table >= k).astype(np.float32) for k in range(1, int(table.max(initial=0)) + 1))
    shared = sum((level @ level.T for level in levels), np.zeros((len(texts), len(texts))))
    totals = table.sum(1, dtype=np.float64)
    weighted = totals[:, None] + beta**2 * totals
    return (1 + beta**2) * shared / np.where(weighted, weighted, 1.0)


def ngrams(text: str | tuple[str, ...], n: int) -> list[str | tuple[str, ...]]:
    """Every run of `n` characters of a text, or of `n` tokens."""
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def _counts(text: str | tuple[str, ...], n: int) -> Counter:
    return Counter(ngrams(text, n))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    A row of the usual table is one whole number, a bit a place (Hyyrö 2004, "Bit-parallel LCS").
    """
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        met = row & places.get(token, 0)
        row = (row + met | row - met) & every
    return len(a) - row.bit_count()


def bleu_published(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """BLEU as it is published beside `rouge_published`, (N,) float64.

    That of nltk's sentence_bleu with method1 of its smoothing (an n-gram order without a match
    counts 0.1), over lower-cased characters joined by blanks and split at each blank, so that a
    blank of the text becomes two empty tokens. A blank prediction gets 0.
    """
    pairs = zip(predictions, references, strict=True)
    return np.array([0.0 if is_blank(p) or is_blank(r) else _bleu(p, r) for p, r in pairs])


def _bleu(prediction: str, reference: str) -> float:
    a, b = (tuple(" ".join(text.lower()).split(" ")) for text in (prediction, reference))
    matches = [(_counts(a, n) & _counts(b, n)).total() for n in range(1, 5)]
    if matches[0] == 0:
        return 0.0
    shares = [(m or 0.1) / max(1, len(a) - n) for n, m in enumerate(matches)]
    brevity = 1.0 if len(a) > len(b) else math.exp(1 - len(b) / len(a))
    return brevity * math.exp(sum(map(math.log, shares)) / 4)


def import_jieba():
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
    rng, n = np.random.default_rng(seed), len(values)
    at_once, means = max(1, 200_000 // n), []  # to spare the memory
    for start in range(0, n_resamples, at_once):
        rows = rng.integers(0, n, (min(at_once, n_resamples - start), n))
        means.append(values[rows].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: np.ndarray, b: np.ndarray, seed: int = 0, n_resamples: int = 10_000
) -> dict[str, float]:
    """By how much the mean of `a` is above that of `b`, pair by pair, and whether that is chance.

    low, high: 95 % bootstrap interval of the difference; p: two-sided, by approximate
    randomisation (Noreen 1989): each pair's difference might as well have had the other sign
    """
    gain = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    low, high = bootstrap_interval(gain, seed)
    rng, seen, n_done = np.random.default_rng((seed, 1)), 0, 0
    while n_done < n_resamples:
        n = min(500, n_resamples - n_done)
        flipped = (rng.integers(0, 2, (n, len(gain))) * 2 - 1) @ gain
        # A sum in another order may differ in its last bit.
        seen += int((np.abs(flipped) >= abs(gain.sum()) - 1e-9).sum())
        n_done += n
    return {"mean": float(gain.mean()), "low": low, "high": high, "p": (seen + 1) / (n_done + 1)}


def n_characters(text: str) -> int:
    """The length of a text without its white space."""
    return len("".join(text.split()))


# 。！？ and their half-width forms; a full stop inside 3.14 or babyllama.py ends nothing.
SENTENCE_END = re.compile(r"[。！？!?\n]|\.(?![0-9A-Za-z])")
# A comma inside 1,000 and a colon inside 12:30 end nothing either.
CLAUSE_END = re.compile(SENTENCE_END.pattern + r"|[，；：]|[,;:](?![0-9])")


def parts(text: str, end: re.Pattern = SENTENCE_END) -> list[str]:
    """A text's sentences, or clauses, without their end marks; the text itself if it has none."""
    found = [part.strip() for part in end.split(text)]
    return [part for part in found if part] or [text.strip()]


def first_sentence(text: str) -> str:
    return parts(text)[0]


def first_clause(text: str) -> str:
    return parts(text, CLAUSE_END)[0]


def first_characters(text: str, n: int = 25) -> str:
    return text.strip()[:n]


def best_sentence(text: str, reference: str) -> str:
    """The sentence that is most like the reference, by the mean of the three clipped ROUGE."""
    return max(parts(text), key=lambda sentence: sum(clipped_pair(sentence, reference)))


def copies(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[str]]:
    """All of them for a set, by name."""
    return {
        "first sentence": list(map(first_sentence, texts)),
        "first clause": list(map(first_clause, texts)),
        "first 25 characters": list(map(first_characters, texts)),
        "best sentence (knows the reference)": list(map(best_sentence, texts, references)),
    }
