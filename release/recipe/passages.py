"""Questions about a passage: those of reading sets, and questions made out of its own sentences.

Chinese asks where the answer stands: put 哪一年 for 1998年 into a sentence, and it is a question
that the sentence answers. So every text gives questions whose answers are copied from it; some are
joined by a question of another passage, which this one does not answer. Written are reading
(questions of people) and asked (made ones) as {"reference", "dialogue"}, RedGPT's layout, and lead:
texts with the sentence that has most in common with the rest (Zhang et al. 2020, arXiv:1912.08777),
as {"messages"}.
"""

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from babyllama.config import shown
from babyllama.rows import write_rows
from data_process.raw import Skip, records

HERE = Path(__file__).parent
READING = "reading"
UNANSWERED = 0.2  # share of the passages that are asked what they do not say
MOST_COPIES = 5  # of a text, each asked about other sentences
MOST_QUESTIONS, MOST_TEXT = 8, 720  # of a passage, and characters in all: the context holds that
SENTENCE = re.compile(r"[^。！？；!?\n]+[。！？；!?]?")
CLAUSE = re.compile(r"[^，,：:]+[，,：:]?")


@functools.cache
def asking(part: str) -> Any:
    """A part of questions.yaml."""
    return yaml.safe_load((HERE / "questions.yaml").read_text("utf-8"))[part]


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """A pattern of questions.yaml."""
    return re.compile(asking("patterns")[name])


@functools.cache
def rules(kind: str) -> list[tuple[re.Pattern[str], str, str, bool]]:
    """The rules of questions.yaml: pattern, question, answer, and whether it is a definition."""
    return [
        (re.compile(rule), ask, answer[0] if answer else r"\1", len(answer) > 1)
        for rule, ask, *answer in asking(kind)
    ]


def questions(text: str, chance: random.Random) -> list[tuple[str, str]]:
    """Questions that a text answers, each with the answer as it stands there; two a sentence."""
    found = []
    for sentence in SENTENCE.findall(text):
        sentence = sentence.strip()
        if 10 <= len(sentence) <= 150:
            made = [*_in_place(sentence), *_whole(sentence)]
            found += chance.sample(made, min(2, len(made)))
    chance.shuffle(found)
    return list({question: (question, answer) for question, answer in found}.values())


def _in_place(sentence: str) -> Iterator[tuple[str, str]]:
    clauses = [match.span() for match in CLAUSE.finditer(sentence)]
    for rule, ask, answer, _ in rules("in_place"):
        for match in rule.finditer(sentence):
            inside = [
                n for n, (a, b) in enumerate(clauses) if a < match.end() and match.start() < b
            ]
            first, last = inside[0], inside[-1]
            gone = len(match[0]) - len(match.expand(ask))
            # A clause alone may be too short to be understood.
            while clauses[last][1] - clauses[first][0] - gone < 7 and (
                first > 0 or last < len(clauses) - 1
            ):
                first, last = (first - 1, last) if first > 0 else (first, last + 1)
            start, end = clauses[first][0], clauses[last][1]
            asked = sentence[start : match.start()] + match.expand(ask)
            yield from _asked(asked + sentence[match.end() : end], match.expand(answer))


def _whole(sentence: str) -> Iterator[tuple[str, str]]:
    for rule, ask, answer, is_definition in rules("whole"):
        match = rule.search(sentence)
        if match and not (
            is_definition
            and (pattern("no_subject").search(match[1]) or pattern("no_object").match(match[2]))
        ):
            yield from _asked(match.expand(ask), match.expand(answer))


def _asked(question: str, answer: str) -> Iterator[tuple[str, str]]:
    question = pattern("start").sub("", question).strip("。！；，,：: ")
    answer = answer.strip("，。；,：:“”「」 ")
    if 5 <= len(question) <= 60 and 1 < len(answer) <= 60 and answer[0] not in "了着于而的":
        yield question + "？", answer


def cut_round(text: str, answers: Sequence[str], longest: int, chance: random.Random) -> str:
    """Whole sentences of a text, at most about `longest` characters, that hold the answers."""
    if len(text) <= longest:
        return text
    places = [text.find(answer) for answer in answers]
    first, last = min(places), max(p + len(a) for p, a in zip(places, answers, strict=True))
    start = chance.randint(min(first, max(0, last - longest)), first)
    spans = [match.span() for match in SENTENCE.finditer(text)]
    start = max((a for a, b in spans if a <= start), default=0)
    least = min(b for _, b in spans if b >= last)
    end = max((b for _, b in spans if b <= start + longest), default=least)
    return text[start : max(end, least)].strip()


def lead(text: str) -> tuple[str, str] | None:
    """The rest of a text, and the sentence that has most pairs of characters in common with it."""
    sentences = [s.strip() for s in SENTENCE.findall(text) if s.strip()]
    if len(sentences) < 3:
        return None
    pairs = [Counter(map("".join, itertools.pairwise(s))) for s in sentences]
    everything = sum(pairs, Counter())
    scores = []
    for sentence, own in zip(sentences, pairs, strict=True):
        rest = everything - own
        fits = 10 <= len(sentence) <= 45 and sentence[-1] in "。！；"
        both = own.total() + rest.total()
        scores.append(2 * (own & rest).total() / both if fits and both else 0.0)
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[best] == 0:
        return None
    return "".join(sentences[:best] + sentences[best + 1 :]), sentences[best].rstrip("；。")


