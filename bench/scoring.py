"""Scores of replies: numbers, short answers, answers taken from a text; and what a score is
worth: its interval, what guessing gives, what one constant answer gives.

Each function of SCORES takes a reply and the answers that count and gives shares from 0 to 1 by
metric; the first is the headline. What was said round the answer is taken off by fixed rules; the
rules for MATH are those of the harness.

Sources: CMRC 2018's evaluation (Cui et al. 2019: longest common run of mixed segments), SQuAD's
(Rajpurkar et al. 2016: shared words), NQ-open's and TriviaQA's exact match.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from fractions import Fraction

import numpy as np

from babyllama.scoring.rouge import bootstrap_interval
from bench.readers import boxed

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


def _by_subject(rows: Sequence[dict], values: Callable[[dict], Iterable]) -> dict[str, Counter]:
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


_NUMBER = re.compile(
    r"-?\d[\d,]*(?:\.\d+)?(?:\(\d+/\d+\)|/\d[\d,]*(?:\.\d+)?)?%?|-?\(\d+/\d+\)|-?\.\d+"
)
_MIXED = re.compile(r"(-?)(\d+)?\((\d+)/(\d+)\)")
_LEAD = re.compile(
    r"(?s)^.*?(?:(?:所以|因此|故|最终|正确)?答案(?:是|为)?|####|[Tt]he answer is)\s*[：:]?\s*"
)
_SIGNS = string.punctuation + "，。、；：？！“”‘’（）《》〈〉【】「」『』—…·～￥"
_BARE = str.maketrans("", "", _SIGNS)
_SEGMENT = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]|[^\W_]+")


def lead_off(reply: str) -> str:
    """A reply without what leads to its answer ("所以答案是：")."""
    return _LEAD.sub("", reply, count=1).strip()


def to_number(text: str) -> Fraction | None:
    """The value of "1,234", "93.75%", "11/20", "(11/20)", "23(1/3)"; None if it is no number."""
    text = text.strip().replace(",", "").replace("，", "").rstrip("。．.")
    share = text.endswith("%")
    text = text.removesuffix("%")
    mixed = _MIXED.fullmatch(text)
    try:
        if mixed:
            sign, whole, top, bottom = mixed.groups()
            value = (int(whole or 0) + Fraction(int(top), int(bottom))) * (-1 if sign else 1)
        else:
            top, _, bottom = text.partition("/")
            value = Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if share else value


def number(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """The number after "答案是", ####, or in a box; else the last in the reply."""
    box = boxed(reply)
    lead = _LEAD.match(reply)
    place = box if box else reply[lead.end() :] if lead else reply
    found = _NUMBER.findall(place) or _NUMBER.findall(reply)
    value = to_number(found[0] if found and (box or lead) else found[-1]) if found else None
    known = [to_number(answer) for answer in answers]
    right = value is not None and any(
        k is not None and abs(value - k) <= Fraction(1, 10**6) * max(abs(k), Fraction(1))
        for k in known
    )
    return {"acc": float(right)}


def math_answer(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """MATH: the last box, else the formula between dollar signs, else the reply's last line."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    found = boxed(reply)
    if found is None:
        lines = lead_off(reply).splitlines() or [""]
        formulas = re.findall(r"\$([^$]+)\$", reply)
        found = formulas[-1] if formulas else lines[-1].strip().rstrip("。.")
    return {"acc": float(any(is_equiv(found, answer) for answer in answers))}


def plain(text: str) -> str:
    """A text without case, punctuation and needless white space."""
    return " ".join(text.lower().translate(_BARE).split())


def bare(text: str) -> str:
    """The same without English articles."""
    return " ".join(word for word in plain(text).split() if word not in ("a", "an", "the"))


def exact(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """The first line of the reply is one of the answers."""
    said = bare(_first_line(reply))
    return {"em": float(bool(said) and any(said == bare(answer) for answer in answers))}


def bbh(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """The first line is the answer; of "(B) text" the letter counts."""
    said = _first_line(reply)
    letter = re.match(r"[(（]?([A-R])(?:[)）.、:：]|$)", said)
    said = letter[1].lower() if letter else plain(said)
    return {"em": float(bool(said) and any(said == plain(answer) for answer in answers))}


def _first_line(reply: str) -> str:
    return (lead_off(reply).splitlines() or [""])[0].strip()


def segments(text: str) -> list[str]:
    """Han characters one by one, other words whole, without case and punctuation."""
    return _SEGMENT.findall(text.lower())


def cmrc(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """CMRC 2018's F1 (of the longest common run of segments) and exact match."""
    return _best(reply, answers, _common_run)


def shared_words(reply: str, answers: Sequence[str]) -> dict[str, float]:
    """SQuAD's F1 and exact match, by segments."""
    return _best(reply, answers, lambda a, b: sum((Counter(a) & Counter(b)).values()))


def _best(
    reply: str, answers: Sequence[str], common: Callable[[list[str], list[str]], int]
) -> dict[str, float]:
    said = segments(lead_off(reply))
    scores = [(0.0, 0.0)]
    for answer in answers:
        known = segments(answer)
        n_common = common(said, known) if said and known else 0
        f1 = 2 * n_common / (len(said) + len(known)) if n_common else 0.0
        scores.append((f1, float(bool(said) and said == known)))
    return {"f1": max(f1 for f1, _ in scores), "em": max(em for _, em in scores)}


def _common_run(a: list[str], b: list[str]) -> int:
    return SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


SCORES: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "number": number, "math": math_answer, "exact": exact, "bbh": bbh, "cmrc": cmrc,
    "shared_words": shared_words,
}  # fmt: skip
METRICS = {"number": "acc", "math": "acc", "exact": "em", "bbh": "em", "cmrc": "f1",
           "shared_words": "f1"}  # fmt: skip
