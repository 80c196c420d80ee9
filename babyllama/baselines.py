"""What a summary must beat, and what copying could reach at most. No torch.

The first three know nothing but the text. `best_sentence` looks at the reference: no system that
copies one whole sentence can do better.
"""

import re
from collections.abc import Sequence

from babyllama.metrics import clipped_pair

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