def objects(path: Path) -> Iterator[dict]:
    """The JSON objects of a file."""
    for record in records(path, "utf-8"):
        if not isinstance(record, Skip) and isinstance(record.data, dict):
            yield record.data


def turn(asked: str, answer: str) -> list[dict]:
    """Question and answer as messages."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@functools.cache
def words() -> dict:
    """What stands round the pieces of dialogues."""
    return yaml.safe_load((HERE / "wordings.yaml").read_text("utf-8"))


def write_set(place: Path, rows: Iterable[dict], part: str = "train") -> None:
    """Write a part of a set, and say how much it is."""
    path = place / f"{part}.jsonl"
    print(f"{shown(path)}: {write_rows(path, rows):,} rows")


def grounded(reference: str, pairs: Sequence[tuple[str, str]]) -> dict:
    """A dialogue about a reference text, as RedGPT has it."""
    turns = [f"Human: {question}\nAssistant: {answer}" for question, answer in pairs]
    return {"reference": reference, "dialogue": "\n".join(turns)}


class Asking:
    """Lays wordings round questions, and adds some that a passage does not answer."""

    def __init__(self, unanswered: float, seed: int) -> None:
        self.words = words()
        self.chance, self.share = random.Random(seed), unanswered
        self._others: list[tuple[str, str]] = []

    def row(self, text: str, pairs: Sequence[tuple[str, str]]) -> dict:
        """The dialogue of one passage; the questions of passages before stand ready for others."""
        chance = self.chance
        known = [answer for _, answer in pairs if answer in text]
        longest = chance.choice((160, 240, 320, 400, 480, 560, 640))
        reference = cut_round(text, known or [text[:1]], longest, chance)
        turns = [(q, a) for q, a in pairs if a in reference or a not in text]
        other = chance.choice(self._others) if self._others else None
        if other and chance.random() < self.share and other[1] not in text:
            # Alone, before or after what the passage does answer.
            place = chance.randint(0, len(turns))
            turns.insert(place, (other[0], chance.choice(self.words["unanswered"])))
            turns = turns[place : place + 1] if chance.random() < 0.4 else turns
        self._others = [*self._others[-500:], *pairs]
        asked, left = [], MOST_TEXT - len(reference)
        for question, answer in turns:
            left -= len(question) + len(answer)
            if asked and left < 0:
                break
            question = chance.choice(self.words["ask"]).format(question=self._reworded(question))
            asked.append((question, answer))
        return grounded(reference, asked)

    def _reworded(self, question: str) -> str:
        """The question, now and then with another question word or without its small words."""
        for word, others in self.words["question_words"].items():
            if word in question and self.chance.random() < 0.5:
                question = question.replace(word, self.chance.choice(others), 1)
                break
        return pattern("small").sub("", question) if self.chance.random() < 0.3 else question


def reading_rows(raw: Path) -> Iterator[dict]:
    """Passages with the questions that people asked."""
    asking = Asking(UNANSWERED, seed=0)
    for path in sorted((raw / READING).glob("*.xz")):
        for passage in objects(path):
            pairs = [(qa["q"].strip(" ?？") + "？", qa["a"].strip()) for qa in passage["qas"]]
            made = questions(passage["context"], asking.chance)
            pairs = [*pairs[:3], *made[: MOST_QUESTIONS - 3]]
            asking.chance.shuffle(pairs)
            yield asking.row(passage["context"].strip(), pairs)


def asked_rows(raw: Path) -> Iterator[dict]:
    """Passages with questions made out of their sentences."""
    asking = Asking(UNANSWERED, seed=1)
    for text in _texts(raw, 0, 60):
        text = _part(text, asking.chance)
        pairs = questions(text, asking.chance)[: asking.chance.randint(2, MOST_QUESTIONS)]
        if pairs:
            yield asking.row(text, pairs)


def lead_rows(raw: Path) -> Iterator[dict]:
    """Texts with their leading sentence."""
    chance = random.Random(2)
    for text in _texts(raw, 1, 120):
        found = lead(_part(text, chance, 420))
        if found:
            question = chance.choice(words()["lead"]).format(text=found[0])
            yield {"messages": turn(question, found[1])}


def _texts(raw: Path, column: int, shortest: int) -> Iterator[str]:
    """As many texts of each file as questions.yaml says; of a short file all, and again."""
    for place, wanted in asking("texts").items():
        chance = random.Random(f"0 {place} {column}")
        texts = [one.get("text") or one.get("abst") or "" for one in objects(raw / place)]
        texts = [text for text in texts if len(text) >= shortest]
        n = min(wanted[column], MOST_COPIES * len(texts))
        yield from chance.sample(texts * MOST_COPIES, n)


def _part(text: str, chance: random.Random, longest: int = 640) -> str:
    """A text, or neighbouring sentences of it from a random place on."""
    if len(text) <= longest:
        return text
    spans = [match.span() for match in SENTENCE.finditer(text)]
    start = chance.choice([a for a, _ in spans if a <= len(text) - longest] or [0])
    end = max((b for _, b in spans if b <= start + longest), default=start + longest)
    return text[start:end].strip()


def write(raw: Path, out: Path) -> None:
    """Make the three sets."""
    write_set(out / "reading", reading_rows(raw))
    write_set(out / "asked", asked_rows(raw))
    write_set(out / "lead", lead_rows(raw))
