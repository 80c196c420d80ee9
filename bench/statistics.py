"""What a score is worth: its interval, what guessing gives, what one constant answer gives."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from babyllama.metrics import bootstrap_interval

FEW = 5  # a subject with at most so many different answers is a choice among them


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's (1927) for hits, else a percentile bootstrap."""
    if set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    return bootstrap_interval(np.asarray(values))


def wilson(n_hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, spread = n_hits / n, z * z / n
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low) if n_hits else 0.0, min(1.0, high) if n_hits < n else 1.0


def chance_of_choice(rows: Sequence[dict]) -> float:
    """What blind choice among the options gives on average."""
    return float(np.mean([len(row["gold"]) / len(row["letters"]) for row in rows]))


def constant_choice(rows: Sequence[dict]) -> float:
    """The share of the option number that is right most often."""
    counts = Counter(gold for row in rows for gold in set(row["gold"]))
    return max(counts.values()) / len(rows)


def chance_of_answer(rows: Sequence[dict]) -> float:
    """What guessing gives: 1/n where n options stand in the question or a subject has few answers.

    0 where an answer must be found.
    """
    few = {
        name: len(known)
        for name, known in _by_subject(rows, lambda row: set(row["answers"])).items()
        if len(known) <= FEW
    }
    shares = [
        1 / row["n_options"] if row.get("n_options") else 1 / few[row["subject"]]
        if few.get(row["subject"], 0) > 1 and row["subject"] else 0.0
        for row in rows
    ]  # fmt: skip
    return float(np.mean(shares))


def constant_answer(
    rows: Sequence[dict], score: Callable[[str, Sequence[str]], dict[str, float]], metric: str
) -> float:
    """What the most frequent answer of each subject scores, said every time."""
    said = {
        name: known.most_common(1)[0][0]
        for name, known in _by_subject(rows, lambda row: row["answers"][:1]).items()
    }
    return float(np.mean([score(said[row["subject"]], row["answers"])[metric] for row in rows]))


def _by_subject(rows: Sequence[dict], values: Callable[[dict], object]) -> dict[str, Counter]:
    found: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        found[row["subject"]].update(values(row))
    return found


def verdict(low: float, high: float, chance: float, constant: float) -> str:
    """What the interval says about a score, in words."""
    if high < chance:
        return "below chance"
    if low <= chance:
        return "not above chance"
    if low <= constant:
        return "not above one constant answer"
    # Where an answer must be found, blind guessing gives nothing: that is easily exceeded.
    return "above chance" if chance else "above one constant answer"
