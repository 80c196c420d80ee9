"""A full-text index over text rows on the disk: BM25 over pairs of characters, and over words.

    index.json      version, corpus, SHA-256 of the rows, counts, size of each file; written last
    terms.npy       (n,) uint64, sorted: what stands for a pair of characters or for a word
    ends.npy        (n + 1,) uint64: where the passages of each term begin and end
    docs.u32        passages of all terms, ascending within a term
    weights.u8      for each of them tf / (tf + length norm) in 255 steps
    passages.jsonl  the passages;  starts.npy  where each begins, in bytes

Made by build.py. Read through the page cache: opening costs nothing, and a search touches
what it needs. Needs numpy alone. Safe for many readers and threads at once.

BM25: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework"; k1 and b below.

Cutting text: documents into passages to be found, and any text to a size, at sentence ends.

A document is canonical `text` of a row: its title as first line, if it has one, and its paragraphs,
one a line (data_process/datasets/wiki.py writes them so). A passage is a paragraph, or several
short ones together, or a part of a long one; it keeps the number of the paragraph it begins in.
"""

import bisect
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from babyllama.errors import DataError

# A sentence with the quotes and brackets that close it, or a line.
_SENTENCE = re.compile(r".+?(?:[。！？!?…；]+[”’」』）)\"]*|\.(?=\s)|\n+|$)", re.DOTALL)

LONGEST = 400  # characters of a passage: about half of a small model's context
_LONGEST_TITLE = 80


@dataclass(frozen=True)
class Passage:
    """A piece of a document of the index.

    paragraph: number of the paragraph that it begins in, from 1
    row: id of the row that it is from
    score: BM25 against the question, for comparing passages of one search; 0 where none was asked
    coverage: share of the question's weight that stands in the passage, 0 to 1
    n_rare: the same weight counted in terms that stand in one passage alone
    """

    title: str
    paragraph: int
    text: str
    row: str = ""
    score: float = 0.0
    coverage: float = 0.0
    n_rare: float = 0.0

    @property
    def citation(self) -> str:
        name = f"《{self.title}》" if self.title else self.row
        return f"{name}第 {self.paragraph} 段"


def passages(row: dict, longest: int = LONGEST) -> Iterator[Passage]:
    """The passages of a canonical text row, in order, at most `longest` characters each."""
    title, paragraphs = split_title(row["text"])
    held, first = "", 0
    for number, paragraph in enumerate(paragraphs, 1):
        for part in _parts(paragraph, longest):
            if held and len(held) + 1 + len(part) > longest:
                yield Passage(title, first, held, row["id"])
                held = ""
            first = first if held else number
            held = f"{held}\n{part}" if held else part
    if held:
        yield Passage(title, first, held, row["id"])


