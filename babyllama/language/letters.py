"""The one form of letters in which all training text and everything that is asked is read.

Sets pass here when they are made (data_process/clean.py), questions before they are tokenized. And
in what encodings files come, and how they name the parts of a set.
"""

import codecs
import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress

INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200c\u200e\u200f\u2060\ufeff\ue000-\uf8ff]"
    "|\u200d(?![\u2600-\u27bf\U0001f000-\U0001faff])"  # it joins emoji
)
# Full-width letters and digits; Chinese punctuation stays as wide as it is.
WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]")
MOST_ACCENTS = 30  # on one letter: Unicode's Stream-Safe Text Format, UAX 15, section 13
SHARED = "於噁谿拚"  # beside GB 2312: OpenCC would change them, but simplified texts have them too
LEAST_SHARE = 0.01  # of traditional characters, for a text to be simplified


def plain(text: str) -> str:
    """A text in the one form in which all training text and everything that is asked is read.

    Lines, spaces and punctuation stay. Line ends become \\n; control, zero-width and private-use
    characters go; accents join their letters (Unicode NFC); full-width letters and digits become
    plain ones; a traditional text becomes simplified (OpenCC, t2s).
    """
    text = INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return simplify(narrow(compose(text)))


def compose(text: str) -> str:
    """Letters with separate accents become one character (Unicode NFC)."""
    if unicodedata.is_normalized("NFC", text):
        return text
    # Sorting the accents of a letter takes time that grows with the square of their number.
    return unicodedata.normalize("NFC", _accents().sub(r"\1", text))


@functools.cache
def _accents() -> re.Pattern[str]:
    marks = "".join(c for c in map(chr, range(0x300, 0x1EF00)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{{MOST_ACCENTS}}})[{marks}]+")


def narrow(text: str) -> str:
    """Full-width letters and digits become plain ones."""
    return WIDE.sub(lambda found: chr(ord(found[0]) - 0xFEE0), text)


def simplify(text: str) -> str:
    """A text with one traditional character in a hundred or more becomes simplified."""
    traditional, convert = _simplifier()
    is_traditional = len(text) - len(traditional.sub("", text)) > LEAST_SHARE * len(text)
    return convert(text) if is_traditional else text


@functools.cache
def _simplifier() -> tuple[re.Pattern[str], Callable[[str], str]]:
    """A pattern for the characters of traditional texts alone (GB 2312, the character set of
    simplified Chinese, lacks them), and the converter."""
    import opencc

    convert = opencc.OpenCC("t2s").convert
    han = "\n".join(map(chr, range(0x4E00, 0xA000)))
    changed = [(a, b) for a, b in zip(han, convert(han), strict=True) if a != b]
    # Simplified forms beyond 16 bits are of dictionaries alone: what has one stays as it is.
    rare = {ord(b): a for a, b in changed if ord(b) > 0xFFFF}
    telling = (a for a, b in changed if b.encode("gb2312", "ignore") and a not in SHARED
               and not a.encode("gb2312", "ignore"))  # fmt: skip
    return re.compile(f"[{''.join(telling)}]"), lambda text: convert(text).translate(rare)


def as_trained(messages: Sequence[dict]) -> list[dict]:
    """Messages whose texts of people, not of the model, are in the letters that it has learnt."""
    return [
        m if m["role"] == "assistant" else m | {"content": plain(m["content"])} for m in messages
    ]


WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
FREQUENT = re.compile("[的一是不了有在人我这這中大上个個国國他到们們\n ]")


def likely_encoding(head: bytes) -> str | None:
    """UTF-8, or the encoding in which a file reads best as Chinese; None: it is no text."""
    if head[:2] in WIDE_BOMS:
        return "utf-16"
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if b"\0" not in head:
            return "utf-8-sig"
    encodings = ("utf-16-le", "utf-16-be") if b"\0" in head else ("gb18030", "big5")
    found = [(encoding, head.decode(encoding, "replace")) for encoding in encodings]
    # A short text in GB18030 may have two such signs in Big5 by chance.
    texts = [(len(FREQUENT.findall(text)) - 2 * (name == "big5"), name)
             for name, text in found if "\0" not in text]  # fmt: skip
    return max(texts, key=lambda text: text[0])[1] if texts else None


# How files name the parts of a set, and the order in which these are read: held-out rows first.
PART = re.compile(
    r"(?P<test>(?<![a-z])(?:tests?|testset|testing|heldout|holdout)(?![a-z])|[测測][试試]|[评評][测測])"
    r"|(?P<val>(?<![a-z])(?:dev(?:set)?|val(?:id(?:ation)?)?|eval(?:uation)?)(?![a-z])|[验驗][证證]"
    r"|校[验驗]|[开開][发發])|(?P<train>(?<![a-z])train(?:ing|set)?(?![a-z])|[训訓][练練])"
)
ORDER = {"test": 0, "val": 1, "train": 2, None: 2}


def part_of(name: str) -> str | None:
    """The part of a set that a name states: csl_title_dev.json -> val, 测试集 -> test."""
    found = PART.search(name.lower())
    return found.lastgroup if found else None
