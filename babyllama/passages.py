"""Cutting text: documents into passages to be found, and any text to a size, at sentence ends.

A document is canonical `text` of a row: its title as first line, if it has one, and its paragraphs,
one a line (data_process/datasets/wiki.py writes them so). A passage is a paragraph, or several
short ones together, or a part of a long one; it keeps the number of the paragraph it begins in.
"""

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