def split_title(text: str) -> tuple[str, list[str]]:
    """The title ("" if the first line is none) and the paragraphs that are not blank."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and len(lines[0]) <= _LONGEST_TITLE and lines[0][-1] not in "。！？!?；：…，":
        return lines[0], lines[1:]
    return "", lines


def _parts(paragraph: str, longest: int) -> Iterator[str]:
    """A paragraph in runs of whole sentences; a sentence that is longer is cut inside."""
    held = ""
    for match in _SENTENCE.finditer(paragraph):
        sentence = match[0]
        if held and len(held) + len(sentence) > longest:
            yield held.strip()
            held = ""
        while len(sentence) > longest:
            yield sentence[:longest]
            sentence = sentence[longest:]
        held += sentence
    if held.strip():
        yield held.strip()


def sentences(text: str) -> list[str]:
    """The sentences of a text; together they are the text."""
    return [match[0] for match in _SENTENCE.finditer(text)]


def trim(text: str, limit: int, size: Callable[[str], int] = len) -> str:
    """The longest beginning of `text` in whole sentences with size(beginning) <= limit.

    Where not even the first sentence fits, it is cut inside.

    size: characters unless told; grows with the text
    """
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return _longest(text, ends, limit, size) or _longest(text, range(len(text)), limit, size)


def _longest(text: str, ends: list[int] | range, limit: int, size: Callable[[str], int]) -> str:
    n_fit = bisect.bisect_right(ends, limit, key=lambda end: size(text[:end].rstrip()))
    return text[: ends[n_fit - 1]].rstrip() if n_fit else ""


VERSION = 1
K1, B = 1.2, 0.75
# Of a question so many terms are looked up, the rarest ones, and no more after so many postings:
# the commonest add least, and a search stays below 100 ms among millions of passages.
MOST_TERMS, MOST_POSTINGS = 64, 1_000_000

_WORD = re.compile(r"[^\W_\u2e80-\U0010ffff]+")
_IS_WORD = 1 << 63
_SHIFT = 21  # a code point fits
_LOW = (1 << _SHIFT) - 1
# Rare in an encyclopedia, so that they would weigh more than what is asked for.
QUESTION_WORDS = re.compile(
    r"请问|[什甚]么(?:时候|时间|地方)?|哪[一几]?[些个里位年种座部]|多少|怎么样?|怎样|如何|为何|是谁|谁是|[吗呢？?]"
    r"|\b(?:what|who|when|where|which|how|the|is|was|of)\b"
)
# Blocks of marks above U+2E80, which end a run of characters: first and last code point.
_MARKS = ((0x3000, 0x3004), (0x3008, 0x3020), (0x3030, 0x3030), (0x303D, 0x303F),
          (0x30FB, 0x30FB), (0xD800, 0xF8FF), (0xFE10, 0xFE6F), (0xFF00, 0xFF65))  # fmt: skip


def normal(text: str) -> str:
    """Text as it is compared: full and half width alike, small letters."""
    return unicodedata.normalize("NFKC", text).lower()


def terms(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Every term of a normal text and its place in it.

    Each character of a run begins one pair, the last of a run with nothing: so a range of terms
    stands for a single character. A word of letters and digits is a term.
    returns: (n,) uint64 and (n,) int64, not sorted
    """
    points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    is_run = points >= 0x2E80
    for first, last in _MARKS:
        is_run &= (points < first) | (points > last)
    following = np.append(points[1:] * is_run[1:], np.uint64(0)) if len(points) else points
    places = np.flatnonzero(is_run)
    pairs = (points[places] << np.uint64(_SHIFT)) | following[places]
    words = [(word_term(match[0]), match.start()) for match in _WORD.finditer(text)]
    codes = np.array([code for code, _ in words], np.uint64)
    return np.append(pairs, codes), np.append(places, np.array([p for _, p in words], np.int64))


@lru_cache(1 << 16)
def word_term(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | _IS_WORD


def title_term(title: str) -> int:
    """What a passage is found by that belongs to a title as a whole."""
    return word_term(f"title of {normal(title).strip()}")


def title_terms(title: str) -> set[int]:
    """The same for all names of a title: with and without an addition in brackets."""
    names = {title, re.sub(r"[ _]*[(（][^()（）]*[)）]$", "", title)}
    return {title_term(name) for name in names if name.strip()}


def sizes_of(place: Path, names: Iterable[str]) -> dict[str, int]:
    """The sizes of those of the files that are there."""
    return {name: (place / name).stat().st_size for name in names if (place / name).is_file()}


def read_info(place: Path, any_version: bool = False) -> dict:
    """What index.json says.

    raises: DataError if there is none, or it is of another version
    """
    advice = "make it with python -m data_process.run wiki --index"
    try:
        info = json.loads((place / "index.json").read_text("utf-8"))
        version, _corpus = info["version"], info["corpus"]
    except FileNotFoundError:
        raise DataError(f"{place}: wanted an index, found no index.json in it; {advice}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place / 'index.json'}: wanted the settings of an index, found "
                        f"{type(error).__name__}; {advice}") from None  # fmt: skip
    if version != VERSION and not any_version:
        raise DataError(f"{place}: wanted an index of version {VERSION}, found version "
                        f"{version!r}; {advice} again")  # fmt: skip
    return info


class Index:
    """An index that was opened. Passages have numbers, from 0.

    info: what index.json says: corpus, n_rows, n_passages, n_chars and more
    """

    def __init__(self, place: Path, corpus: str | None = None) -> None:
        """raises: DataError if it is none, damaged, or of another corpus or version"""
        self.place, self.info = place, read_info(place)
        if corpus is not None and self.info["corpus"] != corpus:
            raise DataError(f"{place}: wanted the index of {corpus!r}, found that of "
                            f"{self.info['corpus']!r}; name another")  # fmt: skip
        wanted, found = self.info["sizes"], sizes_of(place, self.info["sizes"])
        for name in wanted:
            if wanted[name] != found.get(name):
                raise DataError(
                    f"{place / name}: wanted {wanted[name]:,} bytes, found {found.get(name, 0):,}; "
                    f"the index is damaged, make it again"
                )
        self.terms, self.ends, self.starts = (
            np.load(place / f"{name}.npy", mmap_mode="r") for name in ("terms", "ends", "starts")
        )
        self.docs = np.memmap(place / "docs.u32", np.uint32, "r")
        self.weights = np.memmap(place / "weights.u8", np.uint8, "r")
        self.lines = np.memmap(place / "passages.jsonl", np.uint8, "r")

    def __len__(self) -> int:
        return self.info["n_passages"]

    def passage(self, number: int, *scores: float) -> Passage:
        """The passage of a number; scores: score, coverage and n_rare."""
        begin, end = (int(place) for place in self.starts[number : number + 2])
        try:
            row, title, paragraph, text = json.loads(bytes(self.lines[begin:end]))
        except ValueError:
            raise DataError(f"{self.place / 'passages.jsonl'}: wanted passage {number} at byte "
                            f"{begin:,}, found none; make the index again") from None  # fmt: skip
        return Passage(title, paragraph, text, row, *scores)

    def titled(self, title: str, most: int = 100) -> list[Passage]:
        """The first passages of the documents called so, in their order."""
        numbers, _ = self._one(title_term(title))
        return [self.passage(int(number)) for number in numbers[:most]]

    def search(self, question: str, k: int) -> list[Passage]:
        """The k best passages, best first; fewer if fewer hold any term of the question."""
        singles, ranges = asked(question)
        spans = [self._one(code) for code in singles] + [self._all(*ends) for ends in ranges]
        spans = sorted(spans, key=lambda span: len(span[0]))[:MOST_TERMS]
        sums = np.cumsum([len(docs) for docs, _ in spans])
        spans = spans[: max(int(np.searchsorted(sums, MOST_POSTINGS, "right")), 1)]
        idf = [self._idf(len(docs)) for docs, _ in spans]
        scores = np.zeros(len(self), np.float32)
        for (docs, weights), weight in zip(spans, idf, strict=True):
            scores[docs] += weights * np.float32(weight / 255)
        best = np.argpartition(-scores, min(k, len(self) - 1))[:k]
        best = best[np.lexsort((best, -scores[best]))]
        found = []
        for number in best[scores[best] > 0].tolist():
            held = _weight(number, spans, idf)
            shares = (held / sum(idf), held / self._idf(1))
            found.append(self.passage(number, float(scores[number]), *shares))
        return found

    def _idf(self, n_passages: int) -> float:
        """The weight of a term that stands in so many passages."""
        return math.log1p((len(self) - n_passages + 0.5) / (n_passages + 0.5))

    def _one(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """Passages that hold a term, ascending, and its weights in them."""
        place = int(np.searchsorted(self.terms, np.uint64(term)))
        is_there = place < len(self.terms) and int(self.terms[place]) == term
        return self._between(place, place + is_there)

    def _all(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for all terms from `first` to before `last` as if they were one."""
        ends = np.searchsorted(self.terms, np.array([first, last], np.uint64))
        docs, weights = self._between(*map(int, ends))
        docs, where = np.unique(docs, return_inverse=True)
        sums = np.bincount(where, weights, len(docs))
        return docs, sums.clip(max=255).astype(np.uint8)

    def _between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        begin, end = int(self.ends[first]), int(self.ends[last])
        return self.docs[begin:end], self.weights[begin:end]


def asked(question: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The terms of a question, and ranges of terms for characters that stand alone."""
    codes, places = terms(QUESTION_WORDS.sub(" ", normal(question)))
    found = dict(zip(places.tolist(), codes.tolist(), strict=True))
    singles, ranges = {}, {}
    for place, code in found.items():
        if code & _IS_WORD or code & _LOW:
            singles[code] = True
        elif not found.get(place - 1, _IS_WORD) & _LOW:
            ranges[code] = True
    return list(singles), [(code, code + _LOW + 1) for code in ranges]


def _weight(number: int, spans: list[tuple[np.ndarray, np.ndarray]], idf: list[float]) -> float:
    """The weight of those terms that a passage holds."""
    held = 0.0
    for (docs, _), weight in zip(spans, idf, strict=True):
        place = np.searchsorted(docs, number)
        held += weight * bool(place < len(docs) and docs[place] == number)
    return held
